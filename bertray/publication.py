"""Publication: a run's rows and vectors, put where others search them. Knows nothing of how a table is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bertray import bundle as bundles
from bertray import sinks
from bertray.cluster import connected
from bertray.errors import BertrayError, BundleError, StoreError
from bertray.lease import held
from bertray.sources import Columns
from bertray.spec import RaySizes, fingerprint
from bertray.splits import planned
from bertray.storage import Location
from bertray.store import Manifest, Store


@dataclass(frozen=True)
class _Part:
    """A split of a run, as its store holds it."""

    store: Store
    plan: Mapping[str, Any]

    @property
    def split(self) -> str:
        return str(self.plan["split"])

    @property
    def folder(self) -> str:
        return self.store.url.rpartition("/")[2]

    @property
    def features(self) -> list[str]:
        return list(self.plan["made_by"]["features"])


def publish(
    run: str, destination: str, features: Sequence[str] = (), splits: Sequence[str] = (), name: str = ""
) -> dict[str, Any]:
    """Write a run's rows and vectors into a table of Lance, on Ray: columns run, split, id, text (text_pair), label and
    one a feature, of lists as long as its vectors, to the bit as they are stored. What the table held of that run (of
    those splits, if some are given) is replaced; all other rows stay.

    Args:
        run: folder of a run whose rows are all encoded.
        destination: folder or URL that ends in .lance; DB/TABLE.lance is the table TABLE of the LanceDB database DB.
        features: columns such as mean_6; all, if left out.
        splits: such as train, or the name of a store; if left out, all but the examples, and of pairs whose texts were
            encoded apart, the texts.
        name: what the run is called in the table; if left out, as its folder.

    Returns:
        output, run, features; splits: the rows of each; rows: of all those; table_rows, version: of the table.

    Raises:
        BertrayError: with what is wrong, where, and what to do.
    """
    sinks.check_installed()
    place, target = Location(run), Location(destination.rstrip("/"))
    if not target.url.endswith(".lance"):
        raise BertrayError(f"{destination} must end in .lance: DB/TABLE.lance is a table of a LanceDB database.")
    parts = _parts(place, splits)
    manifests = {part.split: _manifest(place, part) for part in parts}
    schema = _schema(place, parts, manifests, features)
    name = name or place.url.rstrip("/").rpartition("/")[2]
    shards = [
        sinks.Shard(part.split, part.store, receipt)
        for part in parts
        for receipt in manifests[part.split].units
        if receipt.rows
    ]
    with held(target):
        sinks.prepare(target, schema)
        with connected(RaySizes(), alone=True):
            fragments = sinks.write(target, name, schema, shards)
        table = sinks.commit(target, name, list(manifests) if splits else [], fragments)
    rows = {split: manifest.total("rows") for split, manifest in manifests.items()}
    return {
        "output": target.url,
        "run": name,
        "features": [field.name for field in schema if field.metadata],
        "splits": rows,
        "rows": sum(rows.values()),
        "table_rows": table.count_rows(),
        "version": table.version,
    }


def _parts(place: Location, splits: Sequence[str]) -> list[_Part]:
    """What is to be published: those splits, or all that have vectors."""
    stores = [Store((place / "stores" / name).url) for name in (place / "stores").folders()]
    found = [_Part(store, plan) for store in stores if (plan := store.plan())]
    if not found:
        raise BertrayError(f"{place} is not the folder of a run: nothing has been embedded there.")
    named = splits or [part.split for part in found if part.features and part.split != "examples"]
    if not named:
        raise StoreError(f"{place} is not complete: its texts are not encoded yet. Run its spec first.")
    parts = [_part(place, found, name) for name in dict.fromkeys(named)]
    if len({part.split for part in parts}) < len(parts):
        raise BertrayError(f"{', '.join(named)} are stores of one split. Give one of each.")
    return parts


def _part(place: Location, found: Sequence[_Part], name: str) -> _Part:
    same = [part for part in found if name in (part.split, part.folder)]
    if not same:
        known = ", ".join(dict.fromkeys(part.split for part in found))
        raise BertrayError(f"{place} has no split {name!r}. It has {known}.")
    if len(same) > 1:
        same = _fitting(place, same)
    if len(same) > 1:
        folders = ", ".join(part.folder for part in same)
        raise BertrayError(f"{place} holds {name} in several ways. Give one of {folders} as the split.")
    (part,) = same
    if not part.features:
        raise BertrayError(f"{part.folder} holds pairs, whose texts have vectors of their own: give the split texts.")
    if Columns(**part.plan["columns"]).part != "text":
        raise BertrayError(f"{part.folder} has vectors of words. Only those of whole texts or pairs can be published.")
    return part


def _fitting(place: Location, parts: list[_Part]) -> list[_Part]:
    """Of stores of one split by several encoders, those of the one that the run's head was fitted on."""
    try:
        encoder = _told(bundles.load((place / "head").url).encoder)
    except BundleError:
        return parts
    fitting = [part for part in parts if _told({**part.plan["encoder"], "identity": part.plan["identity"]}) == encoder]
    return fitting or parts


def _told(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder without its revision, which a bundle tells more exactly than a spec: its identity says what it is."""
    return {name: value for name, value in encoder.items() if name != "revision"}


def _manifest(place: Location, part: _Part) -> Manifest:
    manifest = part.store.manifest()
    if manifest is None or not manifest.holds([unit.key for unit in planned(part.plan)]):
        raise StoreError(
            f"{part.split} of {place} is not complete. Run its spec first; `bertray status` shows how far it is."
        )
    return manifest


def _schema(
    place: Location, parts: Sequence[_Part], manifests: Mapping[str, Manifest], features: Sequence[str]
) -> pa.Schema:
    """The columns of the table, which all parts have."""
    schemas = []
    for part in parts:
        if missing := [feature for feature in features if feature not in part.features]:
            known = ", ".join(part.features)
            raise BertrayError(f"{part.split} of {place} has no feature {missing[0]}. It has {known}.")
        stored = _stored(part.store, manifests[part.split])
        made_by = sinks.made_by(fingerprint(part.plan["identity"]), part.plan["encoder"]["model"])
        names = [name for name in ("id", "text", "text_pair", "label") if name in stored.names]
        own = [pa.field(name, pa.string()) for name in sinks.OWN]
        vectors = [stored.field(name).with_metadata(made_by) for name in dict.fromkeys(features or part.features)]
        schemas.append(pa.schema([*own, *(stored.field(name).remove_metadata() for name in names), *vectors]))
        if other := sinks.difference(schemas[0], schemas[-1]):
            raise BertrayError(f"The splits of {place} differ in {other}: publish them into a table each (--splits).")
    return schemas[0]


def _stored(store: Store, manifest: Manifest) -> pa.Schema:
    """The columns of a store's shards."""
    shard = store.shard(next(receipt.unit for receipt in manifest.units if receipt.rows))
    try:
        return shard.patiently(lambda: pq.read_schema(shard.open_random()))
    except (pa.ArrowException, OSError) as error:
        raise sinks.damaged(shard, error) from None
