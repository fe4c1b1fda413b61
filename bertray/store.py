"""The vector store: one Parquet shard a unit, and a manifest that is written last.

A manifest's presence means that the store is complete. Knows nothing of how vectors are made.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bertray.errors import StoreError
from bertray.storage import FileInfo, Location
from bertray.vectors import column_path, vector_columns, vectors_of

_RECEIPT, _CHECKSUM = b"bertray.receipt", b"bertray.checksum"
STARTING = "start-"  # how attempts are named that are of no unit, but of an encoder process to start
_THREADS = 16  # that wait for storage at once


@dataclass(frozen=True)
class Receipt:
    """What became of one unit.

    tokens: that were encoded; seconds: from when it was read to when it was encoded.
    labels: how many rows have each label; backend: what ran the encoder's layers.
    windowed: rows that were encoded in several windows.
    lost: how often the unit was begun and not finished, since a process ended; retries: of storage, meanwhile.
    spent: where the time of the process went since its last receipt, as in `clock`; empty where that is not known.
    checksum: SHA-256 of the shard.
    """

    unit: str
    rows: int
    rejected: int
    empty: int
    truncated: int
    tokens: int
    seconds: float
    labels: dict[str, int] = field(default_factory=dict)
    backend: str = ""
    windowed: int = 0
    lost: int = 0
    retries: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    checksum: str = ""


@dataclass(frozen=True)
class Attempt:
    """A unit that is being encoded, or was when its process ended.

    run: which run's it is; number: how often that run has begun the unit; lost: how often it was begun in vain in all.
    node: Ray's id of the node; since: seconds since 1970.
    """

    run: str
    number: int = 1
    lost: int = 0
    node: str = ""
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Manifest:
    """What a complete store holds: what made it, and a receipt for each unit in the order of the rows."""

    fingerprint: str
    made_by: dict[str, Any]
    units: tuple[Receipt, ...]

    def total(self, name: str) -> int:
        """The sum of a count over all units."""
        return int(sum(getattr(unit, name) for unit in self.units))

    def holds(self, units: Sequence[str]) -> bool:
        """Whether these are its units, in that order."""
        return [receipt.unit for receipt in self.units] == list(units)

    @property
    def features(self) -> list[str]:
        """The columns that hold vectors."""
        return list(self.made_by["features"])

    @property
    def counts(self) -> dict[str, int]:
        """What became of all rows, for summaries."""
        return {name: self.total(name) for name in ("rows", "rejected", "empty", "truncated", "windowed", "tokens")}

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

    plan.json             what the store is to hold, and what makes it; written first
    manifest.json         a receipt for each unit; written last
    running/UNIT.json     an attempt at a unit, while it lasts
    shards/UNIT.parquet   id, text, text_pair (for pairs), label, and a column a feature, such as mean_6, of vectors
                          (fixed size lists of float16 or float32); where words have vectors, lists of those, with
                          starts and stops of the words; predictions have answers in place of label and vectors
    rejects/UNIT.jsonl    id, reason, preview of rows set aside, where there are any
    receipts/TIME.jsonl   receipts, a thousand at a time, where there are so many: in place of the shards' own, each of
                          which takes two requests
    """

    url: str

    @property
    def location(self) -> Location:
        return Location(self.url)

    @property
    def run_name(self) -> str:
        """The name of the run's folder, or where it is in none, its own."""
        *_, above, parent, name = ["", "", *self.url.rstrip("/").split("/")]
        return above if parent == "stores" else name

    def shard(self, unit: str) -> Location:
        return self.location / "shards" / f"{unit}.parquet"

    def write_shard(
        self, receipt: Receipt, table: pa.Table, rejects: pa.Table, spent: Callable[[], dict[str, float]] = dict
    ) -> Receipt:
        """Write what a unit gave: rejects first, then the shard, whose presence means that the unit is done.

        Args:
            spent: tells the receipt's `spent` when all of the shard but its receipt is made.
        """
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rejects.to_pylist()]
        if lines:
            self._rejects(receipt.unit).write("".join(lines).encode())
        data, receipt = packed(receipt, table, spent)
        self.shard(receipt.unit).write(data)
        return receipt

    def done(self, units: Sequence[str]) -> dict[str, Receipt]:
        """The receipts of those units whose shards are there."""
        shards = {file.name.removesuffix(".parquet"): file.changed for file in (self.location / "shards").files()}
        noted = {unit: receipt for unit, (receipt, at) in self._noted().items() if shards.get(unit, at + 1) <= at}
        found = {unit: noted[unit] for unit in units if unit in noted}
        with ThreadPoolExecutor(_THREADS) as pool:
            others = pool.map(self.receipt, [unit for unit in units if unit in shards and unit not in found])
        return found | {receipt.unit: receipt for receipt in others if receipt}

    def note(self, receipts: Sequence[Receipt]) -> None:
        """Note receipts in one file, for `done`. Of a shard that is written later its own counts."""
        (self._notes / f"{time.time_ns()}.jsonl").write(_lines(receipts).encode())

    @property
    def _notes(self) -> Location:
        return self.location / "receipts"

    def _noted(self) -> dict[str, tuple[Receipt, float]]:
        """The receipts that are noted, by unit, each with the time when it was."""

        def read(file: FileInfo) -> list[tuple[Receipt, float]]:
            try:
                lines = Location(file.url).read().splitlines()
                return [(Receipt(**json.loads(line)), file.changed) for line in lines]
            except (FileNotFoundError, ValueError, TypeError):
                return []  # damaged: as good as missing

        with ThreadPoolExecutor(_THREADS) as pool:
            files = pool.map(read, self._notes.files())
            return {receipt.unit: (receipt, at) for file in files for receipt, at in file}

    def receipt(self, unit: str) -> Receipt | None:
        """The receipt that a unit's shard carries; None where there is no whole shard."""
        shard = self.shard(unit)
        try:
            return _receipt_in(shard.patiently(lambda: pq.read_metadata(shard.open_random())))
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError):
            return None  # not whole: as good as missing

    def forget(self, unit: str) -> None:
        """Remove what there is of a unit, and the manifest, which would be wrong."""
        self._manifest.delete()
        self.shard(unit).delete()
        self._rejects(unit).delete()

    def _rejects(self, unit: str) -> Location:
        return self.location / "rejects" / f"{unit}.jsonl"

    def rejects(self, unit: str) -> list[dict[str, str]]:
        """The rows of a unit that were set aside."""
        lines = self._rejects(unit).read().split(b"\n") if self._rejects(unit).exists() else []
        return [json.loads(line) for line in lines if line]

    # --- attempts -----------------------------------------------------------------------------------------

    @property
    def _running(self) -> Location:
        return self.location / "running"

    def begin(self, unit: str, run: str, node: str = "") -> Attempt:
        """Note that a unit is begun; what is noted already was begun in vain."""
        before = self.attempt(unit)
        lost = before.lost + 1 if before else 0
        number = before.number + 1 if before and before.run == run else 1
        attempt = Attempt(run, number, lost, node)
        self.renew(unit, attempt)
        return attempt

    def renew(self, unit: str, attempt: Attempt) -> None:
        """Show that a unit is still worked on."""
        (self._running / f"{unit}.json").write(json.dumps(asdict(attempt)).encode(), sync=False)

    def attempt(self, unit: str) -> Attempt | None:
        """The attempt at a unit that is noted."""
        try:
            return Attempt(**json.loads((self._running / f"{unit}.json").read()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def end(self, unit: str) -> None:
        """The unit is done."""
        (self._running / f"{unit}.json").delete()

    def attempts(self) -> list[FileInfo]:
        """The attempts that are noted, named UNIT.json; a stamp changes when one is renewed."""
        return self._running.files()

    # --- plan and manifest --------------------------------------------------------------------------------

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Write what the store is to hold, unless it is there already, and sweep up after runs that were killed."""
        if self.plan() != plan:
            self._manifest.delete()  # it is of another plan
            (self.location / "plan.json").write(json.dumps(plan).encode())
        for folder in ("", "shards", "rejects", "running"):
            (self.location / folder).sweep()

    def plan(self) -> dict[str, Any] | None:
        """What the store is to hold; None where nothing was begun or it is damaged."""
        try:
            plan: dict[str, Any] = json.loads((self.location / "plan.json").read())
            return plan
        except (FileNotFoundError, ValueError):
            return None

    @property
    def _manifest(self) -> Location:
        return self.location / "manifest.json"

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest. Shards of other units (of a file that is gone, of another limit) are left: they may be
        asked for again, and the manifest tells which ones count."""
        self._running.delete()
        head = json.dumps({"fingerprint": manifest.fingerprint, "made_by": manifest.made_by}, indent=1)
        units = _lines(manifest.units, ",\n")
        self._manifest.write((head.removesuffix("\n}") + ',\n "units": [\n' + units + "\n]}").encode())

    def prune(self, manifest: Manifest) -> None:
        """Remove the shards and rejects that a manifest does not count, for who reads the folder without it."""
        self._notes.delete()
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
        """The shards in the order of the rows, as tables of those columns; none without a row, which does not know how
        wide vectors are."""
        for receipt in (receipt for receipt in self.complete().units if receipt.rows):
            shard = self.shard(receipt.unit)

            def read(shard: Location = shard) -> pa.Table:
                return pq.read_table(shard.open_random(), columns=list(columns), page_checksum_verification=True)

            try:
                table = shard.patiently(read)
            except (pa.ArrowException, OSError) as error:
                raise StoreError(
                    f"{shard} is missing or damaged ({' '.join(str(error).split())}). `bertray verify --repair` on the "
                    "run's folder encodes its rows again."
                ) from None
            if table.num_rows != receipt.rows:
                raise StoreError(
                    f"{shard} has {table.num_rows} rows, not {receipt.rows}. `bertray verify --repair` on the run's "
                    "folder encodes its rows again."
                )
            yield table

    def load(self) -> tuple[NDArray[Any], list[str]]:
        """All vectors [n, width], of all features side by side, in the type they are stored in, and all labels [n]."""
        names = self.complete().features
        parts = list(self.tables([*names, "label"]))
        return (
            np.concatenate([vectors_of(part, names) for part in parts]),
            [label for part in parts for label in part["label"].to_pylist()],
        )

    def complete(self) -> Manifest:
        """The manifest of a store that has to be complete."""
        manifest = self.manifest()
        if manifest is None:
            raise StoreError(f"{self.url} is not complete. Run `bertray embed` with its spec first.")
        return manifest

    def check(self, receipt: Receipt) -> pa.Table:
        """The whole shard of a unit, held against its checksum and its receipt.

        Raises:
            StoreError: with what is wrong.
        """
        try:
            data = self.shard(receipt.unit).read()
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            raise StoreError("its shard is missing" if gone else f"its shard cannot be read: {error}") from None
        if not _is_whole(data):  # before anything in it is believed
            raise StoreError("its shard is damaged: the checksum differs")
        try:
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
            written = _receipt_in(pq.read_metadata(pa.BufferReader(data)))
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise StoreError(f"its shard is damaged: {' '.join(str(error).split())[:100]}") from None
        if written != receipt:
            raise StoreError("its shard is not the one that the manifest tells of")
        if table.num_rows != receipt.rows:
            raise StoreError(f"its shard has {table.num_rows} rows, not {receipt.rows}")
        if any(not np.isfinite(vectors_of(table, [name])).all() for name in vector_columns(table.schema)):
            raise StoreError("its shard holds vectors that are not finite")
        if (aside := len(self.rejects(receipt.unit))) != receipt.rejected:
            raise StoreError(f"{aside} of its {receipt.rejected} rows that were set aside are told of")
        return table


def packed(
    receipt: Receipt, table: pa.Table, spent: Callable[[], dict[str, float]] = dict
) -> tuple[pa.Buffer, Receipt]:
    """What a unit gave as the bytes of its shard, and its receipt with their checksum and `spent`."""
    sink = pa.BufferOutputStream()
    vectors = [table.schema.field(name) for name in vector_columns(table.schema)]
    codecs = dict.fromkeys(_columns(table.schema), "zstd")
    codecs |= {column_path(field): "none" for field in vectors}  # they do not compress
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression=codecs,
        use_dictionary=["label"],
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        writer.write_table(table)
        receipt = replace(receipt, spent=spent())
        writer.add_key_value_metadata({_RECEIPT: json.dumps(asdict(receipt)), _CHECKSUM: _UNSEALED})
    data, checksum = _sealed(sink.getvalue())
    return data, replace(receipt, checksum=checksum)


def _lines(receipts: Sequence[Receipt], between: str = "\n") -> str:
    """Receipts as JSON, each on a line. `asdict` would copy them first, which takes several times as long."""
    return between.join(json.dumps(vars(receipt)) for receipt in receipts)


# A shard's checksum lies in its own footer, whose texts have their lengths before them, and is taken with zeros in its
# place: so a byte that is flipped anywhere shows, and a unit stays one file.
_UNSEALED = "0" * 64
_BEFORE_CHECKSUM = _CHECKSUM + b"\x18\x40"


def _sealed(data: pa.Buffer) -> tuple[pa.Buffer, str]:
    """A shard with its checksum in place of the zeros."""
    sealed = bytearray(data)
    checksum = hashlib.sha256(sealed).hexdigest()
    place = sealed.rindex(_BEFORE_CHECKSUM + _UNSEALED.encode()) + len(_BEFORE_CHECKSUM)
    sealed[place : place + len(checksum)] = checksum.encode()
    return pa.py_buffer(sealed), checksum


def _is_whole(data: bytes) -> bool:
    """Whether a shard has the checksum that it holds."""
    before, found, behind = data.rpartition(_BEFORE_CHECKSUM)
    written, behind = behind[: len(_UNSEALED)], behind[len(_UNSEALED) :]
    return hashlib.sha256(before + found + _UNSEALED.encode() + behind).hexdigest().encode() == written


def _columns(schema: pa.Schema) -> list[str]:
    """How Parquet names all columns but those of vectors."""
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema]


def _receipt_in(metadata: pq.FileMetaData) -> Receipt:
    """The receipt that a shard carries, with the shard's checksum."""
    receipt = json.loads(metadata.metadata[_RECEIPT])
    return Receipt(**(receipt | {"checksum": metadata.metadata[_CHECKSUM].decode()}))
