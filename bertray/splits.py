"""Splits: the rows to fit on, to judge by and to look at, cut into units, each with the store that its vectors go to.

A split's plan is written into its store: what that is to hold, and all that it takes to make it again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from bertray.checkpoints import Checkpoint
from bertray.errors import SourceError, SpecError
from bertray.features import features
from bertray.sources import Columns, OverNodes, Reader, Unit, from_hub, is_saved_dataset, stage, units
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import Source, Spec, fingerprint
from bertray.storage import Location
from bertray.store import Manifest, Receipt, Store

_SAMPLE = 200  # rows whose words are counted
RECIPE = 4  # raised when a change of code gives other vectors for the same settings


@dataclass(frozen=True)
class Split:
    """The units of one source, and the store that they go to."""

    name: str
    units: tuple[Unit, ...]
    columns: Columns
    store: Store
    made_by: dict[str, Any]


def made_by(
    spec: EncoderSpec,
    checkpoint: Checkpoint,
    columns: Columns,
    source: dict[str, Any],
    wanted: Sequence[str] = (),
) -> dict[str, Any]:
    """All that makes the vectors of a source what they are. Its fingerprint names the store.

    Args:
        wanted: what vectors consist of; empty where the spec tells.
    """
    names = {"max_length", "truncation", "precision"}
    settings = spec.model_dump(include=names | ({"overlap"} if spec.truncation == "window" else set()))
    return {
        "recipe": RECIPE,
        **checkpoint.identity,
        **settings,
        "features": list(wanted) or list(map(str, features(spec.pooling, spec.layers, checkpoint.layers))),
        **({} if spec.states == "store" else {"states": spec.states}),
        "columns": asdict(columns),
        "source": source,
    }


def bytes_of(split: Split, spec: EncoderSpec, checkpoint: Checkpoint) -> int:
    """About how many bytes the vectors of a split take: exactly, where texts have vectors; else by a sample of rows."""
    each = len(split.made_by["features"]) * checkpoint.width * (4 if spec.precision == "fp32" else 2)
    rows = sum(unit.rows for unit in split.units)
    if split.columns.part == "text":
        return rows * each
    from bertray.tokens import Tokenizer

    first = replace(split.units[0], stop=min(split.units[0].stop, split.units[0].start + _SAMPLE))
    sample = Reader(split.columns).read(first).rows
    tokenizer = Tokenizer(checkpoint.folder, spec.max_length, spec.truncation, spec.overlap, split.columns.part)
    pairs = sample["text_pair"].to_pylist() if split.columns.text_pair else None
    words = tokenizer(sample["text"].to_pylist(), pairs, strict=False).words
    return rows * each * (len(words.spans) if words else 0) // max(1, sample.num_rows)


def wanted_rows(spec: Spec, given: Mapping[str, Any]) -> list[tuple[str, Source, Columns, Any]]:
    """The splits of labelled rows that a spec names: of each the name, the source, the columns, and what is given.

    Raises:
        SpecError: the spec names no rows, or no label.
    """
    data = spec.data
    if given["train"] is None and not data.train.given:
        raise SpecError("data.train must name a path or a hub data set.")
    if not data.label:
        raise SpecError("data.label must be a string that is not empty: a head is fitted on labels.")
    columns = Columns(data.text, data.text_pair, data.label, data.id, spec.form)
    wanted = [("train", data.train, columns, given["train"])]
    for name, source in (("dev", data.dev), ("test", data.test)):
        if source.given or given[name] is not None:
            wanted.append((name, source, columns, given[name]))
    return wanted


def splits_of(
    spec: Spec,
    checkpoint: Checkpoint,
    folder: Location,
    given: Mapping[str, Any],
    over_nodes: OverNodes | None = None,
) -> tuple[list[Split], tuple[str, ...]]:
    """The splits `train`, and where there are rows for them, `dev`, `test` and `examples`; and the label names as far
    as the spec or the rows tell them.

    Args:
        folder: of the run: what is not a file yet is written there first.
        given: rows in memory for `train`, `dev` and `test`, or None.
        over_nodes: as for `units`.

    Raises:
        SpecError: the spec names no rows, or no label.
        SourceError: the rows cannot be read.
    """
    data, wanted = spec.data, wanted_rows(spec, given)
    columns = wanted[0][2]
    if spec.examples:
        texts = pa.table({"text": list(spec.examples)})
        wanted.append(("examples", Source(), Columns("text", form=spec.form), texts))
    splits, label_names = [], data.labels
    for name, source, columns, rows in wanted:
        identity = {"given": name} if rows is not None else source.model_dump(exclude={"limit"})
        source, carried = _files(name, source, columns, rows, folder)
        label_names = label_names or carried
        made = made_by(spec.encoder, checkpoint, columns, identity)
        store = Store((folder / "stores" / f"{name}-{fingerprint(made)}").url)
        splits.append(Split(name, tuple(units(source, columns, data.unit_rows, over_nodes)), columns, store, made))
    return splits, label_names


def _files(name: str, source: Source, columns: Columns, rows: Any, folder: Location) -> tuple[Source, tuple[str, ...]]:
    """A source of files, and the label names that its rows carry: rows that are not files yet become some."""
    if rows is None and is_data_set(name, source):
        rows = from_hub(source)
    if rows is None:
        return source, ()
    staged = folder / "rows" / name
    carried = stage(rows, columns, staged)
    return Source(path=staged.url, format="parquet", limit=source.limit), carried


def is_data_set(name: str, source: Source) -> bool:
    """Whether a split's source is a data set of the hub or of save_to_disk, and not files.

    Raises:
        SpecError: it is files, and the spec asks for what only data sets have.
    """
    if source.hub or is_saved_dataset(source):
        return True
    if source.split or source.config:
        raise SpecError(
            f"data.{name}: split and config are for hub and save_to_disk data sets. {source.path} is files: give "
            "files of its own to each split, or use limit."
        )
    return False


def plan_of(split: Split, spec: EncoderSpec, checkpoint: Checkpoint, label_names: tuple[str, ...]) -> dict[str, Any]:
    """What a split's store is to hold, and all that it takes to make it, for JSON."""
    files: dict[str, dict[str, Any]] = {}
    for unit in split.units:
        if unit.name not in files:
            files[unit.name] = {**asdict(unit), "cuts": []}
        files[unit.name]["cuts"].append([unit.start, unit.stop])
    return {
        "split": split.name,
        "made_by": split.made_by,
        "encoder": {**spec.model_dump(mode="json"), "model": checkpoint.name, "revision": checkpoint.revision},
        "identity": checkpoint.identity,
        "labels": list(label_names),
        "columns": asdict(split.columns),
        "files": [{k: v for k, v in file.items() if k not in ("start", "stop")} for file in files.values()],
    }


def planned(plan: Mapping[str, Any]) -> tuple[Unit, ...]:
    """The units of a plan, in the order of the rows."""
    return tuple(
        Unit(**{k: v for k, v in file.items() if k != "cuts"}, start=start, stop=stop)
        for file in plan["files"]
        for start, stop in file["cuts"]
    )


def changed_files(split: Split) -> list[str]:
    """The files of a split that are not what they were when they were encoded or were to be."""
    before = split.store.plan()
    stamps = {file["name"]: file["stamp"] for file in before["files"]} if before else {}
    return sorted({unit.name for unit in split.units if stamps.get(unit.name, unit.stamp) != unit.stamp})


def check_any(split: Split, manifest: Manifest) -> None:
    """Check that some row of a split can be used.

    Raises:
        SourceError: all were set aside.
    """
    if not manifest.total("rows"):
        raise SourceError(
            f"{split.name}: none of the {manifest.total('rejected')} rows can be used. "
            f"See why in {split.store.location / 'rejects'}."
        )


class Rejects:
    """Counts the rows of a split that are set aside, up to what is allowed."""

    def __init__(self, split: Split, most: float) -> None:
        self.split, self.aside = split, 0
        self.rows = sum(unit.rows for unit in split.units)
        self.most, self.told = most if isinstance(most, int) else most * self.rows, most

    def add(self, receipt: Receipt) -> None:
        """Count what was set aside of a unit.

        Raises:
            SourceError: it is too much now.
        """
        self.aside += receipt.rejected
        if receipt.rejected and self.aside > self.most:
            reject = self.split.store.rejects(receipt.unit)[0]
            raise SourceError(
                f"{self.split.name}: {self.aside} of {self.rows} rows are set aside so far, more than data.max_rejects "
                f"({self.told}) allows; {reject['id']}, for one: {reject['reason']}. See "
                f"{self.split.store.location / 'rejects'}; mend the rows, or raise data.max_rejects."
            )
