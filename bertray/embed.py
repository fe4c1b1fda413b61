"""Embedding: units to vector stores, in parallel on Ray Data, each unit exactly once.

An actor reads its unit, encodes it and writes the shard itself; what travels through Ray is a receipt. While it
encodes a unit it reads the next and writes the last. Units whose shards are there already are not touched.
"""

import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bertray import checkpoints, labels, solo
from bertray.checkpoints import Checkpoint
from bertray.cluster import plan_workers
from bertray.errors import ERRORS, BertrayError, CheckpointError, SourceError
from bertray.progress import Progress, log
from bertray.sources import Columns, Reader, Unit
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import RaySizes, fingerprint
from bertray.store import Manifest, Receipt, Store, with_vectors

RECIPE = 2  # raised when a change of code gives other vectors for the same settings
_UNITS_AT_ONCE = 3  # in an actor: one is read, one encoded, one written


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
    finish: Callable[[pa.Table, Any], pa.Table]


def made_by(spec: EncoderSpec, checkpoint: Checkpoint, columns: Columns, source: dict[str, Any]) -> dict[str, Any]:
    """All that makes the vectors of a source what they are. Its fingerprint names the store."""
    settings = spec.model_dump(include={"pooling", "max_length", "truncation", "precision"})
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
) -> dict[str, Manifest]:
    """Complete the stores of all splits, encoding what is missing, in one pipeline.

    Args:
        label_names: what labels have to be; empty takes any.
        finish: from a unit's rows and their vectors to the table that its shard holds.
        ready: is told after how many seconds the first encoder process was ready, if one was started.

    Raises:
        BertrayError: whatever stopped a worker.
    """
    done = {split.name: split.store.done([unit.key for unit in split.units]) for split in splits}
    todo = [(split.name, unit) for split in splits for unit in split.units if unit.key not in done[split.name]]
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
        )
        total = sum(unit.stop - unit.start for split in splits for unit in split.units)
        missing = sum(unit.stop - unit.start for _, unit in todo)
        if missing < total:
            log.info("embedding: %d of %d rows are done already", total - missing, total)
        with Progress("embedding", total, "rows", total - missing) as progress:
            started, tokens = time.monotonic(), 0
            for name, receipt in _receipts(todo, job, sizes, ready):
                done[name][receipt.unit] = receipt
                tokens += receipt.tokens
                speed = tokens / (time.monotonic() - started)
                progress.add(receipt.rows + receipt.rejected, f"{speed:.0f} tokens/s")
    return {split.name: _finish(split, done[split.name], checkpoint.name) for split in splits}


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


def _receipts(
    todo: list[tuple[str, Unit]], job: Job, sizes: RaySizes, ready: Callable[[float], None]
) -> Iterator[tuple[str, Receipt]]:
    import logging

    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    started, first = time.time(), True
    workers = plan_workers(sizes, len(todo))
    log.info(
        "embedding: %d units on %d %s worker(s) of %d thread(s)",
        len(todo),
        workers.count,
        workers.device,
        workers.threads,
    )
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
                if first:
                    ready(max(0.0, row["ready"] - started))  # another node's clock may differ
                    first = False
                yield row["split"], Receipt(**json.loads(row["value"]))


class UnitEncoder:
    """The actor: a unit in, its shard written, a receipt out. What a user can mend comes back as a value.

    Calls run beside each other. Each reads in a thread that all share, so that files are read forwards; the encoder
    lets one encode while others tokenize; each writes in its own.
    """

    def __init__(self, job: Job, device: str, threads: int) -> None:
        self.job = job
        self._readers = {split: Reader(columns) for split, columns in job.columns.items()}
        self._reading = ThreadPoolExecutor(1)
        try:
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
        self.ready = time.time()

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._answer(**item) for item in batch.to_pylist()])

    def _answer(self, split: str, **unit: Any) -> dict[str, Any]:
        try:
            if self.failure:
                raise self.failure
            receipt = self._encode(split, Unit(**unit))
            return {"split": split, "value": json.dumps(asdict(receipt)), "error": "", "ready": self.ready}
        except BertrayError as error:
            return {"split": split, "value": str(error), "error": type(error).__name__, "ready": self.ready}
        except OSError as error:  # a full disk, a store out of reach
            line = f"{self.job.stores[split].url} cannot be written on {platform.node()}: {error}"
            return {"split": split, "value": " ".join(line.split()), "error": "StoreError", "ready": self.ready}

    def _encode(self, split: str, unit: Unit) -> Receipt:
        started = time.perf_counter()
        columns, names = self.job.columns[split], self.job.label_names
        batch = self._reading.submit(self._readers[split].read, unit).result()
        counts = Counter(batch.rows["label"].to_pylist()) if columns.label else Counter()
        if names:
            labels.check(counts, names, unit.url)
        texts = batch.rows["text"].to_pylist()
        pairs = batch.rows["text_pair"].to_pylist() if columns.text_pair else None
        encoded = self.encoder.encode(texts, pairs)
        receipt = Receipt(
            unit.key,
            len(texts),
            batch.rejects.num_rows,
            _empty(batch.rows["text"]),
            int(encoded.truncated.sum()),
            int(encoded.tokens.sum()),
            round(time.perf_counter() - started, 4),
            dict(counts),
            self.encoder.backend.name,
        )
        self.job.stores[split].write_shard(receipt, self.job.finish(batch.rows, encoded.vectors), batch.rejects)
        return receipt


def _empty(texts: pa.ChunkedArray) -> int:
    return int(pc.sum(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)).as_py() or 0)


def reasons(store: Store, manifest: Manifest) -> dict[str, int]:
    """How many rows were set aside for each reason."""
    counts: Counter[str] = Counter()
    for receipt in manifest.units:
        if receipt.rejected:
            lines = (store.location / "rejects" / f"{receipt.unit}.jsonl").read().split(b"\n")
            counts.update(json.loads(line)["reason"] for line in lines if line)
    return dict(counts)
