"""A forecast: what it will take to encode the rows of a spec, told from a sample of them before anything is begun.

Every figure is told with how it was reached. Knows nothing of Ray: processes and threads are counted as the module
cluster does where all nodes are alike.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from bertray import checkpoints
from bertray.checkpoints import Checkpoint
from bertray.errors import BertrayError, SourceError
from bertray.features import features
from bertray.lengths import Lengths, inputs, lengths
from bertray.rates import Rate, Shape, check_gpu, rate, table
from bertray.sources import Columns
from bertray.spec import Spec, load_spec
from bertray.splits import wanted_rows
from bertray.storage import Location
from bertray.store import Receipt, packed
from bertray.survey import Survey, survey
from bertray.vectors import with_vectors, with_words

BANDWIDTH = 125.0  # MB/s between a process and the store: an assumption (1 Gbit/s)
_THREADS = 4  # of a process at most, as the module cluster has it
_MEASURE_SECONDS = 6.0
_WAVES = 20  # units for each process with which the last ones matter little
_IDLE = 0.1  # share of the time that is worth a word
_SHARD_BYTES = 32 << 20  # of vectors of a shard that is made to see how large shards are
# Requests to an object store, as a worker makes them: for each unit, for each file it opens, for each piece of a file.
READS_A_UNIT, WRITES_A_UNIT, READS_A_FILE = 6, 7, 4
UPLOAD_BYTES = 10 << 20
_DOWNLOAD_BYTES = {"csv": 16 << 20, "tsv": 16 << 20, "parquet": 64 << 20, "arrow": 64 << 20}
_LINE_BYTES = 1 << 20  # of all other formats
_LABELS = 1000  # different ones of a sample: more are no names that receipts count
_UNIT, _BACKEND = (
    "rows.parquet-0000000000-0123456789ab",
    "int16 by bertray's kernels for AVX-512 VNNI",
)  # as long as any
_KINDS = ("encoding", "tokenizing", "rows", "store", "requests")  # of work that goes on side by side
_FATES = {"truncate": "cut", "error": "set aside", "window": "encoded in windows"}  # of texts that are too long


@dataclass(frozen=True)
class Devices:
    """What a job runs on.

    name: `cpu`, or a GPU's. count: the CPUs or GPUs that have a price. workers: processes; threads: of each.
    """

    name: str
    count: int
    workers: int
    threads: int

    def __str__(self) -> str:
        kind = "CPU" if self.name == "cpu" else self.name
        return f"{self.count} {kind}{'s' * (self.count > 1)}, {self.workers} process{'es' * (self.workers > 1)}"


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


def forecast(
    spec: str | Path | Mapping[str, Any] | Spec,
    *,
    gpus: int | None = None,
    gpu: str = "",
    cpus: int | None = None,
    price: float | None = None,
    bandwidth: float = BANDWIDTH,
    measure: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """What encoding all rows of a spec will take.

    Args:
        gpus: how many, of the kind `gpu`; left out, CPUs encode.
        cpus: how many in all; left out, those of this machine, or beside each GPU as many as a process uses.
        price: of a GPU, or where there are none of a CPU, for an hour.
        bandwidth: MB/s between a process and the store.
        measure: whether to measure the rate of this machine's device, instead of taking one from the table.

    Returns:
        For JSON: `splits`, `lengths`, sums over all splits, `rate`, `seconds` of each kind of work, `hours`, `cost`,
        `bottleneck`, and `how` the hours were reached, a line a step.

    Raises:
        BertrayError: with what is wrong, where, and what to do.
    """
    _check_numbers(gpus=gpus, cpus=cpus, price=price, bandwidth=bandwidth)
    spec = load_spec(spec, overrides)
    devices = _devices(spec, gpus or 0, gpu, cpus or 0, measure)
    wanted = wanted_rows(spec, {"train": None, "dev": None, "test": None})
    checkpoint = checkpoints.find(spec.encoder.model, spec.encoder.revision, weights=measure)
    parts = [
        _part(name, survey(name, source, columns, spec.data.unit_rows), columns, spec, checkpoint)
        for name, source, columns, _ in wanted
    ]
    found = _measured(parts[0], spec, checkpoint, devices) if measure else _from_table(parts, spec, checkpoint, devices)
    work = _Work(spec, devices, parts, found, bandwidth)
    return {
        "devices": devices.name,
        "count": devices.count,
        "workers": devices.workers,
        "threads": devices.threads,
        "encoder": checkpoint.name,
        "splits": [part.told() for part in parts],
        "lengths": _told_lengths(parts, spec),
        **{name: sum(part.told()[name] for part in parts) for name in ("rows", "units", "tokens", "stored_bytes")},
        "requests": work.requests,
        "rate": {"tokens_per_second": round(found.tokens_per_second), "kind": found.kind, "how": found.how},
        "seconds": {name: round(seconds, 3) for name, seconds in work.seconds.items()},
        "idle_share": round(work.idle, 4),
        "hours": work.total / 3600,
        "price": price,
        "cost": None if price is None else price * devices.count * work.total / 3600,
        "bottleneck": work.bottleneck(),
        "how": list(work.how()),
    }


def _check_numbers(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise BertrayError(f"{name} must be a number above 0. Got {number:g} instead.")


def _devices(spec: Spec, gpus: int, gpu: str, cpus: int, measure: bool) -> Devices:
    """What the job is to run on.

    Raises:
        BertrayError: that is not told, or there is no such thing.
    """
    sizes = spec.ray
    wanted = 0 if sizes.cpus_per_worker == "auto" else int(sizes.cpus_per_worker)
    if not gpus and not gpu:
        cpus = cpus or _cores()
        threads = min(cpus, wanted or _THREADS)
        return Devices("cpu", cpus, cpus // threads if sizes.workers == "auto" else int(sizes.workers), threads)
    if gpu or not measure:
        check_gpu(gpu)
    if sizes.device == "cpu":
        raise BertrayError("ray.device is cpu in the spec, but gpus are given. Leave them out, or set it to auto.")
    gpus = gpus or 1
    if cpus and cpus < gpus:
        raise BertrayError(f"cpus must be at least as many as gpus ({gpus}): each one's process takes one. Got {cpus}.")
    workers = gpus if sizes.workers == "auto" else min(gpus, int(sizes.workers))
    return Devices(gpu or "GPU", gpus, workers, wanted or min(_THREADS, cpus // gpus or _THREADS))


def _cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- splits -----------------------------------------------------------------------------------------------


def _part(name: str, found: Survey, columns: Columns, spec: Spec, checkpoint: Checkpoint) -> Part:
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
    labels = (
        dict(Counter(filter(None, rows["label"].to_pylist()))) if len(set(rows["label"].to_pylist())) < _LABELS else {}
    )
    receipt = Receipt(_UNIT, rows.num_rows, 0, 0, 0, 100 * rows.num_rows, 1.2345, labels, _BACKEND)
    sizes = [packed(receipt, part)[0].size for part in (rows.slice(0, 1), rows)]
    each = (sizes[1] - sizes[0]) / max(1, rows.num_rows - 1)
    return each, round(sizes[0] - each)


def _told_lengths(parts: Sequence[Part], spec: Spec) -> dict[str, Any]:
    """Lengths in tokens before any limit, of the texts of all samples, and what the limit does to them."""
    full = np.concatenate([part.lengths.full for part in parts])
    encoded = np.concatenate([part.lengths.encoded for part in parts])
    limit = spec.encoder.max_length
    long = full > limit
    return {
        "mean": round(float(full.mean()), 2),
        "p50": int(np.percentile(full, 50)),
        "p95": int(np.percentile(full, 95)),
        "max": int(full.max()),
        "max_length": limit,
        "truncation": spec.encoder.truncation,
        "over": round(float(long.mean()), 5),
        "encoded_mean": round(float(encoded.mean()), 2),
        "tokens_kept": round(float(encoded.sum() / full.sum()), 5),
    }


# --- rates ------------------------------------------------------------------------------------------------


def _from_table(parts: Sequence[Part], spec: Spec, checkpoint: Checkpoint, devices: Devices) -> Rate:
    tokens = [part.tokens for part in parts]
    attended = float(np.average([part.lengths.attended for part in parts], weights=np.maximum(1, tokens)))
    wanted = features(spec.encoder.pooling, spec.encoder.layers, checkpoint.layers)
    # bertray's kernels run no layer above the highest that is asked for; torch runs all.
    layers = max(feature.layer for feature in wanted) if devices.name == "cpu" else checkpoint.layers
    shape = Shape(max(1, layers), checkpoint.width, checkpoint.inner)
    return rate(devices.name, devices.threads, spec.encoder.precision, shape, attended)


def _measured(part: Part, spec: Spec, checkpoint: Checkpoint, devices: Devices) -> Rate:
    """What the device of this machine does with rows of the sample, for some seconds.

    Raises:
        BertrayError: this machine has no GPU, where the job is to run on some.
    """
    import torch

    from bertray.encoder import Encoder

    device = "cpu" if devices.name == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise BertrayError(
            "--measure measures this machine's device, but it has no GPU. Leave out --measure or --gpus."
        )
    threads = min(devices.threads, _cores())
    columns = Columns("text", form=spec.form)
    encoder = Encoder(checkpoint, spec.encoder, device, threads, columns.part)
    rows = part.survey.sample.take(np.random.default_rng(1).permutation(part.survey.sample.num_rows))
    siamese, count, seconds, tokens = spec.encoder.pair == "siamese", 32, 0.0, 0
    while True:  # the first texts tell how many fit the time
        texts = inputs(rows.slice(0, count), siamese)
        started = time.perf_counter()
        encoded, _ = encoder.encode_rows(*texts)
        seconds, tokens = time.perf_counter() - started, int(encoded.tokens.sum())
        if count >= rows.num_rows or seconds > _MEASURE_SECONDS / 4:
            break
        count = min(rows.num_rows, int(count * min(8.0, max(2.0, _MEASURE_SECONDS / 2 / seconds))))
    name = torch.cuda.get_device_name() if device == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
    share = devices.threads / threads if device == "cpu" else 1.0
    how = f"{tokens:,} tokens of {len(texts[0]):,} texts in {seconds:.2f} s on {name}: {encoder.backend.name}"
    how += f"; x {share:.3g} for {devices.threads} threads instead of {threads}" if share != 1 else ""
    return Rate(tokens / seconds * share, "measured here" if share == 1 else "estimate", how)


# --- work -------------------------------------------------------------------------------------------------


class _Work:
    """What has to be done, and how long each kind of it takes all processes together: the slowest sets the pace."""

    def __init__(self, spec: Spec, devices: Devices, parts: Sequence[Part], found: Rate, bandwidth: float) -> None:
        self.devices, self.parts, self.rate, self.bandwidth = devices, parts, found, bandwidth
        self.tokens, self.rows = sum(part.tokens for part in parts), sum(part.rows for part in parts)
        self.units = sum(part.survey.units for part in parts)
        workers = devices.workers
        self.read = sum(part.survey.read_bytes(workers) for part in parts)
        self.written = sum(part.stored for part in parts)
        self.requests = self._requests(not Location(spec.output).local)
        self.speed = self.tokens / sum(part.tokens / part.lengths.speed for part in parts)
        limits = table()["requests"]
        kinds = {
            "encoding": self.tokens / found.tokens_per_second / workers,
            "tokenizing": self.tokens / self.speed / workers,
            "rows": self.rows / table()["rows"]["per_second"] / workers,
            "store": (self.read + self.written) / (bandwidth * 1e6 * workers),
            "requests": max(self.requests[name] / limits[name] for name in ("reads", "writes")),
        }
        self.pace = max(kinds, key=lambda name: kinds[name])
        share = self.units / workers
        self.waves = math.ceil(share)
        self.idle = 1 - share / self.waves
        tail = kinds[self.pace] * (self.waves / share - 1)
        self.seconds = {"start": float(table()["start"]["seconds"]), **kinds, "tail": tail}
        self.total = self.seconds["start"] + kinds[self.pace] + tail
        self.seconds["total"] = self.total

    def _requests(self, remote: bool) -> dict[str, int]:
        """Requests to object stores, reads and writes."""
        reads = writes = 0
        for part in self.parts:
            found, shard = part.survey, part.stored / max(1, part.survey.units)
            if remote:
                reads += (READS_A_UNIT - 1) * found.units
                writes += found.units * (WRITES_A_UNIT + math.ceil(shard / UPLOAD_BYTES))
            if found.remote:
                piece = _DOWNLOAD_BYTES.get(found.format, _LINE_BYTES)
                read = found.read_bytes(self.devices.workers)
                reads += found.units + READS_A_FILE * found.opened(self.devices.workers) + math.ceil(read / piece)
        return {"reads": reads, "writes": writes}

    def how(self) -> Iterator[str]:
        """How the hours were reached, to be checked by hand."""
        seconds, known = self.seconds, table()
        each = f"/ {self.devices.workers} process{'es' * (self.devices.workers > 1)}"
        rows, limits = known["rows"], known["requests"]
        yield f"start {seconds['start']:.1f} s: {known['start']['where']}"
        yield f"encoding {_terms(seconds['encoding'], self.tokens, self.rate.tokens_per_second)} tokens {each}"
        yield f"tokenizing {_terms(seconds['tokenizing'], self.tokens, self.speed)} tokens {each}: measured here"
        yield f"rows {_terms(seconds['rows'], self.rows, rows['per_second'])} rows {each}: {rows['where']}"
        moved = f"({size(self.read)} read + {size(self.written)} written) / {self.bandwidth:g} MB/s"
        yield f"store {seconds['store']:,.1f} s = {moved} {each}: bandwidth as given or assumed"
        if any(self.requests.values()):
            each_kind = (f"{self.requests[kind]:,} {kind} / {limits[kind]:,} a second" for kind in ("reads", "writes"))
            yield f"requests {seconds['requests']:,.1f} s, the longer of {' and '.join(each_kind)}: {limits['where']}"
        rounded = f"{self.waves} / {self.units / self.devices.workers:.4g} (units a process, rounded up)"
        yield f"total {self.total:,.1f} s = start + {self.pace}, the longest, x {rounded}"

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


# --- for people -------------------------------------------------------------------------------------------


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What `forecast` found, for a terminal."""
    for part in found["splits"]:
        rows = f"{'' if part['counted'] else 'about '}{part['rows']:,} rows"
        aside = f" (about {part['set_aside']:,} set aside)" if part["set_aside"] else ""
        tokens = f"{part['tokens']:,} tokens (within {part['tokens_within']:.1%})"
        yield f"{part['split']:<11}{rows}{aside} in {part['units']:,} units, {size(part['source_bytes'])}, {tokens}"
        yield f"{'':<11}by {part['sampled_rows']:,} rows: {part['sample']}"
    yield f"{'lengths':<11}{_spoken_lengths(found['lengths'])}"
    yield f"{'store':<11}{size(found['stored_bytes'])}; requests: {_spoken_requests(found['requests'])}"
    rate = found["rate"]
    speed = f"{found['workers']:,} x {rate['tokens_per_second']:,} tokens/s"
    yield f"{'devices':<11}{found['count']:,} {found['devices']}, {speed}"
    yield f"{'rate':<11}{_KIND_WORDS[rate['kind']]}: {rate['how']}"
    yield f"{'time':<11}{_spoken_time(found['seconds']['total'])}"
    if found["cost"] is not None:
        yield f"{'cost':<11}{found['cost']:,.2f} = {found['price']:g} x {found['count']:,} x {found['hours']:.4g} hours"
    neck = found["bottleneck"]
    yield f"{'bottleneck':<11}{neck['name']}: {neck['why']}. Then: {neck['do']}."
    for number, line in enumerate(found["how"]):
        yield f"{'' if number else 'how':<11}{line}"


_KIND_WORDS = {
    "measured": "measured by bertray, on another machine",
    "measured here": "measured here and now",
    "published": "PUBLISHED by others of their own software, not measured with bertray",
    "estimate": "an ESTIMATE, not measured on such devices (--measure on one does)",
}


def _spoken_lengths(found: Mapping[str, Any]) -> str:
    line = (
        f"mean {found['mean']:g} tokens, half up to {found['p50']}, 95 % up to {found['p95']}, longest {found['max']}; "
    )
    limit = f"encoder.max_length ({found['max_length']})"
    if not found["over"]:
        return f"{line}none over {limit}"
    kept = found["tokens_kept"]
    effect = f"{1 - kept:.1%} of all tokens lost" if kept < 1 else f"{kept - 1:.1%} more tokens for it"
    return f"{line}{found['over']:.1%} over {limit} and {_FATES[found['truncation']]}: {effect}"


def _spoken_requests(found: Mapping[str, int]) -> str:
    if not any(found.values()):
        return "none, all is on file systems"
    return f"about {found['reads']:,} reads and {found['writes']:,} writes of object stores"


def _spoken_time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:,.0f} seconds"
    return f"{seconds / 3600:,.1f} hours" if seconds >= 36_000 else f"{seconds / 60:,.0f} minutes"


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
