"""File formats: how many rows a file has, and any range of its rows as an Arrow table.

Files are read as streams. Text formats can only be read forwards, so a Rows object keeps its place: reading
ranges in rising order costs one pass over the file however many ranges there are. Knows nothing of what the
columns mean.
"""

import io
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet as pq

from bertray.errors import SourceError
from bertray.storage import Location

EXTENSIONS = {
    "parquet": "parquet",
    "pq": "parquet",
    "arrow": "arrow",
    "feather": "arrow",
    "ipc": "arrow",
    "csv": "csv",
    "tsv": "tsv",
    "tab": "tsv",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "txt": "text",
    "text": "text",
}
_COMPRESSIONS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2", "lz4": "lz4"}
_CHUNK = 8192


def format_of(name: str) -> str:
    """The format that a file's name tells, empty if it tells none."""
    steps = name.lower().rsplit("/", 1)[-1].split(".")[1:]
    if steps and steps[-1] in _COMPRESSIONS:
        steps.pop()
    return EXTENSIONS.get(steps[-1], "") if steps else ""


def open_rows(url: str, format: str, columns: Sequence[str]) -> "Rows":
    """The rows of a file, at its start. `columns` are the names to read; other columns are not touched.

    Raises:
        SourceError: the file is missing, is not of that format, or lacks a column.
    """
    location = Location(url)
    if format == "json" and not _is_array(location):
        format = "jsonl"  # most files named .json hold JSON Lines
    with reading(url):
        return _KINDS[format](location, tuple(columns))


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Turns what goes wrong while a file is read into one line that names the file."""
    try:
        yield
    except SourceError:
        raise
    except FileNotFoundError:
        raise SourceError(f"{url} does not exist.") from None
    except UnicodeError:
        raise SourceError(f"{url} is not UTF-8 text. Convert it first, for instance with iconv.") from None
    except (pa.ArrowException, OSError, EOFError) as error:
        raise SourceError(f"{url} cannot be read: {' '.join(str(error).split())}") from error


class Rows(ABC):
    """The rows of one file, read forwards from `position`."""

    def __init__(self, location: Location, columns: tuple[str, ...]) -> None:
        self.url = location.url
        self.columns = columns
        self.position = 0
        self._open(location)

    @abstractmethod
    def _open(self, location: Location) -> None: ...

    @abstractmethod
    def _skip(self, rows: int) -> int:
        """Go on by that many rows; returns by how many it was, fewer at the end."""

    @abstractmethod
    def _take(self, rows: int) -> pa.Table:
        """The next rows; fewer at the end."""

    def count(self) -> int:
        """How many rows there are from here to the end, which is then where this stands."""
        with reading(self.url):
            passed = self._skip(2**62)
        self.position += passed
        return passed

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows start to stop; start must not lie behind `position`.

        Raises:
            SourceError: what is there cannot be read, or the file has fewer rows.
        """
        with reading(self.url):
            self.position += self._skip(start - self.position)
            table = self._take(stop - start)
        if self.position + table.num_rows < stop:
            raise SourceError(f"{self.url} has become shorter: rows up to {stop} were expected. Run the command again.")
        self.position = stop
        return table

    def _check_columns(self, names: Sequence[str]) -> None:
        missing = [column for column in self.columns if column not in names]
        if missing:
            raise SourceError(
                f"{self.url} has no column {missing[0]!r}. It has: {', '.join(names)}. "
                "Set data.text, data.label and so on to the names in the file."
            )


class _Batches(Rows):
    """Rows that come as a stream of Arrow record batches."""

    _batches: Iterator[pa.RecordBatch]
    _rest: pa.RecordBatch | None = None

    def _next(self, rows: int) -> pa.RecordBatch | None:
        """The next batch, cut to at most that many rows."""
        batch = self._rest if self._rest is not None else next(self._batches, None)
        if batch is None:
            return None
        self._rest = batch.slice(rows) if batch.num_rows > rows else None
        return batch.slice(0, rows)

    def _skip(self, rows: int) -> int:
        passed = 0
        while passed < rows and (batch := self._next(rows - passed)) is not None:
            passed += batch.num_rows
        return passed

    def _take(self, rows: int) -> pa.Table:
        batches: list[pa.RecordBatch] = []
        taken = 0
        while taken < rows and (batch := self._next(rows - taken)) is not None:
            taken += batch.num_rows
            batches.append(batch.select(self.columns))
        return pa.Table.from_batches(batches) if batches else pa.table({column: [] for column in self.columns})


class _Parquet(_Batches):
    def _open(self, location: Location) -> None:
        self._file = pq.ParquetFile(location.open_random())
        self._check_columns(self._file.schema_arrow.names)
        metadata = self._file.metadata
        self._ends = list(itertools.accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
        self._from_group(0)

    def _from_group(self, group: int) -> None:
        groups = range(group, len(self._ends))
        self._batches = self._file.iter_batches(_CHUNK, row_groups=list(groups), columns=list(self.columns))
        self._rest = None

    def count(self) -> int:
        return self._file.metadata.num_rows - self.position

    def _skip(self, rows: int) -> int:
        target = self.position + rows
        group = sum(end <= target for end in self._ends)
        start = self._ends[group - 1] if group else 0
        if start <= self.position:
            return super()._skip(rows)
        self._from_group(group)
        return start - self.position + super()._skip(target - start)


class _Arrow(_Batches):
    """Arrow IPC, as files (Feather) or streams (what the datasets library writes)."""

    def _open(self, location: Location) -> None:
        source = pa.memory_map(location.path) if location.local else location.open_random()
        try:
            reader = pa.ipc.open_file(source)
            self._batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            self._batches = iter(reader)
        self._check_columns(reader.schema.names)


class _Csv(_Batches):
    """Every column is read as strings: types are a matter of what a column is used for."""

    delimiter = ","

    def _open(self, location: Location) -> None:
        try:
            self._batches = iter(self._reader(location, self.columns))
        except pa.ArrowKeyError:
            self._check_columns(self._reader(location, ()).schema.names)
            raise
        except pa.ArrowInvalid as error:
            if "Empty CSV file" in str(error):
                raise SourceError(f"{self.url} is empty.") from None
            raise

    def _reader(self, location: Location, columns: tuple[str, ...]) -> Any:
        return pa.csv.open_csv(
            location.open("detect"),
            pa.csv.ReadOptions(block_size=16 << 20),
            pa.csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
            pa.csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string())),
        )


class _Tsv(_Csv):
    delimiter = "\t"


class _Lines(Rows):
    """A record a line. Lines end at \\n alone: text holds U+0085, U+2028 and lone \\r."""

    def _open(self, location: Location) -> None:
        self._lines = io.BufferedReader(location.open("detect"), 1 << 20)

    def _skip(self, rows: int) -> int:
        return sum(1 for _ in itertools.islice(self._lines, rows))

    def _take(self, rows: int) -> pa.Table:
        lines = list(itertools.islice(self._lines, rows))
        if self.position == 0 and lines:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        return self._table(lines)

    @abstractmethod
    def _table(self, lines: list[bytes]) -> pa.Table: ...


class _Text(_Lines):
    def _open(self, location: Location) -> None:
        self._check_columns(["text"])
        super()._open(location)

    def _table(self, lines: list[bytes]) -> pa.Table:
        return pa.table({"text": pa.array([line.rstrip(b"\r\n").decode() for line in lines], pa.string())})


class _JsonLines(_Lines):
    def _table(self, lines: list[bytes]) -> pa.Table:
        records = []
        for number, line in enumerate(lines, self.position + 1):
            try:
                records.append(json.loads(line, parse_constant=_constant) if line.strip() else {})
            except UnicodeDecodeError:
                raise SourceError(f"{self.url}:{number} is not UTF-8 text.") from None
            except ValueError as error:
                raise SourceError(f"{self.url}:{number} is not JSON: {error}") from None
        return _from_records(records, self)


class _JsonArray(Rows):
    """One array of records, parsed as a stream."""

    def _open(self, location: Location) -> None:
        import ijson

        stream = io.BufferedReader(location.open("detect"))
        if stream.peek(3).startswith(b"\xef\xbb\xbf"):
            stream.read(3)
        self._records = ijson.items(stream, "item", use_float=True)

    def _next(self, rows: int) -> Iterator[Any]:
        import ijson

        try:
            yield from itertools.islice(self._records, rows)
        except ijson.JSONError as error:
            raise SourceError(f"{self.url} is not JSON: {' '.join(str(error).split())}") from None

    def _skip(self, rows: int) -> int:
        return sum(1 for _ in self._next(rows))

    def _take(self, rows: int) -> pa.Table:
        return _from_records(list(self._next(rows)), self)


def _from_records(records: list[Any], rows: Rows) -> pa.Table:
    """Records of JSON as a table. A key that a record lacks is null, but some record has to have it."""
    for number, record in enumerate(records, rows.position + 1):
        if not isinstance(record, dict):
            raise SourceError(
                f"{rows.url}: record {number} must be an object such as "
                f'{{"text": ...}}. Got {str(record)[:60]!r} instead.'
            )
    if records and rows.position == 0:
        rows._check_columns(list(dict.fromkeys(key for record in records for key in record)))
    arrays = {}
    for column in rows.columns:
        values = [record.get(column) for record in records]
        try:
            arrays[column] = pa.array(values)
        except UnicodeEncodeError as error:
            raise SourceError(
                f"{rows.url}: column {column!r} holds half a character (a lone surrogate) "
                f"in {str(error.object)[:40]!a}. Remove it from the text."
            ) from None
        except (pa.ArrowException, OverflowError):  # strings and numbers, say: all as strings, as in a CSV file
            if odd := [value for value in values if isinstance(value, (list, dict))]:
                raise SourceError(
                    f"{rows.url}: column {column!r} must hold strings or numbers. Got {str(odd[0])[:60]} instead."
                ) from None
            arrays[column] = pa.array([_string(value) for value in values], pa.string())
    return pa.table(arrays)


def _string(value: Any) -> str | None:
    if isinstance(value, str | None):
        return value
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _constant(name: str) -> float | None:
    """NaN, which is no JSON, but what Python writes for a missing value."""
    return None if name == "NaN" else float(name)


def _is_array(location: Location) -> bool:
    with reading(location.url), location.open("detect") as stream:
        return bytes(stream.read(64)).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


_KINDS: dict[str, type[Rows]] = {
    "parquet": _Parquet,
    "arrow": _Arrow,
    "csv": _Csv,
    "tsv": _Tsv,
    "jsonl": _JsonLines,
    "json": _JsonArray,
    "text": _Text,
}
