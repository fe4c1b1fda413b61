"""The whole job: spec to vectors, head, metrics, report and bundle. Each step skips what is done."""

import importlib
import json
import math
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from bertray import __version__, answers, checkpoints, labels, pairs
from bertray import bundle as bundles
from bertray.annotations import part_of
from bertray.bundle import Bundle
from bertray.clock import account
from bertray.cluster import connected, is_named, over_nodes
from bertray.embed import embed, reasons, versions
from bertray.errors import BundleError, SourceError, SpecError
from bertray.evaluate import Evaluation, evaluate
from bertray.examine import details as examine
from bertray.journal import Journal
from bertray.lease import held
from bertray.progress import log
from bertray.samples import Wanted
from bertray.search import Choice, from_bytes, threshold, to_bytes
from bertray.spec import Spec, fingerprint, load_spec
from bertray.splits import Split, bytes_of, changed_files, splits_of
from bertray.states import Again, tables
from bertray.storage import FileInfo, Location, output_folder, retries
from bertray.store import Manifest, Receipt, Store

_JUDGED = ("train", "dev", "test")
STEPS = ("embed", "fit", "evaluate")


def run(
    spec: str | Path | Mapping[str, Any] | Spec,
    *,
    train: Any = None,
    dev: Any = None,
    test: Any = None,
    overrides: Sequence[str] = (),
    until: str = "evaluate",
) -> dict[str, Any]:
    """Run a spec, all of it or until one of its steps.

    Args:
        spec: YAML file, mapping or Spec.
        train: rows to use in place of data.train: a `datasets.Dataset`, a pandas frame, an Arrow table or a Ray
            Dataset.
        dev, test: likewise for data.dev and data.test.
        overrides: such as `encoder.pooling=mean`.
        until: `embed`, `fit` or `evaluate` (which writes the report too).

    Returns:
        The summary, which metrics.json holds when all steps are run.

    Raises:
        BertrayError: with what is wrong, where, and what to do.
    """
    if until not in STEPS:
        raise SpecError(f"until must be one of {', '.join(STEPS)}. Got {until!r} instead.")
    spec = load_spec(spec, overrides)
    folder = output_folder(spec.output)
    with held(folder) as holder, ExitStack() as stack:
        return _Run(spec, folder, holder.run, {"train": train, "dev": dev, "test": test}, stack).until(until)


class _Run:
    """One run of a spec: what is known so far, and how long each step took."""

    def __init__(self, spec: Spec, folder: Location, run: str, given: Mapping[str, Any], stack: ExitStack) -> None:
        """stack: what the run's connection to Ray ends with."""
        self.spec, self.folder, self.run, self._stack = spec, folder, run, stack
        self.seconds: dict[str, float] = {}
        started = time.perf_counter()
        self._imports = _Imports() if (self.folder / "metrics.json").exists() else _Imports("ray")
        self.checkpoint = checkpoints.find(spec.encoder.model, spec.encoder.revision)
        self.splits, self.label_names = splits_of(
            spec, self.checkpoint, self.folder, given, self._over_nodes if is_named(spec.ray) else None
        )
        self.seconds["prepare"] = round(time.perf_counter() - started, 3)
        self.manifests: dict[str, Manifest] = {}
        self.choice: Choice | None = None
        path = self.folder / "metrics.json"
        try:
            self.saved: dict[str, Any] = json.loads(path.read()) if path.exists() else {}
        except ValueError:
            self.saved = {}  # damaged: as good as missing
        self.journal = Journal(folder, run, bertray=__version__, price=spec.ray.price, **self.seconds)

    def until(self, last: str) -> dict[str, Any]:
        self._timed("embed", lambda: self.embed(fits=last != "embed"))
        if not self.spec.ray.fit_workers:
            # Nothing needs Ray any longer: a cluster of our own ends while the head is fitted.
            self._stack.enter_context(_aside(self._stack.pop_all().close))
        if last != "embed":
            bundle = self._timed("fit", self.fit)
        return self.evaluate(bundle) if last == "evaluate" else self._summary()

    def _join_ray(self) -> None:
        self._stack.enter_context(connected(self.spec.ray, alone=True))

    def _over_nodes(self, function: Callable[[FileInfo], Any], files: Sequence[FileInfo]) -> Iterable[Any]:
        self._join_ray()
        return over_nodes(function, files)

    def _timed(self, step: str, action: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        with self.journal.step(step) as told:
            result = action()
            self.seconds.setdefault(step, round(time.perf_counter() - started, 3))
            if not self.seconds[step]:
                told["outcome"] = "done already"
            if step == "embed":
                told |= {"rows": {name: manifest.counts for name, manifest in self.manifests.items()}}
                told |= {"faults": self._faults(), "spent": self._spent()}
        return result

    # --- steps --------------------------------------------------------------------------------------------

    def embed(self, fits: bool) -> None:
        """Complete the stores; `fits` tells whether a head will be fitted afterwards. Until the first encoder process
        is ready, the time is that of the step `start`."""
        started = time.perf_counter()
        found = None
        if self._siamese:
            found = pairs.apart(
                self.splits,
                self.spec.encoder,
                self.checkpoint,
                self.folder,
                self.label_names,
                self.spec.data.max_rejects,
            )
            self.manifests |= found.manifests
            self.splits = [*found.splits, found.texts]
        open_splits = []
        for split in self.splits:
            manifest = self.manifests.get(split.name) or split.store.manifest()
            if manifest and manifest.holds([unit.key for unit in split.units]):
                self.manifests[split.name] = manifest
            else:
                open_splits.append(split)
        if not open_splits:
            log.info("embedding: done already")
            self.seconds["embed"] = 0.0
            self._settle(found)
            return
        for split in open_splits:
            self._check_changed(split)
        if part_of(self.spec.form) != "text":  # those are large
            self._tell_size(open_splits)
        self._imports.wait()
        later = ("torch", "ray.train.torch", "matplotlib.figure", "matplotlib.backends.backend_svg")
        self._imports = _Imports("ray.data", *(later if fits else ()))
        self._join_ray()
        self._imports.wait("ray.data")
        joined = time.perf_counter() - started

        def ready(seconds: float) -> None:
            self.seconds["start"] = round(joined + seconds, 3)

        self.manifests |= embed(
            open_splits,
            self.spec.encoder,
            self.checkpoint,
            self.spec.ray,
            self.label_names,
            ready=ready,
            max_rejects=self.spec.data.max_rejects,
            run=self.run,
        )
        self._settle(found)
        start = self.seconds.get("start", 0.0)
        self.seconds["embed"] = round(time.perf_counter() - started - start, 3)

    def _settle(self, found: pairs.Pairs | None) -> None:
        """Set pairs aside whose texts could not be encoded by themselves."""
        if found:
            found = pairs.settled(found, self.manifests["texts"], self.spec.data.max_rejects)
            self.splits = [*found.splits, found.texts]
            self.manifests |= found.manifests

    def _tell_size(self, splits: Sequence[Split]) -> None:
        each = sum(bytes_of(split, self.spec.encoder, self.checkpoint) for split in splits)
        kept = self.spec.encoder.states == "store"
        words = "to be stored" if kept else "encoded in each pass (encoder.states), and not stored"
        log.info("embedding: about %s of vectors %s", _size(each), words)

    def _check_changed(self, split: Split) -> None:
        if not (changed := changed_files(split)):
            return
        named = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        if self.spec.data.changed == "refuse":
            raise SourceError(
                f"data.{split.name}: {named} changed after being encoded. Restore what it was, or set data.changed "
                "to encode, which encodes it again."
            )
        log.info("embedding: %s of data.%s changed after being encoded: encoded again", named, split.name)

    def fit(self) -> Bundle:
        from bertray.fit import RECIPE, fit

        names, classes = self._classes()
        fitted_on = [self.manifests[name] for name in ("train", "dev", "texts") if name in self.manifests]
        made = fingerprint(
            {
                "recipe": RECIPE,
                "stores": [[part.fingerprint, *(unit.unit for unit in part.units)] for part in fitted_on],
                "labels": names,
                "classes": classes,
                "form": self.spec.form,
                "head": self.spec.head.model_dump(mode="json"),
            }
        )
        folder, kept = (self.folder / "head").url, self.folder / "left_out.npz"
        if (done := _loaded(folder)) and done.fingerprint == made and (choice := _kept(kept)):
            log.info("fitting: done already")
            self.seconds["fit"], self.choice = 0.0, choice
            return done
        self._imports.wait("torch", "ray.train.torch")
        if self.spec.ray.fit_workers:
            self._join_ray()
        fitted = fit(
            self._wanted(names, classes),
            self.spec.head,
            self.checkpoint.layers,
            self.spec.ray,
            self.folder / ".fitting",
        )
        self.choice = fitted.choice
        (self.folder / "metrics.json").delete()  # its figures are another head's
        bundle = self._bundle(names, fitted, made)
        kept.write(to_bytes(fitted.choice))
        bundles.save(bundle, folder)
        return bundle

    def _wanted(self, names: tuple[str, ...], classes: dict[str, int]) -> Wanted:
        spec = self.spec.head
        return Wanted(
            tuple(self._store(name) for name in ("train", "dev") if name in self.manifests),
            self.spec.form,
            classes,
            len(names),
            spec.folds,
            spec.seed,
            spec.class_weight == "balanced",
            self._store("texts") if self._siamese else None,
            self._again(self.manifests["train"].features),
            names,
        )

    def _again(self, features: Sequence[str]) -> Again | None:
        """What encodes vectors again, where they are not stored."""
        encoder, part = self.spec.encoder, part_of(self.spec.form)
        if encoder.states == "store":
            return None
        found = self.checkpoint
        return Again(found.name, found.revision, found.identity, encoder, part, tuple(features))

    def _bundle(self, names: tuple[str, ...], fitted: Any, made: str) -> Bundle:
        spec, choice = self.spec, fitted.choice
        setting = asdict(choice.setting)
        return Bundle(
            task=spec.task,
            problem=spec.problem,
            labels=names,
            features=tuple(setting.pop("features")),
            encoder={
                **spec.encoder.model_dump(mode="json"),
                "model": self.checkpoint.name,
                "revision": self.checkpoint.revision,
                "identity": self.checkpoint.identity,
            },
            columns=spec.data.model_dump(include={"text", "text_pair", "label", "id"}),
            head_spec={**spec.head.model_dump(mode="json"), **setting},
            losses=tuple(fitted.losses),
            seconds=fitted.seconds,
            fingerprint=made,
            versions=versions(),
            head=fitted.head,
            metrics={},
            temperature=choice.temperature,
            threshold=threshold(choice, spec.head.answer_accuracy, spec.form, fitted.lengths),
            lengths=fitted.lengths,
            ood=fitted.ood,
        )

    def evaluate(self, bundle: Bundle) -> dict[str, Any]:
        made = fingerprint(
            {
                "bundle": bundle.fingerprint,
                "splits": {
                    name: [manifest.fingerprint, *(unit.unit for unit in manifest.units)]
                    for name, manifest in self.manifests.items()
                },
            }
        )
        path = self.folder / "metrics.json"
        if self.saved.get("fingerprint") == made and path.exists() and (self.folder / "report.html").exists():
            log.info("evaluating: done already")
            with self.journal.step("evaluate") as told:
                told["outcome"] = "done already"
            return {**self.saved, "spent": self._spent(), **self._places()}
        path.delete()  # while predictions and report change, they are nobody's
        for name in _JUDGED:
            (self.folder / "predictions" / f"{name}.parquet").delete()
        before = {step: s for step, s in self.saved.get("seconds", {}).items() if step in ("start", "embed", "fit")}
        self.seconds = {**before, **{step: s for step, s in self.seconds.items() if s}}
        _, classes = self._classes()
        texts = self._store("texts") if self._siamese else None
        again = self._again(bundle.features)
        encoder = again.encoder(self.spec.ray.device) if again else None
        evaluations: dict[str, Evaluation] = self._timed(
            "evaluate",
            lambda: {
                name: evaluate(self._store(name), bundle, classes, self._predictions(name), texts, encoder)
                for name in _JUDGED
                if name in self.manifests
            },
        )
        metrics = {name: evaluation.metrics for name, evaluation in evaluations.items()}
        bundle = replace(bundle, metrics=metrics)
        bundles.save(bundle, (self.folder / "head").url)
        summary = self._summary(
            problem=bundle.problem,
            features=list(bundle.features),
            head={**bundle.head_spec, "temperature": bundle.temperature, "threshold": bundle.threshold},
            metrics=metrics,
            intervals={
                split: {name: list(found) for name, found in evaluation.intervals.items() if math.isfinite(sum(found))}
                for split, evaluation in evaluations.items()
            },
            examples=self._examples(bundle),
        )
        self._timed("report", lambda: self._report(summary, evaluations, bundle, classes))
        self.seconds["total"] = round(sum(self.seconds.values()), 3)
        summary = {**summary, "seconds": self.seconds, "fingerprint": made}
        path.write(json.dumps(summary, indent=1, ensure_ascii=False).encode())
        return summary

    # --- parts of steps -----------------------------------------------------------------------------------

    def _store(self, name: str) -> Store:
        return next(split.store for split in self.splits if split.name == name)

    @property
    def _siamese(self) -> bool:
        return bool(self.spec.data.text_pair) and self.spec.encoder.pair == "siamese"

    def _predictions(self, name: str) -> Location:
        return self.folder / "predictions" / f"{name}.parquet"

    def _classes(self) -> tuple[tuple[str, ...], dict[str, int]]:
        """The label names, and what class each label of the rows stands for."""
        if self.spec.form in ("number", "answers"):  # there are none
            return ((self.spec.data.label,) if self.spec.form == "number" else ("start", "end")), {}
        names = self.label_names or labels.find_names(self.manifests["train"].labels)
        if not names:
            raise SourceError("None of the training rows has a label. Give rows with some.")
        if len(names) < 2 and self.spec.form != "names":
            raise SourceError(
                f"The training rows have one label only ({', '.join(names)}): there is nothing to tell "
                "apart. Give rows with at least two."
            )
        if self.spec.form == "tokens":
            labels.check_tags(names)
        seen = [label for name in _JUDGED if name in self.manifests for label in self.manifests[name].labels]
        return names, labels.index(seen, names)

    def _examples(self, bundle: Bundle) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        again = self._again(bundle.features) if self.spec.examples else None
        encoder = again.encoder(self.spec.ray.device) if again else None
        columns = ["text", *(["starts", "stops"] if bundle.part != "text" else []), *bundle.features]
        for table in tables(self._store("examples"), columns, encoder) if self.spec.examples else ():
            logits, edges, spans = answers.logits(bundle, *answers.states_of(table, bundle.features))
            texts = table["text"].to_pylist()
            given = pa.table(answers.columns(bundle, logits, texts, None, edges, spans)).to_pylist()
            for text, row in zip(texts, given, strict=True):
                found.append({"text": text, "label": answers.told(row["predicted"]), "score": row.get("score")})
        return found

    def _summary(self, **more: Any) -> dict[str, Any]:
        rows = {
            name: {
                **manifest.counts,
                "reasons": reasons(self._store(name), manifest) if manifest.total("rejected") else {},
            }
            for name, manifest in self.manifests.items()
            if name != "examples"
        }
        return {
            **self._places(),
            "task": self.spec.task,
            "encoder": {**self.spec.encoder.model_dump(mode="json"), "backends": self._backends()},
            "rows": rows,
            "faults": self._faults(),
            "spent": self._spent(),
            "seconds": self.seconds,
            **more,
        }

    @property
    def _units(self) -> list[Receipt]:
        return [unit for manifest in self.manifests.values() for unit in manifest.units]

    def _backends(self) -> list[str]:
        """What ran the encoder's layers, on all nodes."""
        return sorted({unit.backend for unit in self._units if unit.backend})

    def _faults(self) -> dict[str, int]:
        """What went wrong on the way and was made good: units begun again since a process had ended, and attempts at
        storage that were repeated."""
        lost = sum(unit.lost for unit in self._units)
        return {"units_begun_again": lost, "storage_retries": sum(unit.retries for unit in self._units) + retries()}

    def _spent(self) -> dict[str, Any]:
        """Where the time of the encoder processes went, of all runs that made the vectors, and what it cost."""
        return account((unit.spent for unit in self._units), self.spec.ray.price)

    def _places(self) -> dict[str, str]:
        places = {"output": self.folder, "report": self.folder / "report.html", "bundle": self.folder / "head"}
        return {name: place.url for name, place in places.items()}

    def _report(
        self,
        summary: dict[str, Any],
        evaluations: Mapping[str, Evaluation],
        bundle: Bundle,
        classes: Mapping[str, int],
    ) -> None:
        from bertray.report import html

        judged = "test" if "test" in evaluations else "train"
        predictions = pq.read_table(
            self._predictions(judged).open_random(), columns=["id", "text", "label", "predicted"]
        )
        assert self.choice is not None
        splits = {split.name: split for split in self.splits}
        details = {
            "judged": judged,
            "labels": list(bundle.labels),
            "losses": list(bundle.losses),
            **evaluations[judged].details,
            "confusion": {
                name: found.details["confusion"] for name, found in evaluations.items() if bundle.form == "name"
            },
            **examine(splits, self.manifests, bundle, self.choice, classes, predictions, judged),
            **_searched(self.choice),
        }
        self._imports.wait()
        spec = yaml.safe_dump(self.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        title = self.folder.url.rstrip("/").rpartition("/")[2]
        (self.folder / "report.html").write(html(title, summary, details, spec, bundle.versions).encode())


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _searched(choice: Choice) -> dict[str, Any]:
    """What the report shows of the settings that were tried."""
    if len(choice.curve) < 2:
        return {}
    return {"search": {"metric": choice.metric, "best": asdict(choice.setting), "curve": list(choice.curve)}}


def _kept(place: Location) -> Choice | None:
    """What was found by rows left out; None if it is missing or damaged."""
    try:
        return from_bytes(place.read())
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def _loaded(folder: str) -> Bundle | None:
    """The bundle there; None if it is missing or damaged, since it can be fitted again."""
    try:
        return bundles.load(folder)
    except BundleError:
        return None


class _Imports:
    """Modules that take long to import, one after another, while other processes start and work.

    Only one thread imports them, since two that need each other's modules can see them half done: wait before you use
    one.
    """

    def __init__(self, *names: str) -> None:
        self._done = {name: threading.Event() for name in names}
        if names:
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        for name, done in self._done.items():
            with suppress(Exception):  # whoever uses it will see what is wrong
                importlib.import_module(name)
            done.set()

    def wait(self, *names: str) -> None:
        """Until those of these, or of all, that are on the way are imported."""
        for name, done in self._done.items():
            if not names or name in names:
                done.wait()


@contextmanager
def _aside(action: Callable[[], None]) -> Iterator[None]:
    """Does something in a thread, and leaves when it is done."""
    thread = threading.Thread(target=action)
    thread.start()
    try:
        yield
    finally:
        thread.join()
