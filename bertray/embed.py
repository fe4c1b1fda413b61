"""Embedding: units to vector stores, in parallel on Ray Data, each unit exactly once.

An actor reads its unit, encodes it and writes the shard itself; what travels through Ray is a receipt. While it
encodes a unit it reads the next and writes the last. Units whose shards are there already are not touched.

What can go wrong: a process that ends is started again by Ray, and its units are begun again, a few times each; one
that shows no sign of life is ended; a pipeline that fails is begun again with what is missing.
"""

import json
import os
import platform
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray import checkpoints, labels, solo
from bertray.checkpoints import Checkpoint
from bertray.cluster import Workers, end_process, is_full, plan_workers
from bertray.errors import ERRORS, BertrayError, CheckpointError, ClusterError, SourceError, StoreError
from bertray.progress import Progress, log
from bertray.sources import Batch, Columns, Reader, Unit
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import RaySizes, fingerprint
from bertray.storage import Location, retries
from bertray.store import Attempt, Manifest, Receipt, Store, with_vectors

RECIPE = 3  # raised when a change of code gives other vectors for the same settings
_UNITS_AT_ONCE = 3  # in an actor: one is read, one encoded, one written
_ATTEMPTS = 5  # at a unit in one run; those before it was begun in vain, since its process ended
_FAILURES = 3  # of the whole pipeline, one after another without a unit done in between
_PREVIEW = 80  # characters of a text that is set aside


@dataclass(frozen=True)
class Split:
    """The units of one source, and the store that they go to."""

    name: str
    units: tuple[Unit, ...]
    columns: Columns
    store: Store
    made_by: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What an encoder process has to know."""

    checkpoint: str
    revision: str
    identity: dict[str, str]
    encoder: EncoderSpec
    label_names: tuple[str, ...]
    columns: dict[str, Columns]
    stores: dict[str, Store]
    finish: Callable[[pa.Table, Any], pa.Table] = with_vectors
    run: str = ""
    patience: int = 600


def made_by(spec: EncoderSpec, checkpoint: Checkpoint, columns: Columns, source: dict[str, Any]) -> dict[str, Any]:
    """All that makes the vectors of a source what they are. Its fingerprint names the store."""
    names = {"pooling", "max_length", "truncation", "precision"}
    settings = spec.model_dump(include=names | ({"overlap"} if spec.truncation == "window" else set()))
    return {
        "recipe": RECIPE,
        **checkpoint.identity,
        **settings,
        "columns": asdict(columns),
        "source": source,
    }


def embed(
    splits: Sequence[Split],
    spec: EncoderSpec,
    checkpoint: Checkpoint,
    sizes: RaySizes,
    label_names: tuple[str, ...] = (),
    finish: Callable[[pa.Table, Any], pa.Table] = with_vectors,
    ready: Callable[[float], None] = lambda seconds: None,
    max_rejects: float = 1.0,
    run: str = "",
) -> dict[str, Manifest]:
    """Complete the stores of all splits, encoding what is missing, in one pipeline.

    Args:
        label_names: what labels have to be; empty takes any.
        finish: from a unit's rows and their vectors to the table that its shard holds.
        ready: is told after how many seconds the first encoder process was ready, if one was started.
        max_rejects: rows of a split that may be set aside: a count, or a share if it is a float.
        run: tells this run's attempts from those of others.

    Raises:
        BertrayError: whatever stopped a worker, or too many rows were set aside.
    """
    for split in splits:
        split.store.write_plan(plan_of(split, spec, checkpoint, label_names))
    done = {split.name: split.store.done([unit.key for unit in split.units]) for split in splits}
    todo = [(split.name, unit) for split in splits for unit in split.units if unit.key not in done[split.name]]
    rejects = {split.name: _Rejects(split, max_rejects) for split in splits}
    for name, receipts in done.items():
        for receipt in receipts.values():
            rejects[name].add(receipt)
    if todo:
        job = Job(
            checkpoint.name,
            spec.revision,
            checkpoint.identity,
            spec,
            label_names,
            {split.name: split.columns for split in splits},
            {split.name: split.store for split in splits},
            finish,
            run,
            sizes.patience,
        )
        total = sum(unit.stop - unit.start for split in splits for unit in split.units)
        missing = sum(unit.stop - unit.start for _, unit in todo)
        if missing < total:
            log.info("embedding: %d of %d rows are done already", total - missing, total)
        with Progress("embedding", total, "rows", total - missing) as progress:
            started, tokens = time.monotonic(), 0
            for name, receipt in _until_done(todo, job, sizes, ready):
                done[name][receipt.unit] = receipt
                tokens += receipt.tokens
                speed = tokens / (time.monotonic() - started)
                progress.add(receipt.rows + receipt.rejected, f"{speed:.0f} tokens/s")
                rejects[name].add(receipt)
    return {split.name: _finish(split, done[split.name], checkpoint.name) for split in splits}


def plan_of(split: Split, spec: EncoderSpec, checkpoint: Checkpoint, label_names: tuple[str, ...]) -> dict[str, Any]:
    """What a split's store is to hold, and all that it takes to make it, for JSON."""
    files: dict[str, dict[str, Any]] = {}
    for unit in split.units:
        file = files.setdefault(unit.name, {**asdict(unit), "cuts": []})
        file["cuts"].append([unit.start, unit.stop])
    return {
        "split": split.name,
        "made_by": split.made_by,
        "encoder": {**spec.model_dump(), "model": checkpoint.name},
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


class _Rejects:
    """Counts the rows of a split that are set aside, up to what is allowed."""

    def __init__(self, split: Split, most: float) -> None:
        self.split, self.aside = split, 0
        self.rows = sum(unit.stop - unit.start for unit in split.units)
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


def _finish(split: Split, receipts: dict[str, Receipt], encoder: str) -> Manifest:
    # Name and versions are told, but are not part of the fingerprint: the hashes say what the encoder is.
    made_by = {**split.made_by, "encoder": encoder, "versions": versions()}
    manifest = Manifest(fingerprint(split.made_by), made_by, tuple(receipts[unit.key] for unit in split.units))
    if not manifest.total("rows"):
        raise SourceError(
            f"{split.name}: none of the {manifest.total('rejected')} rows can be used. "
            f"See why in {split.store.location / 'rejects'}."
        )
    split.store.finish(manifest)
    return manifest


def versions() -> dict[str, str]:
    """The versions of what computes."""
    packages = ("bertray", "ray", "torch", "transformers", "tokenizers", "numpy", "pyarrow")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _until_done(
    todo: list[tuple[str, Unit]], job: Job, sizes: RaySizes, ready: Callable[[float], None]
) -> Iterator[tuple[str, Receipt]]:
    """Receipts of all units, in as many pipelines as it takes."""
    from ray.data.exceptions import SystemException
    from ray.exceptions import RayError

    missing, failures = {(name, unit.key): (name, unit) for name, unit in todo}, 0
    while missing:
        before, line = len(missing), "units are missing."
        try:
            for name, receipt in _receipts(list(missing.values()), job, sizes, ready):
                if missing.pop((name, receipt.unit), None):
                    yield name, receipt
        except (RayError, SystemException) as error:
            line = " ".join(str(error).split())[:300]
        for name, store in job.stores.items():  # some were done while their receipts were on the way
            for receipt in store.done([key for split, key in missing if split == name]).values():
                del missing[name, receipt.unit]
                yield name, receipt
        failures = 0 if len(missing) < before else failures + 1
        if failures == _FAILURES:
            raise ClusterError(f"Embedding has failed {failures} times in a row: {line} The same command goes on.")
        if missing:
            log.warning("embedding: going on with what is missing, since Ray says: %s", line)


def _receipts(
    todo: list[tuple[str, Unit]], job: Job, sizes: RaySizes, ready: Callable[[float], None]
) -> Iterator[tuple[str, Receipt]]:
    """Receipts of units, in the order they are done, from one pipeline."""
    started, first = time.time(), True
    workers = plan_workers(sizes, len(todo))
    log.info(
        "embedding: %d units on %d %s worker(s) of %d thread(s)",
        len(todo),
        workers.count,
        workers.device,
        workers.threads,
    )
    watch = _Watch(job, workers)
    for row in _aside(_rows(todo, job, workers), watch.look):
        if first:
            ready(max(0.0, row["ready"] - started))  # another node's clock may differ
            first = False
        watch.heard()
        yield row["split"], Receipt(**json.loads(row["value"]))


def _rows(todo: list[tuple[str, Unit]], job: Job, workers: Workers) -> Iterator[dict[str, Any]]:
    import logging

    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # it takes slow units for hung ones: see _Watch
    context.max_consecutive_actor_init_deaths = _FAILURES
    items = [{"split": name, **asdict(unit)} for name, unit in todo]
    receipts = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        UnitEncoder,
        fn_constructor_args=(job, workers.device, workers.threads),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=workers.count,  # Ray Data adds actors one at a time otherwise
            max_concurrent_calls_per_actor=_UNITS_AT_ONCE,
            max_tasks_in_flight_per_actor=_UNITS_AT_ONCE + 1,
            enable_true_multi_threading=True,
        ),
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus,
    )
    with solo.running():
        for batch in receipts.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            for row in batch.to_pylist():
                if row["error"]:
                    raise ERRORS[row["error"]](row["value"])
                yield row


def _aside(items: Iterator[Any], meanwhile: Callable[[], None]) -> Iterator[Any]:
    """Items as they come from an iterator that runs in a thread, so that the caller can look after other things each
    second, and Ctrl-C finds a thread that waits for nothing of Ray's."""
    queue: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
    stopped = threading.Event()

    def drain() -> None:
        try:
            for item in items:
                queue.put((False, item))
                if stopped.is_set():
                    items.close()  # type: ignore[attr-defined]
                    return
            queue.put((True, None))
        except BaseException as error:
            queue.put((True, error))

    threading.Thread(target=drain, name="bertray-pipeline", daemon=True).start()
    try:
        while True:
            try:
                ended, item = queue.get(timeout=1)
            except Empty:
                meanwhile()
                continue
            if ended and item:
                raise item
            if ended:
                return
            yield item
            meanwhile()
    finally:
        stopped.set()


@dataclass
class _Watch:
    """Tells encoder processes that hang from those that are slow, by whether they renew their attempts, and ends them:
    Ray starts them again."""

    job: Job
    workers: Workers
    seen: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)
    sign: float = field(default_factory=time.monotonic)
    looked: float = field(default_factory=time.monotonic)
    queued: bool = False  # whether other work held what the processes need
    ended: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.queued = is_full(self.workers)

    def heard(self) -> None:
        self.sign, self.queued = time.monotonic(), False

    def look(self) -> None:
        """Look after the processes, now and then.

        Raises:
            ClusterError: none of them has shown a sign of life.
        """
        now = time.monotonic()
        if now - self.looked < self.job.patience / 4:
            return
        self.looked, before = now, self.seen
        self.seen = {}
        for split, store in self.job.stores.items():
            for file in store.attempts():
                stamp, since = before.get((split, file.name), ("", now))
                if stamp != file.stamp:
                    self.sign, since = now, now
                elif now - since > self.job.patience:
                    self._end(store.attempt(file.name.removesuffix(".json")))
                    since = now
                self.seen[split, file.name] = (file.stamp, since)
        if now - self.sign > 2 * self.job.patience:
            self._nothing()

    def _end(self, attempt: Attempt | None) -> None:
        if not attempt or attempt.run != self.job.run or (attempt.node, attempt.pid) in self.ended:
            return  # what was noted is of another run, or of a process that is gone
        log.warning(
            "embedding: process %d on %s has shown no sign of life for %d s: it is ended, and begun again",
            attempt.pid,
            attempt.host,
            self.job.patience,
        )
        end_process(attempt.node, attempt.pid, UnitEncoder.__name__)
        self.ended.add((attempt.node, attempt.pid))
        self.sign = time.monotonic()

    def _nothing(self) -> None:
        if self.queued and is_full(self.workers):
            log.warning("embedding: still waiting: the Ray cluster is busy with other work")
            self.sign = time.monotonic()
            return
        raise ClusterError(
            f"No encoder process has shown a sign of life for {2 * self.job.patience} s: they hang, die while they "
            "start (out of memory?), or their nodes are gone. See `ray status` and the logs in /tmp/ray; the same "
            "command goes on from here."
        )


class UnitEncoder:
    """The actor: a unit in, its shard written, a receipt out. What a user can mend comes back as a value.

    Calls run beside each other. Each reads in a thread that all share, so that files are read forwards; the encoder
    lets one encode while others tokenize; each writes in its own.
    """

    def __init__(self, job: Job, device: str, threads: int) -> None:
        self.job = job
        self._readers = {split: Reader(columns) for split, columns in job.columns.items()}
        self._reading = ThreadPoolExecutor(1)
        store, start = next(iter(job.stores.values())), f"start-{_actor()}"
        try:
            if store.begin(start, job.run, _node()).number > _ATTEMPTS:
                raise ClusterError(
                    f"An encoder process on {platform.node()} has ended {_ATTEMPTS} times while it started: killed, or "
                    "out of memory. Give each more memory (fewer ray.workers)."
                )
            # Before torch loads its threads' library: a thread that has done its part sleeps soon. Threads that spin
            # for others take the processor from them where there are more threads than processors.
            if "OMP_WAIT_POLICY" not in os.environ:
                os.environ.setdefault("GOMP_SPINCOUNT", "1000")
            for name in ("scipy", "sklearn", "PIL"):  # transformers imports them where they are installed
                sys.modules.setdefault(name, None)  # type: ignore[arg-type]
            from bertray.encoder import Encoder

            checkpoint = checkpoints.find(job.checkpoint, job.revision)
            if checkpoint.identity != job.identity:
                raise CheckpointError(
                    f"{job.checkpoint} is not the same on {platform.node()} as where the job was "
                    "started. Give every node the same files."
                )
            self.encoder, self.failure = Encoder(checkpoint, job.encoder, device, threads), None
        except Exception as error:  # an actor that cannot start is restarted for ever: tell it with the first unit
            known = isinstance(error, BertrayError)
            line = f"An encoder process on {platform.node()} cannot start: {type(error).__name__}: {error}"
            self.failure = error if known else BertrayError(" ".join(line.split()))
        with suppress(OSError):
            store.end(start)
        self._at_work: dict[tuple[str, str], Attempt] = {}
        self._signs, self._retries, self._lock = 0, 0, threading.Lock()
        threading.Thread(target=self._pulse, name="bertray-pulse", daemon=True).start()
        self.ready = time.time()

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._answer(**item) for item in batch.to_pylist()])

    def _answer(self, split: str, **unit: Any) -> dict[str, Any]:
        try:
            if self.failure:
                raise self.failure
            receipt = self._attempt(split, Unit(**unit))
            return {"split": split, "value": json.dumps(asdict(receipt)), "error": "", "ready": self.ready}
        except BertrayError as error:
            return {"split": split, "value": str(error), "error": type(error).__name__, "ready": self.ready}
        except OSError as error:  # a full disk, a store out of reach
            line = f"{self.job.stores[split].url} cannot be written on {platform.node()}: {error}"
            line = f"{' '.join(line.split())}. When that is mended, the same command goes on from here."
            return {"split": split, "value": line, "error": "StoreError", "ready": self.ready}

    def _attempt(self, split: str, unit: Unit) -> Receipt:
        """A unit, encoded under a note that tells others so."""
        store = self.job.stores[split]
        if done := store.receipt(unit.key):  # and its receipt was lost on the way
            return done
        attempt = store.begin(unit.key, self.job.run, _node())
        if attempt.number > _ATTEMPTS:
            raise StoreError(
                f"{unit.url}, rows {unit.start} to {unit.stop}: encoder processes have ended {_ATTEMPTS} times while "
                "they were at work there: killed, out of memory, or without a sign of life. Give each more memory "
                "(fewer ray.workers), or lower data.unit_rows."
            )
        with self._lock:
            self._at_work[split, unit.key] = attempt
        try:
            return self._encode(split, unit, attempt)
        finally:
            with self._lock:
                del self._at_work[split, unit.key]
            with suppress(OSError):
                store.end(unit.key)

    def _pulse(self) -> None:
        """Renews the attempts as long as there are signs of life: packs computed, units read."""
        seen = None
        while True:
            time.sleep(self.job.patience / 8)
            signs = (self._signs, self.encoder.steps if not self.failure else 0)
            if signs != seen:
                with self._lock, suppress(OSError):
                    for (split, key), attempt in self._at_work.items():
                        self.job.stores[split].renew(key, attempt)
            seen = signs

    def _encode(self, split: str, unit: Unit, attempt: Attempt) -> Receipt:
        started = time.perf_counter()
        columns, names = self.job.columns[split], self.job.label_names
        batch = self._read(split, unit)
        if names and columns.label:
            labels.check(_labels(batch), names, unit.url)
        pairs = batch.rows["text_pair"].to_pylist() if columns.text_pair else None
        encoded, failed = self.encoder.encode_rows(batch.rows["text"].to_pylist(), pairs)
        batch = set_aside(batch, failed)
        kept = np.delete(np.arange(len(encoded.tokens)), list(failed))
        receipt = Receipt(
            unit.key,
            len(kept),
            batch.rejects.num_rows,
            _empty(batch.rows["text"]),
            int(encoded.truncated[kept].sum()),
            int(encoded.tokens[kept].sum()),
            round(time.perf_counter() - started, 4),
            _labels(batch) if columns.label else {},
            self.encoder.backend.name,
            int((encoded.windows[kept] > 1).sum()),
            attempt.lost,
            self._new_retries(),
        )
        self._signs += 1
        if done := self.job.stores[split].receipt(unit.key):  # another process has gone on with what this one had
            return done
        return self.job.stores[split].write_shard(
            receipt, self.job.finish(batch.rows, encoded.vectors[kept]), batch.rejects
        )

    def _read(self, split: str, unit: Unit) -> Batch:
        reader = self._readers[split]
        batch = self._reading.submit(Location(unit.url).patiently, lambda: reader.read(unit)).result()
        self._signs += 1
        return batch

    def _new_retries(self) -> int:
        """How often something in storage was tried again since this was asked last."""
        with self._lock:
            before, self._retries = self._retries, retries()
            return self._retries - before


def _node() -> str:
    """Ray's id of this node; empty outside of Ray."""
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def _actor() -> str:
    """Ray's id of this actor, which it keeps when its process is started again; empty outside of Ray."""
    import ray

    return str(ray.get_runtime_context().get_actor_id()) if ray.is_initialized() else ""


def set_aside(batch: Batch, failed: Mapping[int, str]) -> Batch:
    """A batch without the rows that cannot be encoded, which become rejects: {row: reason}."""
    if not failed:
        return batch
    bad = sorted(failed)
    rows = batch.rows.take(bad)
    rejects = pa.table(
        {
            "id": rows["id"],
            "reason": pa.array([failed[row] for row in bad], pa.string()),
            "preview": pc.utf8_slice_codeunits(rows["text"], 0, _PREVIEW),
        }
    )
    good = np.delete(np.arange(batch.rows.num_rows), bad)
    return Batch(batch.rows.take(good), pa.concat_tables([batch.rejects.cast(rejects.schema), rejects]))


def _labels(batch: Batch) -> dict[str, int]:
    """How many rows have each label."""
    return dict(Counter(batch.rows["label"].to_pylist()))


def _empty(texts: pa.ChunkedArray) -> int:
    return int(pc.sum(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)).as_py() or 0)


def reasons(store: Store, manifest: Manifest) -> dict[str, int]:
    """How many rows were set aside for each reason."""
    counts: Counter[str] = Counter()
    for receipt in manifest.units:
        if receipt.rejected:
            counts.update(row["reason"] for row in store.rejects(receipt.unit))
    return dict(counts)
