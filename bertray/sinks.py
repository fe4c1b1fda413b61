"""Sinks: tables of Lance, which is also what LanceDB keeps its tables as, written by all nodes and changed at once.

Workers write files that no reader sees yet. Then one process makes all of them part of the table, and takes out what it
held of the run before, in one commit: readers find the run as it was or as it is, a call that is killed has changed
nothing, and the same call again gives every row once. Upserts by id, each with a commit of its own, would show half a
run meanwhile, and two at once put the same new ids in twice. Knows nothing of how vectors are made.
"""

import json
import logging
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from bertray import solo
from bertray.cluster import check_reach
from bertray.errors import ERRORS, BertrayError, ClusterError, StoreError
from bertray.progress import log
from bertray.storage import Location
from bertray.store import Receipt, Store

OWN = ("run", "split")  # columns that tell where a row is from
_ENCODER, _MODEL = b"bertray.encoder", b"bertray.model"  # of a column of vectors: what it was made by
_FILE_ROWS = 1_000_000  # about as many go into one file
_TASKS_A_CPU = 4
_TRIES = 5  # to commit, while others change the same rows of the table
_THREADS = 16  # that wait for storage at once
_PLACE = re.compile(r", /\S+\.rs:\d+:\d+")  # in Lance's own code


class Shard(NamedTuple):
    """A unit of a split, in its store."""

    split: str
    store: Store
    receipt: Receipt


def check_installed() -> None:
    """Raise a BertrayError unless Lance is installed here."""
    _lance()


def made_by(encoder: str, model: str) -> dict[bytes, bytes]:
    """What a column of vectors remembers: a fingerprint of what its encoder is, and by what name that was found."""
    return {_ENCODER: encoder.encode(), _MODEL: model.encode()}


def difference(one: pa.Schema, other: pa.Schema) -> str:
    """The columns that only one of two tables has, or that differ in type; empty if there are none."""
    types = [{field.name: field.type for field in schema} for schema in (one, other)]
    return ", ".join(name for name in {**types[0], **types[1]} if types[0].get(name) != types[1].get(name))


def prepare(target: Location, schema: pa.Schema) -> None:
    """Make a table, empty, unless it is there and takes such rows.

    Raises:
        StoreError: it cannot be made or opened, or holds other columns or the vectors of another encoder.
    """
    lance = _lance()
    try:
        there = lance.dataset(target.url, storage_options=_options()).schema
    except (ValueError, OSError) as error:
        if "not found" not in str(error):
            raise StoreError(f"{target} cannot be opened: {_told(error)}") from None
        try:
            lance.write_dataset(schema.empty_table(), target.url, mode="create", storage_options=_options())
        except (ValueError, OSError) as error:
            raise StoreError(f"{target} cannot be written: {_told(error)}") from None
        return
    if other := difference(there, schema):
        raise StoreError(
            f"{target} holds other columns: it differs in {other}. Delete it, or give another destination."
        )
    for field in schema:
        if field.metadata and (there.field(field.name).metadata or {}).get(_ENCODER) != field.metadata[_ENCODER]:
            raise StoreError(
                f"{target} holds vectors of another encoder in {field.name}. Delete it, or give another destination."
            )


def write(target: Location, run: str, schema: pa.Schema, shards: Sequence[Shard]) -> list[Any]:
    """Write shards on the connected Ray cluster, as fragments that are not yet part of the table.

    Raises:
        BertrayError: a shard is damaged, the table cannot be written, or the cluster cannot do it.
    """
    import ray.data
    from ray.data.exceptions import SystemException
    from ray.exceptions import RayError

    check_reach([shards[0].store.shard(shards[0].receipt.unit).url], [target.url])
    cpus, rows = int(ray.cluster_resources().get("CPU", 1)), sum(shard.receipt.rows for shard in shards)
    tasks = min(len(shards), max(_TASKS_A_CPU * cpus, rows // _FILE_ROWS))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    log.info("publishing: %d rows of %d shards, in %d tasks", rows, len(shards), tasks)
    items = [
        {"split": split, "store": store.url, "receipt": json.dumps(asdict(receipt))} for split, store, receipt in shards
    ]
    sink = _sink(target.url, run, schema)
    try:
        with solo.running():
            ray.data.from_items(items, override_num_blocks=tasks).write_datasink(sink)
    except (RayError, SystemException) as error:
        line = " ".join(str(error).split())[:300]
        raise ClusterError(
            f"Publishing has failed: {line} The table is as it was; the same command tries again."
        ) from None
    for part in sink.written:
        if part.error:
            raise ERRORS[part.error](part.line)
    return [fragment for part in sink.written for fragment in part.fragments]


def commit(target: Location, run: str, splits: Sequence[str], fragments: Sequence[Any]) -> Any:
    """Make fragments part of a table, in place of all that it holds of a run, or of those splits of it.

    Returns:
        The table, in its new version.

    Raises:
        StoreError: others change those rows all the time.
    """
    lance = _lance()
    old = f"run = {_quoted(run)}" + (f" AND split IN ({', '.join(map(_quoted, splits))})" if splits else "")
    for _ in range(_TRIES):
        table = lance.dataset(target.url, storage_options=_options())
        before = table.get_fragments()
        with ThreadPoolExecutor(_THREADS) as pool:  # each writes down which of its rows go, for nobody to see yet
            after = list(pool.map(lambda fragment: fragment.delete(old), before))
        both = list(zip(before, after, strict=True))
        change = lance.LanceOperation.Update(
            removed_fragment_ids=[fragment.fragment_id for fragment, left in both if left is None],
            updated_fragments=[left for fragment, left in both if left is not None and left != fragment.metadata],
            new_fragments=list(fragments),
        )
        try:
            return lance.LanceDataset.commit(table, change, read_version=table.version, storage_options=_options())
        except lance.commit.CommitConflictError as error:
            log.info("publishing: %s has been changed meanwhile: %s", target, _told(error))
    raise StoreError(f"{target} is changed by others all the time: nothing is published. The same command tries again.")


# --- on workers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Written:
    """What one task wrote, or the error that ended it, by its kind and line: Ray would wrap that in pages."""

    fragments: Sequence[Any] = ()
    error: str = ""
    line: str = ""


def _sink(url: str, run: str, schema: pa.Schema) -> Any:
    from ray.data import Datasink
    from ray.data.block import BlockAccessor

    class Fragments(Datasink):
        """What a task wrote that was begun again is in nobody's way: only what is committed counts."""

        written: Sequence[_Written] = ()

        def write(self, blocks: Iterable[Any], ctx: Any) -> _Written:
            shards = [row for block in blocks for row in BlockAccessor.for_block(block).to_arrow().to_pylist()]
            try:
                return _Written(_fragments(url, run, schema, shards))
            except BertrayError as error:
                return _Written(error=type(error).__name__, line=str(error))

        def on_write_complete(self, write_result: Any) -> None:
            self.written = write_result.write_returns

    return Fragments()


def _fragments(url: str, run: str, schema: pa.Schema, shards: Sequence[Mapping[str, str]]) -> list[Any]:
    """Write shards into as few files as take them."""
    _lance()
    from lance.fragment import write_fragments

    found: list[StoreError] = []

    def batches() -> Iterator[pa.RecordBatch]:
        for shard in shards:
            try:
                yield from _rows(run, schema, **shard).to_batches()
            except StoreError as error:
                found.append(error)
                raise

    try:
        reader = pa.RecordBatchReader.from_batches(schema, batches())
        return list(write_fragments(reader, url, mode="append", storage_options=_options()))
    except Exception as error:  # Lance raises many kinds
        if found:
            raise found[0] from None
        raise StoreError(f"{url} cannot be written on {platform.node()}: {_told(error)}") from None


def _rows(run: str, schema: pa.Schema, split: str, store: str, receipt: str) -> pa.Table:
    """The rows of a shard that is whole, as the table has them."""
    what = Receipt(**json.loads(receipt))
    try:
        stored = Store(store).check(what)
    except StoreError as error:
        raise damaged(Store(store).shard(what.unit), error) from None
    own = {name: pa.repeat(value, stored.num_rows) for name, value in zip(OWN, (run, split), strict=True)}
    columns = [own[name] if name in own else stored[name] for name in schema.names]
    return pa.Table.from_arrays(columns, schema=schema)


# --- words ------------------------------------------------------------------------------------------------


def damaged(shard: Location, error: Exception) -> StoreError:
    """What to say of a shard that cannot be read."""
    return StoreError(
        f"{shard} cannot be published ({' '.join(str(error).split())[:200]}). `bertray verify --repair` on the run's "
        "folder encodes its rows again."
    )


def _lance() -> Any:
    try:
        import lance
    except ImportError:
        raise BertrayError(f"Lance is not installed on {platform.node()}: pip install 'bertray[lance]'.") from None
    return lance


def _options() -> dict[str, str] | None:
    """What Lance does not find in the environment by itself: that a store of one's own goes without TLS."""
    return {"allow_http": "true"} if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://") else None


def _quoted(text: str) -> str:
    """A text in SQL."""
    return "'" + text.replace("'", "''") + "'"


def _told(error: Exception) -> str:
    return _PLACE.sub("", " ".join(str(error).split()))[:300]
