"""A forecast: what it will take to encode the rows of a spec, told from a sample of them before anything is begun.

Every figure is told with how it was reached. Knows nothing of Ray: processes and threads are counted as the module
cluster does where all nodes are alike.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertray import checkpoints
from bertray.checkpoints import Checkpoint
from bertray.errors import BertrayError
from bertray.features import features
from bertray.lengths import inputs
from bertray.rates import Rate, Shape, check_gpu, rate
from bertray.sources import Columns
from bertray.spec import Spec, load_spec
from bertray.splits import wanted_rows
from bertray.survey import survey
from bertray.workload import Devices, Part, Work, sampled, size

BANDWIDTH = 125.0  # MB/s between a process and the store: an assumption (1 Gbit/s)
_THREADS = 4  # of a process at most, as the module cluster has it
_MEASURE_SECONDS = 6.0
_FIRST_ROWS = 4  # that are encoded to see how many fit the time
_FATES = {"truncate": "cut", "error": "set aside", "window": "encoded in windows"}  # of texts that are too long
_KIND_WORDS = {
    "measured": "measured by bertray, on another machine",
    "measured here": "measured here and now",
    "published": "PUBLISHED by others of their own software, not measured with bertray",
    "estimate": "an ESTIMATE, not measured on such devices (--measure on one does)",
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
        `bottleneck`, `notes`, and `how` the hours were reached, a line a step.

    Raises:
        BertrayError: with what is wrong, where, and what to do.
    """
    _check_numbers(gpus=gpus, cpus=cpus, price=price, bandwidth=bandwidth)
    spec = load_spec(spec, overrides)
    devices = _devices(spec, gpus or 0, gpu, cpus or 0, measure)
    wanted = wanted_rows(spec, {"train": None, "dev": None, "test": None})
    checkpoint = checkpoints.find(spec.encoder.model, spec.encoder.revision, weights=measure)
    parts = [
        sampled(name, survey(name, source, columns, spec.data.unit_rows), columns, spec, checkpoint)
        for name, source, columns, _ in wanted
    ]
    found = _measured(parts[0], spec, checkpoint, devices) if measure else _from_table(parts, spec, checkpoint, devices)
    work = Work(spec, devices, parts, found, bandwidth)
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
        "notes": list(_notes(spec)),
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
        if sizes.workers == "auto":
            threads = min(cpus, wanted or _THREADS)
            return Devices("cpu", cpus, cpus // threads, threads)
        workers = int(sizes.workers)
        threads = wanted or max(1, min(_THREADS, cpus // workers))
        if workers * threads > cpus:
            raise BertrayError(
                f"ray.workers {workers} of {threads} CPUs each are more than {cpus} CPUs. "
                "Lower ray.workers or ray.cpus_per_worker."
            )
        return Devices("cpu", cpus, workers, threads)
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


def _told_lengths(parts: Sequence[Part], spec: Spec) -> dict[str, Any]:
    """Lengths in tokens before any limit, of the texts of all splits, and what the limit does to them."""
    full = np.concatenate([part.lengths.full for part in parts])
    encoded = np.concatenate([part.lengths.encoded for part in parts])
    weights = np.concatenate([np.full(len(part.lengths.full), part.rows / part.lengths.rows) for part in parts])
    limit, order = spec.encoder.max_length, np.argsort(full)
    below = np.cumsum(weights[order]) / weights.sum()  # the share of texts up to each length
    middle, long = (int(full[order][np.searchsorted(below, share)]) for share in (0.5, 0.95))
    return {
        "mean": round(float(np.average(full, weights=weights)), 2),
        "p50": middle,
        "p95": long,
        "max": int(full.max()),
        "max_length": limit,
        "truncation": spec.encoder.truncation,
        "over": round(float(np.average(full > limit, weights=weights)), 5),
        "encoded_mean": round(float(np.average(encoded, weights=weights)), 2),
        "tokens_kept": round(float((encoded * weights).sum() / (full * weights).sum()), 5),
    }


def _notes(spec: Spec) -> Iterator[str]:
    """What the figures do not tell."""
    if spec.encoder.pair == "siamese":
        yield "texts of pairs that occur again are encoded and stored once: this is the most it takes"
    if spec.encoder.states == "encode":
        yield "encoder.states is encode: each pass of fitting the head takes the time of encoding again"


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
    siamese, count, seconds, tokens = spec.encoder.pair == "siamese", _FIRST_ROWS, 0.0, 0
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


# --- for people -------------------------------------------------------------------------------------------


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What `forecast` found, for a terminal."""
    for part in found["splits"]:
        rows = f"{'' if part['counted'] else 'about '}{part['rows']:,} rows"
        aside = f" (about {part['set_aside']:,} set aside)" if part["set_aside"] else ""
        units = f"{part['units']:,} unit{'s' * (part['units'] > 1)}"
        within = f" (within {part['tokens_within']:.1%})" if part["tokens_within"] else ""
        tokens = f"{part['tokens']:,} tokens{within}"
        yield f"{part['split']:<11}{rows}{aside} in {units}, {size(part['source_bytes'])}, {tokens}"
        yield f"{'':<11}by {part['sampled_rows']:,} rows: {part['sample']}"
    yield f"{'lengths':<11}{_spoken_lengths(found['lengths'])}"
    yield f"{'store':<11}{size(found['stored_bytes'])}; requests: {_spoken_requests(found['requests'])}"
    told = found["rate"]
    speed = f"{found['workers']:,} x {told['tokens_per_second']:,} tokens/s"
    yield f"{'devices':<11}{found['count']:,} {found['devices']}, {speed}"
    yield f"{'rate':<11}{_KIND_WORDS[told['kind']]}: {told['how']}"
    idle = f", {found['idle_share']:.1%} of the work idle while the last units end" if found["idle_share"] else ""
    yield f"{'time':<11}{_spoken_time(found['seconds']['total'])}{idle}"
    if found["cost"] is not None:
        yield f"{'cost':<11}{found['cost']:,.2f} = {found['price']:g} x {found['count']:,} x {found['hours']:.4g} hours"
    neck = found["bottleneck"]
    yield f"{'bottleneck':<11}{neck['name']}: {neck['why']}. Then: {neck['do']}."
    for name in ("notes", "how"):
        for number, line in enumerate(found[name]):
            yield f"{'' if number else name:<11}{line}"


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
