"""The workload of a job, told from samples of its splits: what there is to do, and how long each kind of it takes.

Knows nothing of how fast devices encode but what it is given.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from bertray.checkpoints import Checkpoint
from bertray.errors import SourceError
from bertray.features import features
from bertray.lengths import Lengths, lengths
from bertray.rates import Rate, table
from bertray.sources import Columns
from bertray.spec import Spec
from bertray.storage import Location
from bertray.store import Receipt, packed
from bertray.survey import Survey
from bertray.vectors import with_vectors, with_words

_WAVES = 20  # units for each process with which the last ones matter little
_IDLE = 0.1  # share of the time that is worth a word
_SHARD_BYTES = 32 << 20  # of vectors of a shard that is made to see how large shards are
_LABELS = 1000  # different ones of a sample: more are no names that receipts count
_UNIT = "rows.parquet-0000000000-0123456789ab"  # as long as any
_BACKEND = "int16 by bertray's kernels for AVX-512 VNNI"
# Requests to an object store, as a worker makes them: for each unit, for each file it opens, for each piece of a file.
_READS_A_UNIT, _WRITES_A_UNIT, _READS_A_FILE = 6, 3, 4
_UPLOAD_BYTES = 10 << 20  # more go up in parts, which takes two requests more
_DOWNLOAD_BYTES = {"csv": 16 << 20, "tsv": 16 << 20, "parquet": 64 << 20, "arrow": 64 << 20}
_LINE_BYTES = 1 << 20  # of all other formats
_COUNTING = 8  # files at once on a machine by itself, as sources has it
_KINDS = ("encoding", "tokenizing", "rows", "store", "requests")  # of work that goes on side by side


@dataclass(frozen=True)
class Devices:
    """What a job runs on.

    name: `cpu`, or a GPU's. count: the CPUs or GPUs that have a price. workers: processes; threads: of each.
    """

    name: str
    count: int
    workers: int
    threads: int


@dataclass(frozen=True)
class Part:
    """A split by its sample.

    row_bytes, unit_bytes: what each row and each shard take in the store.
    """

    name: str
    survey: Survey
    lengths: Lengths
    row_bytes: float
    unit_bytes: int

    @property
    def rows(self) -> int:
        """That are encoded."""
        usable = 1 - self.survey.rejected / self.survey.looked
        return round(self.survey.rows * usable * (1 - self.lengths.aside / self.lengths.rows))

    @property
    def tokens(self) -> int:
        return round(self.rows * self.lengths.each)

    @property
    def stored(self) -> int:
        """Bytes in the store."""
        return round(self.rows * self.row_bytes + self.survey.units * self.unit_bytes)

    def told(self) -> dict[str, Any]:
        found = self.survey
        return {
            "split": self.name,
            "rows": self.rows,
            "set_aside": found.rows - self.rows,
            "counted": found.exact,
            "units": found.units,
            "tokens": self.tokens,
            "tokens_within": 0.0 if self.lengths.rows >= found.rows else round(self.lengths.within, 4),
            "source_bytes": found.bytes,
            "stored_bytes": self.stored,
            "sampled_rows": self.lengths.rows,
            "sample": found.how,
        }


# --- splits -----------------------------------------------------------------------------------------------


def sampled(name: str, found: Survey, columns: Columns, spec: Spec, checkpoint: Checkpoint) -> Part:
    """A split, by what a survey has found.

    Raises:
        SourceError: all rows looked at are longer than allowed.
    """
    siamese = spec.encoder.pair == "siamese"
    seen = lengths(found.sample, found.places, checkpoint.folder, spec.encoder, columns.part, siamese)
    if seen.aside == seen.rows:
        raise SourceError(
            f"data.{name}: all {seen.rows} rows looked at are longer than encoder.max_length "
            f"({spec.encoder.max_length} tokens). Raise it, or set encoder.truncation to truncate or window."
        )
    rows = found.sample.slice(0, max(2, found.rows // found.units))  # small shards are compressed less
    return Part(name, found, seen, *_shard_sizes(rows, columns, spec, checkpoint, seen.words, siamese))


def _shard_sizes(
    rows: pa.Table, columns: Columns, spec: Spec, checkpoint: Checkpoint, words: float, siamese: bool
) -> tuple[float, int]:
    """Bytes of a row and of a shard without any, by shards that are made of a sample, with zeros for vectors: vectors
    are not compressed."""
    names = list(map(str, features(spec.encoder.pooling, spec.encoder.layers, checkpoint.layers)))
    kind = np.float32 if spec.encoder.precision == "fp32" else np.float16
    width = len(names) * checkpoint.width
    rows = rows.slice(0, max(2, int(_SHARD_BYTES / (width * np.dtype(kind).itemsize * max(1.0, words)))))
    if "words" in rows.column_names:
        rows = rows.drop_columns(["words"])
    if siamese:  # a store of pairs without vectors, and one of their texts
        numbers = pa.array(range(rows.num_rows), pa.int64())
        of_pairs = _sizes(rows.append_column("first", numbers).append_column("second", numbers))
        sides = [rows.select(["id", name]).rename_columns(["id", "text"]) for name in ("text", "text_pair")]
        texts = pa.concat_tables(sides).append_column("label", pa.nulls(2 * rows.num_rows, pa.string()))
        zeros = SimpleNamespace(vectors=np.zeros((texts.num_rows, width), kind))
        of_texts = _sizes(with_vectors(texts, zeros, names))
        return of_pairs[0] + 2 * of_texts[0], of_pairs[1] + of_texts[1]
    if columns.part == "text":
        return _sizes(with_vectors(rows, SimpleNamespace(vectors=np.zeros((rows.num_rows, width), kind)), names))
    counts = np.diff(np.round(np.arange(rows.num_rows + 1) * words).astype(int)).tolist()
    vectors, spans = np.empty(len(counts), object), np.empty(len(counts), object)
    for row, count in enumerate(counts):
        places = np.arange(count) * 6  # a word and a blank
        vectors[row], spans[row] = np.zeros((count, width), kind), np.stack([places, places + 5], 1)
    finish = with_words if spec.encoder.states == "encode" else with_vectors
    return _sizes(finish(rows, SimpleNamespace(vectors=vectors, spans=spans), names))


def _sizes(rows: pa.Table) -> tuple[float, int]:
    """Bytes that each row adds to a shard, and those of a shard without any."""
    labels = Counter(filter(None, rows["label"].to_pylist()))
    labels = labels if len(labels) < _LABELS else Counter()
    receipt = Receipt(_UNIT, rows.num_rows, 0, 0, 0, 100 * rows.num_rows, 1.2345, dict(labels), _BACKEND)
    sizes = [packed(receipt, part)[0].size for part in (rows.slice(0, 1), rows)]
    each = (sizes[1] - sizes[0]) / max(1, rows.num_rows - 1)
    return each, round(sizes[0] - each)


# --- work -------------------------------------------------------------------------------------------------


class Work:
    """What has to be done, and how long each kind of it takes all processes together: the slowest sets the pace."""

    def __init__(self, spec: Spec, devices: Devices, parts: Sequence[Part], found: Rate, bandwidth: float) -> None:
        self.devices, self.parts, self.rate, self.bandwidth = devices, parts, found, bandwidth
        self.tokens, self.rows = sum(part.tokens for part in parts), sum(part.rows for part in parts)
        self.units = sum(part.survey.units for part in parts)
        workers = devices.workers
        self.read = sum(part.survey.read_bytes(workers) for part in parts)
        self.written = sum(part.stored for part in parts)
        self.requests = self._requests(not Location(spec.output).local)
        whole = [
            max(1.0, part.tokens * part.lengths.whole) for part in parts
        ]  # texts are tokenized before they are cut
        self.tokenized = round(sum(whole))
        self.speed = self.tokenized / sum(n / part.lengths.speed for n, part in zip(whole, parts, strict=True))
        limits = table()["requests"]
        kinds = {
            "encoding": self.tokens / found.tokens_per_second / workers,
            "tokenizing": self.tokenized / self.speed / workers,
            "rows": self.rows / table()["rows"]["per_second"] / workers,
            "store": (self.read + self.written) / (bandwidth * 1e6 * workers),
            "requests": max(self.requests[name] / limits[name] for name in ("reads", "writes")),
        }
        self.pace = max(kinds, key=lambda name: kinds[name])
        self.counted = sum(part.survey.counted_bytes(max(_COUNTING, workers)) for part in parts)
        share = self.units / workers
        self.waves = math.ceil(share)
        self.idle = 1 - share / self.waves
        tail = kinds[self.pace] * (self.waves / share - 1)
        before = {"start": float(table()["start"]["seconds"]), "counting": self.counted / (bandwidth * 1e6)}
        self.seconds = {**before, **kinds, "tail": tail}
        self.total = sum(before.values()) + kinds[self.pace] + tail
        self.seconds["total"] = self.total

    def _requests(self, remote: bool) -> dict[str, int]:
        """Requests to object stores, reads and writes."""
        reads = writes = 0
        for part in self.parts:
            found, shard = part.survey, part.stored / max(1, part.survey.units)
            if remote:
                reads += (_READS_A_UNIT - 1) * found.units
                pieces = math.ceil(shard / _UPLOAD_BYTES)
                writes += found.units * (_WRITES_A_UNIT + pieces + (2 if pieces > 1 else 0))
            if found.remote:
                piece = _DOWNLOAD_BYTES.get(found.format, _LINE_BYTES)
                read = found.read_bytes(self.devices.workers)
                reads += found.units + _READS_A_FILE * found.opened(self.devices.workers) + math.ceil(read / piece)
        return {"reads": reads, "writes": writes}

    def how(self) -> Iterator[str]:
        """How the hours were reached, to be checked by hand."""
        seconds, known = self.seconds, table()
        each = f"/ {self.devices.workers} process{'es' * (self.devices.workers > 1)}"
        rows, limits = known["rows"], known["requests"]
        yield f"start {seconds['start']:.1f} s: {known['start']['where']}"
        if self.counted:
            told = f"{size(self.counted)} / {self.bandwidth:g} MB/s"
            yield f"counting {seconds['counting']:,.1f} s = {told}: rows, before units are cut; Parquet tells its own"
        yield f"encoding {_terms(seconds['encoding'], self.tokens, self.rate.tokens_per_second)} tokens {each}"
        yield f"tokenizing {_terms(seconds['tokenizing'], self.tokenized, self.speed)} tokens {each}: measured here"
        yield f"rows {_terms(seconds['rows'], self.rows, rows['per_second'])} rows {each}: {rows['where']}"
        moved = f"({size(self.read)} read + {size(self.written)} written) / {self.bandwidth:g} MB/s"
        yield f"store {seconds['store']:,.1f} s = {moved} {each}: bandwidth as given or assumed"
        if any(self.requests.values()):
            each_kind = (f"{self.requests[kind]:,} {kind} / {limits[kind]:,} a second" for kind in ("reads", "writes"))
            yield f"requests {seconds['requests']:,.1f} s, the longer of {' and '.join(each_kind)}: {limits['where']}"
        rounded = f"{self.waves} / {self.units / self.devices.workers:.4g} (units a process, rounded up)"
        before = "start + counting" if self.counted else "start"
        yield f"total {self.total:,.1f} s = {before} + {self.pace}, the longest, x {rounded}"

    def bottleneck(self) -> dict[str, str]:
        """What keeps the job from being done sooner, why, and what to do."""
        name, why, then = self._bottleneck()
        return {"name": name, "why": why, "do": then}

    def _bottleneck(self) -> tuple[str, str, str]:
        seconds, workers = self.seconds, self.devices.workers
        work = seconds[self.pace] + seconds["tail"]
        if seconds["start"] > work:
            return "start", f"the start takes longer than the work ({work:,.1f} s)", "fewer devices would do"
        if self.idle > _IDLE:
            rows = max(1, self.rows // (_WAVES * workers))
            most = -(-self.rows // self.units)
            return (
                "units",
                f"{self.units:,} units for {workers:,} processes leave them idle {self.idle:.0%} of the time",
                f"set data.unit_rows to {rows}" if rows < most else "fewer devices would do",
            )
        return (self.pace, *self._slowest())

    def _slowest(self) -> tuple[str, str]:
        next_one = max(self.seconds[name] for name in _KINDS if name != self.pace)
        times = self.seconds[self.pace] / max(next_one, 1e-9)
        why = f"takes {times:.1f} times as long as what comes next" if times < 100 else "takes far longer than all else"
        if self.pace == "encoding":
            return why, "more or faster devices, or a smaller encoder"
        if self.pace == "tokenizing":
            fast = "pip install 'bertray[fast]' (for single texts), or fewer and cheaper devices"
            return f"{why}: one process tokenizes {self.speed:,.0f} tokens/s", fast
        if self.pace == "rows":
            return why, "more, cheaper devices: texts are too short for these"
        if self.pace == "requests":
            return why, "raise data.unit_rows"
        again = self.read / max(1, sum(part.survey.bytes for part in self.parts))
        if again > 2:
            return (
                f"{why}: files are read {again:.0f} times over",
                "give many small files, or Parquet in small row groups",
            )
        return why, "keep fewer layers or poolings, or a lower precision"


def _terms(seconds: float, count: float, rate: float) -> str:
    return f"{seconds:,.1f} s = {count:,} / {rate:,.0f}"


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
