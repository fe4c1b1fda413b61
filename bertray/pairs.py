"""Pairs whose texts are encoded by themselves: each distinct text of all splits once.

The pairs of a split go into a store without vectors, which tells for each text the row of another store, that of the
distinct texts. Knows nothing of how texts are encoded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from bertray import labels
from bertray.annotations import Ints
from bertray.checkpoints import Checkpoint
from bertray.features import related
from bertray.sources import Batch, Columns, Reader, Unit, empty, set_aside, stage, units
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import Source, fingerprint
from bertray.splits import Rejects, Split, check_any, made_by, plan_of
from bertray.storage import Location
from bertray.store import Manifest, Receipt, Store

_REJECTS = pa.schema([(name, pa.string()) for name in ("id", "reason", "preview")])


@dataclass(frozen=True)
class Pairs:
    """splits: as they were, with stores of pairs; manifests: of those; texts: the split of all distinct texts, still to
    be encoded."""

    splits: list[Split]
    texts: Split
    manifests: dict[str, Manifest]


def apart(
    splits: Sequence[Split],
    spec: EncoderSpec,
    checkpoint: Checkpoint,
    folder: Location,
    label_names: tuple[str, ...] = (),
    max_rejects: float = 1.0,
) -> Pairs:
    """Write the stores of pairs of all splits, and the distinct texts as files, unless that is done.

    Args:
        folder: of the run.
        label_names: what labels have to be; empty takes any.
        max_rejects: as `embed` has it.
    """
    keys = fingerprint([[split.name, *(unit.key for unit in split.units)] for split in splits])
    numbered = [_numbered(split, keys, folder) for split in splits]
    place = folder / "rows" / f"texts-{keys}"
    found = {split.name: split.store.manifest() for split in numbered}
    if all(found.values()) and place.files():
        manifests = {name: manifest for name, manifest in found.items() if manifest}
        return Pairs(numbered, _texts(place, spec, checkpoint, folder), manifests)
    numbers: dict[str, int] = {}
    for split in numbered:
        split.store.write_plan(plan_of(split, spec, checkpoint, label_names))
    manifests = {split.name: _write(split, numbers, label_names, max_rejects) for split in numbered}
    stage(pa.table({"text": pa.array(numbers, pa.string())}), Columns("text"), place)
    for split in numbered:
        split.store.finish(manifests[split.name])
    return Pairs(numbered, _texts(place, spec, checkpoint, folder), manifests)


def settled(pairs: Pairs, texts: Manifest, max_rejects: float = 1.0) -> Pairs:
    """The pairs once their texts are encoded: those with a text that could not be are set aside, and the others count
    the rows of the texts that are left.

    Args:
        texts: of the store of the texts, which is complete.
    """
    failed: dict[int, str] = {}
    begun = 0
    for unit, receipt in zip(pairs.texts.units, texts.units, strict=True):
        for reject in pairs.texts.store.rejects(receipt.unit) if receipt.rejected else ():
            failed[begun + int(reject["id"].rpartition(":")[2]) - unit.start] = reject["reason"]
        begun += unit.rows
    if not failed:
        return pairs
    kept = np.setdiff1d(np.arange(begun), list(failed))
    splits, manifests = [], {}
    for split in pairs.splits:
        made = {**split.made_by, "without": fingerprint(sorted(failed))}
        folder = split.store.location.url.rpartition("/")[0]
        other = replace(split, store=Store(f"{folder}/{split.name}-{fingerprint(made)}"), made_by=made)
        manifest = other.store.manifest()
        if not manifest:
            manifest = _without(split, other, pairs.manifests[split.name], failed, kept, max_rejects)
        splits.append(other)
        manifests[split.name] = manifest
    return replace(pairs, splits=splits, manifests=manifests)


def _without(
    split: Split, other: Split, manifest: Manifest, failed: Mapping[int, str], kept: Ints, max_rejects: float
) -> Manifest:
    """Write a split's pairs without those that failed into another store."""
    rejects, receipts = Rejects(other, max_rejects), []
    for receipt in manifest.units:
        rows = split.store.check(receipt)
        before = pa.Table.from_pylist(split.store.rejects(receipt.unit), _REJECTS)
        wrong = _wrong(rows["first"].to_pylist(), rows["second"].to_pylist(), failed)
        batch = set_aside(Batch(rows, before), wrong)
        rows = batch.rows
        for name in ("first", "second"):
            places = pa.array(np.searchsorted(kept, rows[name].to_numpy()), pa.int64())
            rows = rows.set_column(rows.column_names.index(name), name, places)
        receipts.append(_written(other, receipt.unit, Batch(rows, batch.rejects)))
        rejects.add(receipts[-1])
    found = Manifest(fingerprint(other.made_by), other.made_by, tuple(receipts))
    check_any(other, found)
    other.store.finish(found)
    return found


def _numbered(split: Split, keys: str, folder: Location) -> Split:
    """A split of pairs with a store of its own: its numbers hold for these splits only."""
    made = {"texts": keys, "columns": asdict(split.columns), "source": split.made_by["source"], "features": []}
    return replace(split, store=Store((folder / "stores" / f"{split.name}-{fingerprint(made)}").url), made_by=made)


def _texts(place: Location, spec: EncoderSpec, checkpoint: Checkpoint, folder: Location) -> Split:
    columns = Columns("text")
    made = made_by(spec, checkpoint, columns, {"texts": place.url.rpartition("/")[2]})
    store = Store((folder / "stores" / f"texts-{fingerprint(made)}").url)
    return Split("texts", tuple(units(Source(path=place.url, format="parquet"), columns)), columns, store, made)


def _write(split: Split, numbers: dict[str, int], label_names: tuple[str, ...], max_rejects: float) -> Manifest:
    """Write the pairs of a split, and note new texts in `numbers`."""
    reader = Reader(split.columns)
    rejects, receipts = Rejects(split, max_rejects), []
    for unit in split.units:
        receipts.append(_write_unit(split, unit, reader, numbers, label_names))
        rejects.add(receipts[-1])
    found = Manifest(fingerprint(split.made_by), split.made_by, tuple(receipts))
    check_any(split, found)
    return found


def _write_unit(
    split: Split, unit: Unit, reader: Reader, numbers: dict[str, int], label_names: tuple[str, ...]
) -> Receipt:
    batch = reader.read(unit)
    rows = batch.rows
    for role, name in (("text", "first"), ("text_pair", "second")):
        rows = rows.append_column(name, pa.array(_numbered_texts(rows[role].to_pylist(), numbers), pa.int64()))
    if label_names and split.columns.label:
        labels.check(labels.counts(split.columns.form, rows["label"]), label_names, unit.url)
    return _written(split, unit.key, Batch(rows, batch.rejects))


def _written(split: Split, unit: str, batch: Batch) -> Receipt:
    rows, rejects = batch.rows, batch.rejects
    counts = labels.counts(split.columns.form, rows["label"]) if split.columns.label else {}
    receipt = Receipt(unit, rows.num_rows, rejects.num_rows, empty(rows["text"]), 0, 0, 0.0, counts)
    return split.store.write_shard(receipt, rows, rejects)


def encode(encoder: Any, texts: Sequence[str], pairs: Sequence[str]) -> tuple[Any, dict[int, str]]:
    """What a head sees of pairs whose texts are encoded apart, and for each pair that failed the reason.

    Args:
        encoder: each distinct text goes through it once.

    Returns:
        As `Encoder.encode_rows`, with vectors [n, 4 * width].
    """
    numbers: dict[str, int] = {}
    first, second = (_numbered_texts(each, numbers) for each in (texts, pairs))
    found, wrong = encoder.encode_rows(list(numbers))
    u, v = (found.take(np.array(each, np.int64)) for each in (first, second))
    return replace(
        u,
        vectors=related(u.vectors.astype(np.float32), v.vectors.astype(np.float32)),
        tokens=u.tokens + v.tokens,
        truncated=u.truncated | v.truncated,
        windows=np.maximum(u.windows, v.windows),
    ), _wrong(first, second, wrong)


def _numbered_texts(texts: Sequence[str], numbers: dict[str, int]) -> list[int]:
    """The number of each text; new ones are noted."""
    return [numbers.setdefault(text, len(numbers)) for text in texts]


def _wrong(first: Sequence[int], second: Sequence[int], failed: Mapping[int, str]) -> dict[int, str]:
    """Why pairs cannot be used, of those of whose texts one cannot: {row: reason}."""
    rows = enumerate(zip(first, second, strict=True))
    return {row: failed.get(u) or failed[v] for row, (u, v) in rows if u in failed or v in failed}
