"""The worker: a process of Ray's that encodes units of rows, and writes what they give.

It reads a unit, encodes it and writes its shard itself; what travels through Ray is a receipt. While it encodes a unit
it reads the next and writes the last.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bertray import checkpoints, labels, pairs
from bertray.annotations import tags_of, words_of
from bertray.clock import Clock, Stopwatch
from bertray.errors import BertrayError, CheckpointError, ClusterError, StoreError
from bertray.features import parse
from bertray.meters import Meters
from bertray.progress import log
from bertray.sources import Batch, Columns, Reader, Unit, empty, set_aside
from bertray.spec import Encoder as EncoderSpec
from bertray.storage import Location, retries
from bertray.store import STARTING, Attempt, Receipt, Store
from bertray.vectors import with_vectors

UNITS_AT_ONCE = 3  # one is read, one encoded, one written
_ATTEMPTS = 5  # at a unit in one run; those before it was begun in vain, since its process ended
_PULSE_SECONDS = 20.0  # most between renewals of attempts


@dataclass(frozen=True)
class Job:
    """What an encoder process has to know.

    features: what vectors consist of; empty where the encoder's spec tells. siamese: whether pairs are encoded apart.
    metered: whether Ray has agents that show metrics.
    """

    checkpoint: str
    revision: str
    identity: dict[str, str]
    encoder: EncoderSpec
    label_names: tuple[str, ...]
    columns: dict[str, Columns]
    stores: dict[str, Store]
    finish: Callable[[pa.Table, Any, Sequence[str]], pa.Table] = with_vectors
    run: str = ""
    patience: int = 600
    features: tuple[str, ...] = ()
    siamese: bool = False
    metered: bool = False


class UnitEncoder:
    """The actor: units in, their shards written, receipts out. What a user can mend comes back as a value.

    Calls run beside each other. Each reads in a thread that all share, so that files are read forwards; the encoder
    lets one encode while others tokenize; each writes in its own.
    """

    def __init__(self, job: Job, device: str, threads: int) -> None:
        self.job, self._clock = job, Clock(_share())
        self._reads, self._writes, self._operations = Stopwatch(), Stopwatch(), 0.0
        self._readers = {split: Reader(columns) for split, columns in job.columns.items()}
        self._reading = ThreadPoolExecutor(1)
        self.failure: Exception | None = None  # an actor that cannot start is restarted for ever: units tell of it
        store, start = next(iter(job.stores.values())), f"{STARTING}{_actor()}"
        try:
            attempt = store.begin(start, job.run, _node())
            self.encoder = self._loaded(attempt, device, threads)
            store.end(start)
            self._clock.ready(
                encode=self.encoder.backend.busy, read=self._reads, tokenize=self.encoder.tokenizing, write=self._writes
            )
            self._meters = Meters(store.run_name, *_device(device), shown=job.metered)
        except (BertrayError, OSError) as error:
            self.failure = error
        self._at_work: dict[tuple[str, str], Attempt] = {}
        self._signs, self._retries, self._lock = 0, retries(), threading.Lock()
        threading.Thread(target=self._pulse, name="bertray-pulse", daemon=True).start()
        self.ready = time.time()

    def _loaded(self, attempt: Attempt, device: str, threads: int) -> Any:
        """The encoder.

        Raises:
            BertrayError: it cannot be loaded.
        """
        if attempt.number > _ATTEMPTS:
            raise ClusterError(
                f"An encoder process on {platform.node()} has ended {_ATTEMPTS} times while it started: killed, or "
                "out of memory. Give each more memory (fewer ray.workers)."
            )
        # Before torch loads its threads' library: a thread that has done its part sleeps soon. Threads that spin for
        # others take the processor from them where there are more threads than processors.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        for name in ("scipy", "sklearn", "PIL"):  # transformers imports them where they are installed
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
        try:
            from bertray.encoder import Encoder

            checkpoint = checkpoints.find(self.job.checkpoint, self.job.revision)
            if checkpoint.identity != self.job.identity:
                raise CheckpointError(
                    f"{self.job.checkpoint} is not the same on {platform.node()} as where the job was started, or has "
                    "changed since. Give every node the same files, and run the command again."
                )
            (part,) = {columns.part for columns in self.job.columns.values()}
            wanted = list(map(parse, self.job.features))
            return Encoder(checkpoint, self.job.encoder, device, threads, part, wanted)
        except BertrayError:
            raise
        except Exception as error:
            line = f"An encoder process on {platform.node()} cannot start: {type(error).__name__}: {error}"
            raise BertrayError(" ".join(line.split())) from error

    def __call__(self, batch: pa.Table) -> pa.Table:
        answers: list[dict[str, Any]] = []
        for item in batch["units"][0].as_py():
            answers.append(self._answer(**item))
            if answers[-1]["error"]:  # the run stops there
                break
        return pa.Table.from_pylist(answers)

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
        except Exception as error:
            log.exception("%s", unit)  # into Ray's log of this process
            if "CUDA" in str(error):  # its device is lost to this process, but not to another
                os._exit(1)
            line = f"{unit['url']}, rows {unit['start']} to {unit['stop']}: unexpected {type(error).__name__}: {error}"
            return {"split": split, "value": " ".join(line.split()), "error": "BertrayError", "ready": self.ready}

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
            time.sleep(min(_PULSE_SECONDS, self.job.patience / 8))
            signs = (self._signs, self.encoder.steps if not self.failure else 0)
            if signs != seen:
                with self._lock, suppress(OSError):
                    for (split, key), attempt in self._at_work.items():
                        self.job.stores[split].renew(key, attempt)
            seen = signs
            with suppress(Exception):  # what is shown must not end what keeps units alive
                self._look()

    def _encode(self, split: str, unit: Unit, attempt: Attempt) -> Receipt:
        started = time.perf_counter()
        columns, names = self.job.columns[split], self.job.label_names
        batch = self._read(split, unit)
        if names and columns.label and columns.part == "text":  # a wrong one shows before anything is encoded
            labels.check(labels.counts(columns.form, batch.rows["label"]), names, unit.url)
        texts = batch.rows["text"].to_pylist()
        second = batch.rows["text_pair"].to_pylist() if columns.text_pair else None
        if self.job.siamese and second is not None:
            encoded, failed = pairs.encode(self.encoder, texts, second)
        else:
            encoded, failed = self.encoder.encode_rows(texts, second, _words(batch.rows))
        with self._lock:
            self._operations += self.encoder.flops(encoded.tokens, encoded.windows)
        batch = set_aside(batch, failed)
        kept = np.delete(np.arange(len(encoded.tokens)), list(failed))
        encoded = encoded.take(kept)
        rows = _tagged(batch.rows, encoded.spans) if columns.form == "tokens" else batch.rows
        counts = labels.counts(columns.form, rows["label"]) if columns.label else {}
        if names and columns.label and columns.part != "text":
            labels.check(counts, names, unit.url)
        receipt = Receipt(
            unit.key,
            len(kept),
            batch.rejects.num_rows,
            empty(rows["text"]),
            int(encoded.truncated.sum()),
            int(encoded.tokens.sum()),
            round(time.perf_counter() - started, 4),
            counts,
            self.encoder.backend.name,
            int((encoded.windows > 1).sum()),
            attempt.lost,
            self._new_retries(),
        )
        self._signs += 1
        if done := self.job.stores[split].receipt(unit.key):  # another process has gone on with what this one had
            return done
        with self._writes:
            table = self.job.finish(rows, encoded, list(map(str, self.encoder.features)))
            receipt = self.job.stores[split].write_shard(receipt, table, batch.rejects, self._clock.untold)
        counts = {"rows": receipt.rows, "tokens": receipt.tokens, "rejects": receipt.rejected}
        self._meters.count(split, counts)
        self._look()
        return receipt

    def _read(self, split: str, unit: Unit) -> Batch:
        def read() -> Batch:
            with self._reads:
                return Location(unit.url).patiently(lambda: self._readers[split].read(unit))

        batch = self._reading.submit(read).result()
        self._signs += 1
        return batch

    def _look(self) -> None:
        """Show how busy the device is."""
        if not self.failure:
            backend = self.encoder.backend
            self._meters.look(backend.busy.seconds, self._operations, backend.budget)

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


def _share() -> float:
    """Of its GPU that this process holds; 1 of none."""
    import ray

    if not ray.is_initialized() or (context := ray.get_runtime_context()).get_actor_id() is None:
        return 1.0
    held = context.get_assigned_resources().get("GPU", 1.0)
    return 1 / round(1 / held) if 0 < held < 1 else 1.0


def _device(kind: str) -> tuple[str, str]:
    """What metrics call the device of this process, and its name."""
    if kind == "cpu":
        return "cpu", ""
    import ray
    import torch

    numbers = ray.get_gpu_ids() if ray.is_initialized() else []
    return f"cuda:{','.join(map(str, numbers))}", torch.cuda.get_device_name()


def _words(rows: pa.Table) -> list[NDArray[np.int64] | None] | None:
    """Where the words of texts are that came as lists of words."""
    if "words" not in rows.column_names:
        return None
    return [None if lengths is None else words_of(lengths) for lengths in rows["words"].to_pylist()]


def _tagged(rows: pa.Table, spans: NDArray[np.object_]) -> pa.Table:
    """Rows with a tag for each word as their labels."""
    cells = zip(rows["label"].to_pylist(), rows["words"].to_pylist(), spans, strict=True)
    tags = [
        label if label is None or words is not None else json.dumps(tags_of(label, places), ensure_ascii=False)
        for label, words, places in cells
    ]
    rows = rows.drop_columns(["words"])
    return rows.set_column(rows.column_names.index("label"), "label", pa.array(tags, pa.string()))
