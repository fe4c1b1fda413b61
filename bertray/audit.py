"""What a run's folder holds: how far it is, and whether every shard is whole. Repairs by encoding again what is not."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from bertray import checkpoints
from bertray.clock import account
from bertray.cluster import connected
from bertray.embed import embed
from bertray.errors import BertrayError, StoreError
from bertray.journal import entries
from bertray.lease import held, holder
from bertray.progress import Progress
from bertray.sources import Columns, Unit, looked_at_again
from bertray.spec import RaySizes, encoder_of
from bertray.splits import Split, planned
from bertray.storage import Location
from bertray.store import STARTING, Manifest, Receipt, Store

_RECENT = 600.0  # seconds before the last shard that tell the speed
_THREADS = 4


@dataclass(frozen=True)
class _Planned:
    """A store with its plan."""

    name: str
    store: Store
    plan: Mapping[str, Any]
    units: tuple[Unit, ...]

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)


def status(folder: str) -> dict[str, Any]:
    """How far a run is, read from its folder; nothing is started or changed.

    Returns:
        output; running: who is at work there, or None; stores: for each what is done, missing and set aside, rows a
        second over the last ten minutes of work, seconds left at that speed, and the units at work, with the process,
        its host and since when (of a process that starts there is no file); spent: where the time of the devices went
        and what it cost, as far as shards tell; last: the last line of the run's log, or None; head and report: whether
        they are there.

    Raises:
        BertrayError: it is not a run's folder.
    """
    place = Location(folder)
    running = holder(place)
    found = [(each, *_receipts(each)) for each in _stores(place)]
    log = list(entries(place))
    price = next((line["price"] for line in reversed(log) if "price" in line), 0.0)
    return {
        "output": place.url,
        "running": asdict(running) if running else None,
        "stores": [_status(*each) for each in found],
        "spent": account((receipt.spent for _, receipts, _ in found for receipt in receipts.values()), price),
        "last": log[-1] if log else None,
        "head": (place / "head" / "bundle.json").exists(),
        "report": (place / "report.html").exists(),
    }


def _receipts(each: _Planned) -> tuple[dict[str, Receipt], bool]:
    """The receipts of the units that are done, and whether the store is complete."""
    manifest = each.store.manifest()
    keys = [unit.key for unit in each.units]
    complete = manifest is not None and manifest.holds(keys)
    return {r.unit: r for r in manifest.units} if manifest and complete else each.store.done(keys), complete


def _status(each: _Planned, receipts: Mapping[str, Receipt], complete: bool) -> dict[str, Any]:
    done = sum(unit.rows for unit in each.units if unit.key in receipts)
    rate = _rate(each.store, receipts)
    return {
        "name": each.name,
        "split": each.plan["split"],
        "complete": complete,
        "units": len(each.units),
        "units_done": len(receipts),
        "rows": each.rows,
        "rows_done": done,
        "rows_missing": each.rows - done,
        "rejected": sum(receipt.rejected for receipt in receipts.values()),
        "units_begun_again": sum(receipt.lost for receipt in receipts.values()),
        "rows_per_second": round(rate, 1),
        "seconds_left": round((each.rows - done) / rate, 1) if rate else None,
        "at_work": [] if complete else list(_at_work(each, receipts)),
    }


def _rate(store: Store, receipts: Mapping[str, Receipt]) -> float:
    """Rows a second from when shards were written; of a single one, from how long it took."""
    written = {file.name.removesuffix(".parquet"): file.changed for file in (store.location / "shards").files()}
    times = sorted((written[unit], unit) for unit in receipts if unit in written)
    recent = [(at, unit) for at, unit in times if at >= times[-1][0] - _RECENT]
    if len(recent) > 1 and recent[-1][0] > recent[0][0]:
        return sum(receipts[unit].rows for _, unit in recent[1:]) / (recent[-1][0] - recent[0][0])
    seconds = sum(receipt.seconds for receipt in receipts.values())
    return sum(receipt.rows for receipt in receipts.values()) / seconds if seconds else 0.0


def _at_work(each: _Planned, receipts: Mapping[str, Receipt]) -> Iterator[dict[str, Any]]:
    units = {unit.key: unit for unit in each.units}
    for file in each.store.attempts():
        key = file.name.removesuffix(".json")
        starts = key.startswith(STARTING)
        if key in receipts or not (starts or key in units) or not (attempt := each.store.attempt(key)):
            continue
        since = datetime.fromtimestamp(attempt.since, UTC)
        unit = None if starts else units[key]
        yield {
            "file": unit.name if unit else None,
            "start": unit.start if unit else None,
            "stop": unit.stop if unit else None,
            "host": attempt.host,
            "pid": attempt.pid,
            "since": since.isoformat(timespec="seconds"),
            "seconds": round(time.time() - attempt.since, 1),
            "run": attempt.run,
        }


def verify(folder: str, repair: bool = False) -> dict[str, Any]:
    """Read every shard of a run and hold it against its checksum, its receipt, the manifest and the plan: rows counted,
    vectors finite, ids unique, nothing missing.

    Args:
        repair: encode again what is missing or damaged, then check once more.

    Returns:
        output; stores: for each its shards, rows and problems, a line each, and notes; ok.

    Raises:
        BertrayError: it is not a run's folder, or another run is at work there, or the repair cannot be done.
    """
    place = Location(folder)
    checked = [(each, *_verify(each)) for each in _stores(place)]
    if repair and any(broken or not complete for _, broken, complete, _ in checked):
        with held(place) as mine:
            _repair([(each, broken) for each, broken, complete, _ in checked if broken or not complete], mine.run)
        checked = [(each, *_verify(each)) for each in _stores(place)]
    stores = [
        {
            "name": each.name,
            "shards": len(each.units),
            "rows": each.rows,
            "problems": [f"{unit}: {problem}" for unit, problem in broken.items()]
            + ([] if complete else ["its manifest is missing or of other shards: it is not complete"]),
            "notes": notes,
        }
        for each, broken, complete, notes in checked
    ]
    return {"output": place.url, "stores": stores, "ok": not any(store["problems"] for store in stores)}


def _verify(each: _Planned) -> tuple[dict[str, str], bool, list[str]]:
    """What is wrong with each unit, whether the manifest is whole, and what is worth knowing."""
    try:
        manifest = each.store.manifest()
    except StoreError:
        manifest = None
    keys = [unit.key for unit in each.units]
    complete = manifest is not None and manifest.holds(keys)
    receipts = {receipt.unit: receipt for receipt in manifest.units} if manifest and complete else {}
    broken: dict[str, str] = {}
    hashes: list[np.ndarray[Any, Any]] = []

    def check(unit: Unit) -> tuple[str, str, pa.ChunkedArray | None]:
        try:
            return unit.key, "", _check(each.store, unit, receipts.get(unit.key))["id"]
        except StoreError as error:
            return unit.key, str(error), None

    with Progress(f"checking {each.name}", len(keys), "shards") as progress, ThreadPoolExecutor(_THREADS) as pool:
        for key, problem, ids in pool.map(check, each.units):
            if problem:
                broken[key] = problem
            else:
                hashes.append(np.fromiter(map(hash, ids.to_pylist()), np.int64))  # type: ignore[union-attr]
            progress.add(1)
    return broken, complete, _repeated(each, hashes, broken)


def _check(store: Store, unit: Unit, receipt: Receipt | None) -> pa.Table:
    if receipt is None and (receipt := store.receipt(unit.key)) is None:
        raise StoreError("its shard is missing" if not store.shard(unit.key).exists() else "its shard is damaged")
    if receipt.rows + receipt.rejected != unit.rows:
        raise StoreError(
            f"its {receipt.rows} rows and {receipt.rejected} set aside are not the {unit.rows} of its file"
        )
    return store.check(receipt)


def _repeated(each: _Planned, hashes: Sequence["np.ndarray[Any, Any]"], broken: Mapping[str, str]) -> list[str]:
    """Ids that occur more than once. Those that bertray makes cannot; those of the source may."""
    found, counts = np.unique(np.concatenate(hashes), return_counts=True) if hashes else (np.array([]), np.array([]))
    doubtful = set(found[counts > 1].tolist())
    if not doubtful:
        return []
    seen: dict[str, int] = {}
    for unit in each.units:
        if unit.key not in broken and (receipt := each.store.receipt(unit.key)):
            for one in each.store.check(receipt)["id"].to_pylist():
                if hash(one) in doubtful:
                    seen[one] = seen.get(one, 0) + 1
    repeated = {one: count for one, count in seen.items() if count > 1}
    if not repeated:
        return []
    one, count = next(iter(repeated.items()))
    return [f"{len(repeated)} ids of the source occur more than once, such as {one!r} ({count} times)"]


def _repair(broken: Sequence[tuple[_Planned, Mapping[str, str]]], run: str) -> None:
    """Encode again what is missing or damaged."""
    for each, units in broken:
        if "bundle" in each.plan["made_by"]:
            raise BertrayError(
                f"{each.store.url} holds predictions: delete its manifest.json and what is damaged, and run the same "
                "`bertray predict` again."
            )
        for unit in units:
            each.store.forget(unit)
        if not each.plan["made_by"]["features"]:
            raise BertrayError(f"{each.store.url} holds pairs without vectors: run the spec again, which writes them.")
    with connected(RaySizes(), alone=True):
        for each, _ in broken:
            _encode_again(each, run)


def _encode_again(each: _Planned, run: str) -> Manifest:
    plan = each.plan
    encoder = encoder_of(plan["encoder"])
    checkpoint = checkpoints.find(encoder.model, encoder.revision)
    if checkpoint.identity != plan["identity"]:
        raise BertrayError(
            f"{encoder.model} in {checkpoint.folder} is not what {each.store.url} was made with. Get it as it was, or "
            "run the spec again."
        )
    split = Split(plan["split"], looked_at_again(each.units), Columns(**plan["columns"]), each.store, plan["made_by"])
    return embed([split], encoder, checkpoint, RaySizes(), tuple(plan["labels"]), run=run)[split.name]


def _stores(folder: Location) -> list[_Planned]:
    """The stores of a run that have been begun, or of a folder of predictions."""
    stores = [Store((folder / "stores" / name).url) for name in (folder / "stores").folders()] or [Store(folder.url)]
    found = [(store, plan) for store in stores if (plan := store.plan())]
    if not found:
        raise BertrayError(f"{folder} is not the folder of a run: nothing has been embedded there.")
    return [_Planned(store.url.rstrip("/").rpartition("/")[2], store, plan, planned(plan)) for store, plan in found]
