"""File formats: how many rows a file has, and any range of its rows as an Arrow table.

Files are read as streams. Text formats can only be read forwards, so a Rows object keeps its place: reading
ranges in rising order costs one pass over the file however many ranges there are. Knows nothing of what the
columns mean.
"""

import io
import itertools
import json
import re
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
# Columns beside the user's, if rows are at fault: what is wrong with each, and what it holds.
FAULT, RAW = "\0fault", "\0raw"
_RAW_CHARACTERS = 200
_SPACES = re.compile(r"[ \t\r\n]*")
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

    def groups(self) -> list[int]:
        """How many rows each part of the file has that can be read without those before it, from here to the end."""
        return [self.count()]

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows start to stop; start must not lie behind `position`. Rows that are not what they should be, but leave
        those behind them to be read, are null, with the reason in the columns FAULT and RAW.

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
        return sum(self.groups())

    def groups(self) -> list[int]:
        return [self._file.metadata.row_group(i).num_rows for i in range(len(self._ends))]

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
        faults: dict[int, str] = {}
        texts: list[str | None] = []
        for row, line in enumerate(lines):
            try:
                texts.append(line.rstrip(b"\r\n").decode())
            except UnicodeDecodeError:
                texts.append(None)
                faults[row] = f"line {self.position + row + 1} is not UTF-8 text"
        return _with_faults(pa.table({"text": pa.array(texts, pa.string())}), faults, lines)


class _JsonLines(_Lines):
    def _table(self, lines: list[bytes]) -> pa.Table:
        records: list[Any] = []
        faults: dict[int, str] = {}
        for row, line in enumerate(lines):
            try:
                records.append(json.loads(line, parse_constant=_constant) if line.strip() else {})
            except (ValueError, RecursionError) as error:
                kind = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"JSON: {error}"
                faults[row] = f"line {self.position + row + 1} is not {kind}"
                records.append({})
        return _from_records(records, self, faults, lines)


class _JsonArray(Rows):
    """One array of records, decoded one after another while the file is read."""

    def _open(self, location: Location) -> None:
        stream = io.BufferedReader(location.open("detect"), 1 << 20)
        self._stream = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        self._buffer, self._at = "", 0
        self._records = self._decoded()

    def _fill(self) -> bool:
        """Read on; False at the end of the file."""
        more = self._stream.read(1 << 20)
        self._buffer, self._at = self._buffer[self._at :] + more, 0
        return bool(more)

    def _mark(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            rest = _SPACES.match(self._buffer, self._at)
            self._at = rest.end() if rest else self._at
            if self._at < len(self._buffer) or not self._fill():
                return self._buffer[self._at : self._at + 1]

    def _decoded(self) -> Iterator[Any]:
        decoder, count = json.JSONDecoder(parse_constant=_constant), 0
        between = self._mark()  # [ before the first record
        while True:
            self._at += len(between)
            if between == "[" and self._mark() == "]":
                return
            yield self._record(decoder, count)
            count += 1
            if (between := self._mark()) == "]":
                return
            if between != ",":
                raise self._broken(count, "Expecting ',' or ']'")

    def _record(self, decoder: json.JSONDecoder, count: int) -> Any:
        self._mark()
        while True:
            try:
                value, end = decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if not _may_go_on(error) or not self._fill():
                    raise self._broken(count, error.msg) from None
                continue
            except RecursionError:
                raise self._broken(count, "it is nested too deeply") from None
            if end < len(self._buffer) or not isinstance(value, int | float) or not self._fill():
                self._at = end
                return value

    def _broken(self, count: int, reason: str) -> SourceError:
        return SourceError(f"{self.url} is not JSON: {reason}, in or behind record {count + 1}. Mend the file.")

    def _skip(self, rows: int) -> int:
        return sum(1 for _ in itertools.islice(self._records, rows))

    def _take(self, rows: int) -> pa.Table:
        return _from_records(list(itertools.islice(self._records, rows)), self)


def _may_go_on(error: json.JSONDecodeError) -> bool:
    """Whether more of the file may mend what is wrong: it is wrong at the end, or a string has not ended."""
    return error.pos > len(error.doc) - 16 or error.msg.startswith("Unterminated string")


def _from_records(
    records: list[Any], rows: Rows, faults: dict[int, str] | None = None, raw: Sequence[Any] = ()
) -> pa.Table:
    """Records of JSON as a table. A key that a record lacks is null, but some record has to have it."""
    faults = {} if faults is None else faults
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            faults[row] = f'record {rows.position + row + 1} must be an object such as {{"text": ...}}'
    whole = raw or records
    if faults:
        records = [{} if row in faults else record for row, record in enumerate(records)]
    if rows.position == 0 and len(faults) < len(records):
        rows._check_columns(list(dict.fromkeys(key for record in records for key in record)))
    arrays = {column: _array([record.get(column) for record in records], column, faults) for column in rows.columns}
    return _with_faults(pa.table(arrays), faults, whole)


def _array(values: list[Any], column: str, faults: dict[int, str]) -> pa.Array:
    """Values of JSON as strings or numbers; others are null and at fault."""
    try:
        array = pa.array(values)
        if not pa.types.is_nested(array.type):
            return array
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass  # strings and numbers, say: all become strings, as in a CSV file
    strings: list[str | None] = []
    for row, value in enumerate(values):
        fault = _fault(value)
        if fault:
            faults.setdefault(row, f"{column} {fault}")
        strings.append(None if fault else _string(value))
    return pa.array(strings, pa.string())


def _fault(value: Any) -> str:
    if isinstance(value, list | dict):
        return "is a list" if isinstance(value, list) else "is an object"
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    return ""


def _with_faults(table: pa.Table, faults: dict[int, str], whole: Sequence[Any]) -> pa.Table:
    """A table, and if rows are at fault, what is wrong with them and what they hold."""
    if not faults:
        return table
    raw = [_shown(whole[row]) if row in faults else None for row in range(table.num_rows)]
    return table.append_column(
        FAULT, pa.array([faults.get(row) for row in range(table.num_rows)], pa.string())
    ).append_column(RAW, pa.array(raw, pa.string()))


def _shown(row: Any) -> str:
    """The beginning of a row, as text that can be written."""
    if isinstance(row, bytes):
        return row[:_RAW_CHARACTERS].decode(errors="replace").rstrip("\r\n")
    return repr(row)[:_RAW_CHARACTERS].encode(errors="replace").decode()


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
