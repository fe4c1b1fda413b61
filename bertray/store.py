"""The vector store: one Parquet shard a unit, and a manifest that is written last.

A manifest's presence means that the store is complete. Knows nothing of how vectors are made.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bertray.errors import StoreError
from bertray.storage import Location

_RECEIPT = b"bertray.receipt"


@dataclass(frozen=True)
class Receipt:
    """What became of one unit, and what ran the encoder's layers."""

    unit: str
    rows: int
    rejected: int
    empty: int
    truncated: int
    tokens: int
    seconds: float
    labels: dict[str, int] = field(default_factory=dict)
    backend: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a complete store holds: what made it, and a receipt for each unit in the order of the rows."""

    fingerprint: str
    made_by: dict[str, Any]
    units: tuple[Receipt, ...]

    def total(self, name: str) -> int:
        """The sum of a count over all units."""
        return int(sum(getattr(unit, name) for unit in self.units))

    @property
    def counts(self) -> dict[str, int]:
        """What became of all rows, for summaries."""
        return {name: self.total(name) for name in ("rows", "rejected", "empty", "truncated", "tokens")}

    @property
    def labels(self) -> dict[str, int]:
        """How many rows have each label."""
        counts: dict[str, int] = {}
        for unit in self.units:
            for label, count in unit.labels.items():
                counts[label] = counts.get(label, 0) + count
        return counts


@dataclass(frozen=True)
class Store:
    """A folder of shards:

    manifest.json
    shards/UNIT.parquet   id, text, text_pair (for pairs), label, vector (fixed size list of float16 or float32);
                          predictions have label, score and probabilities in place of label and vector
    rejects/UNIT.jsonl    id, reason, preview of rows set aside, where there are any
    """

    url: str

    @property
    def location(self) -> Location:
        return Location(self.url)

    def shard(self, unit: str) -> Location:
        return self.location / "shards" / f"{unit}.parquet"

    def write_shard(self, receipt: Receipt, table: pa.Table, rejects: pa.Table) -> None:
        """Write what a unit gave: rejects first, then the shard, whose presence means that the unit is done."""
        if rejects.num_rows:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rejects.to_pylist()]
            (self.location / "rejects" / f"{receipt.unit}.jsonl").write("".join(lines).encode())
        table = table.replace_schema_metadata({_RECEIPT: json.dumps(asdict(receipt)).encode()})
        sink = pa.BufferOutputStream()
        texts = [name for name in table.column_names if name != "vector"]
        codecs = dict.fromkeys(texts, "zstd") | {"vector.list.element": "none"}  # vectors do not compress
        pq.write_table(table, sink, compression=codecs, use_dictionary=["label"], write_statistics=False)
        self.shard(receipt.unit).write(sink.getvalue())

    def done(self, units: Sequence[str]) -> dict[str, Receipt]:
        """The receipts of those units whose shards are there."""
        present = {file.name.removesuffix(".parquet") for file in (self.location / "shards").files()}
        with ThreadPoolExecutor(8) as pool:
            receipts = pool.map(self._receipt, [unit for unit in units if unit in present])
        return {receipt.unit: receipt for receipt in receipts if receipt}

    def _receipt(self, unit: str) -> Receipt | None:
        try:
            metadata = pq.read_metadata(self.shard(unit).open_random()).metadata
            return Receipt(**json.loads(metadata[_RECEIPT]))
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError):
            return None  # not whole: as good as missing

    @property
    def _manifest(self) -> Location:
        return self.location / "manifest.json"

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest. Shards of other units (of a file that is gone, of another limit) are left: they may be
        asked for again, and the manifest tells which ones count."""
        self._manifest.write(json.dumps(asdict(manifest), indent=1).encode())

    def prune(self, manifest: Manifest) -> None:
        """Remove the shards and rejects that a manifest does not count, for who reads the folder without it."""
        units = {receipt.unit for receipt in manifest.units}
        for folder in ("shards", "rejects"):
            for file in (self.location / folder).files():
                if file.name.rpartition(".")[0] not in units:
                    (self.location / folder / file.name).delete()

    def manifest(self) -> Manifest | None:
        """The manifest, or None while the store is not complete."""
        if not self._manifest.exists():
            return None
        try:
            saved = json.loads(self._manifest.read())
            return Manifest(saved["fingerprint"], saved["made_by"], tuple(Receipt(**unit) for unit in saved["units"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self._manifest} is damaged ({error}). Delete the file: the next run makes it again from the shards."
            ) from None

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The shards in the order of the rows, as tables of those columns."""
        for receipt in self.complete().units:
            shard = self.shard(receipt.unit)
            try:
                table = pq.read_table(shard.open_random(), columns=list(columns))
            except (pa.ArrowException, OSError) as error:
                raise StoreError(
                    f"{shard} is missing or damaged ({error}). Delete {self._manifest} and the shard: "
                    "the next run encodes its rows again."
                ) from None
            if table.num_rows != receipt.rows:
                raise StoreError(
                    f"{shard} has {table.num_rows} rows, not {receipt.rows}. Delete {self._manifest} "
                    "and the shard: the next run encodes its rows again."
                )
            yield table

    def load(self) -> tuple[NDArray[Any], list[str]]:
        """All vectors [n, width] in the type they are stored in, and all labels [n]."""
        parts = list(self.tables(["vector", "label"]))
        return (
            np.concatenate([vectors_of(part) for part in parts]),
            [label for part in parts for label in part["label"].to_pylist()],
        )

    def complete(self) -> Manifest:
        """The manifest of a store that has to be complete."""
        manifest = self.manifest()
        if manifest is None:
            raise StoreError(f"{self.url} is not complete. Run `bertray embed` with its spec first.")
        return manifest


def with_vectors(rows: pa.Table, vectors: NDArray[Any]) -> pa.Table:
    """Rows with their vectors [rows, width] as a column."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    return rows.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))


def vectors_of(table: pa.Table) -> NDArray[Any]:
    """[rows, width] of a table's column `vector`."""
    column = table["vector"].combine_chunks()
    width = column.type.list_size
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)
