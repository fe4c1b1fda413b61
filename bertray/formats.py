"""File formats: how many rows a file has, and any range of its rows as an Arrow table.

Files are read as streams. Text formats can only be read forwards, so a Rows object keeps its place: reading
ranges in rising order costs one pass over the file however many ranges there are. What is odd in JSON is told cell by
cell, so that one bad record stops nothing. Knows nothing of what the columns mean.
"""

import csv
import io
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
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
_BOM = b"\xef\xbb\xbf"
_LONGEST = 1 << 26  # characters of one record of a JSON array: a quote that is never closed must not fill the memory
_PIECE = 1 << 20
_BEHIND = re.compile(r"[ \t\n\r]*([],])[ \t\n\r]*").match
_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)

BOOLEAN = "is a boolean"
FRACTION = "is not a whole number"


class Odd(NamedTuple):
    """A cell of what was read that is not what a table of strings and numbers can hold.

    row: its place in the table. column: empty where all of the row is odd. what: such as "is a list". shown: how it
    begins. The table holds booleans and fractions as strings, and null for the rest.
    """

    row: int
    column: str
    what: str
    shown: str


def format_of(name: str) -> str:
    """The format that a file's name tells, empty if it tells none."""
    steps = name.lower().rsplit("/", 1)[-1].split(".")[1:]
    if steps and steps[-1] in _COMPRESSIONS:
        steps.pop()
    return EXTENSIONS.get(steps[-1], "") if steps else ""


def open_rows(url: str, format: str, columns: Sequence[str], nested: Sequence[str] = ()) -> "Rows":
    """The rows of a file, at its start.

    Args:
        columns: the names to read; other columns are not touched.
        nested: those of them whose cells may hold lists or objects: each cell comes as JSON.

    Raises:
        SourceError: the file is missing, is not of that format, or lacks a column.
    """
    return rows_in(Location(url), format, columns, nested)


def rows_in(location: Location, format: str, columns: Sequence[str], nested: Sequence[str] = ()) -> "Rows":
    """The same of a location that is there already."""
    if format == "json" and not _is_array(location):
        format = "jsonl"  # most files named .json hold JSON Lines
    with reading(location.url):
        return _KINDS[format](location, tuple(columns), frozenset(nested))


def compression_of(name: str) -> str:
    """The compression that a file's name tells, as pyarrow calls it; empty if it tells none."""
    return _COMPRESSIONS.get(name.lower().rsplit(".", 1)[-1], "")


def whole_records(piece: bytes, format: str) -> bytes:
    """What a piece from the start of a file, or of lines from the start of one, holds as whole records."""
    if format in ("csv", "tsv"):
        marks = np.frombuffer(piece, np.uint8)
        within = np.cumsum(marks == ord('"')) % 2  # quoted fields may hold line ends
        ends = np.flatnonzero((marks == ord("\n")) & (within == 0))
        return piece[: ends[-1] + 1] if len(ends) else b""
    if format == "json" and piece.removeprefix(_BOM).lstrip()[:1] == b"[":
        return _whole_array(piece.decode(errors="surrogateescape")).encode(errors="surrogateescape")
    return piece[: piece.rfind(b"\n") + 1]


def _whole_array(text: str) -> str:
    """The beginning of an array of records, closed behind the last that is whole; empty if none is."""
    place = text.index("[") + 1
    place = end = len(text) - len(text[place:].lstrip())
    with suppress(ValueError, RecursionError):
        while True:
            _, place, mark = _element(text, place)
            if mark == "]":
                return text[:place]
            end = text.rindex(",", 0, place)
    return text[:end] + "]" if text[end : end + 1] == "," else ""


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
    """The rows of one file, read forwards from `position`.

    groups: the rows behind which groups end that are best read whole; empty where any cut is as good.
    odd: the odd cells of the range that was read last.
    """

    groups: tuple[int, ...] = ()

    def __init__(self, location: Location, columns: tuple[str, ...], nested: frozenset[str] = frozenset()) -> None:
        self.url = location.url
        self.columns, self.nested = columns, nested
        self.position = 0
        self.odd: list[Odd] = []
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
        self.odd = []
        with reading(self.url):
            self.position += self._skip(start - self.position)
            table = self._take(stop - start)
        if self.position + table.num_rows < stop:
            raise SourceError(f"{self.url} has become shorter: rows up to {stop} were expected. Run the command again.")
        self.position = stop
        return table

    def _refuse_utf16(self, stream: io.BufferedReader) -> None:
        if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise SourceError(f"{self.url} is UTF-16 text. Convert it to UTF-8 first, for instance with iconv.")

    def _check_columns(self, names: Sequence[str]) -> None:
        missing = [column for column in self.columns if column not in names]
        if missing:
            raise SourceError(
                f"{self.url} has no column {missing[0]!r}. It has: {', '.join(names)}. "
                "Set data.text, data.label and so on to the names in the file."
            )
        if twice := [column for column in self.columns if list(names).count(column) > 1]:
            raise SourceError(f"{self.url} has several columns {twice[0]!r}. Rename all but one.")


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
        table = pa.Table.from_batches(batches) if batches else pa.table({column: [] for column in self.columns})
        for name in self.nested:
            table = table.set_column(table.column_names.index(name), name, as_json(table[name].to_pylist()))
        return table


class _Parquet(_Batches):
    def _open(self, location: Location) -> None:
        self._file = pq.ParquetFile(location.open_random())
        self._check_columns(self._file.schema_arrow.names)
        metadata = self._file.metadata
        sizes = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        self.groups = tuple(itertools.accumulate(sizes))
        self._from_group(0)

    def _from_group(self, group: int) -> None:
        # One after another: what is asked for at once is also fetched at once, up to the end of the file.
        self._batches = (
            batch
            for number in range(group, len(self.groups))
            for batch in self._file.iter_batches(_CHUNK, row_groups=[number], columns=list(self.columns))
        )
        self._rest = None

    def count(self) -> int:
        return self._file.metadata.num_rows - self.position

    def _skip(self, rows: int) -> int:
        target = self.position + rows
        group = sum(end <= target for end in self.groups)
        start = self.groups[group - 1] if group else 0
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
        self._location = location
        try:
            reader = pa.csv.open_csv(
                location.open("detect"),
                pa.csv.ReadOptions(block_size=16 << 20),
                pa.csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
                pa.csv.ConvertOptions(
                    include_columns=self.columns, column_types=dict.fromkeys(self.columns, pa.string())
                ),
            )
        except pa.ArrowKeyError:
            self._check_columns(self._header())
            raise
        except pa.ArrowInvalid as error:
            if "Empty CSV file" in str(error):
                raise SourceError(f"{self.url} is empty.") from None
            self._header()  # says so if it is UTF-16
            raise
        self._batches = iter(reader)

    def count(self) -> int:
        self._check_columns(self._header())  # Arrow takes the first of several columns of one name
        return super().count()

    def _header(self) -> list[str]:
        with self._location.open("detect") as opened:
            stream = io.BufferedReader(opened)
            self._refuse_utf16(stream)
            # What is no UTF-8 may lie in a column that nobody reads.
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
            try:
                return next(filter(None, csv.reader(lines, delimiter=self.delimiter)), [])
            except csv.Error as error:
                raise SourceError(f"{self.url} cannot be read: its header is no CSV ({error}).") from None


class _Tsv(_Csv):
    delimiter = "\t"


class _Lines(Rows):
    """A record a line. Lines end at \\n alone: text holds U+0085, U+2028 and lone \\r."""

    def _open(self, location: Location) -> None:
        self._lines = io.BufferedReader(location.open("detect"), 1 << 20)
        self._refuse_utf16(self._lines)

    def _skip(self, rows: int) -> int:
        return sum(1 for _ in itertools.islice(self._lines, rows))

    def _take(self, rows: int) -> pa.Table:
        lines = list(itertools.islice(self._lines, rows))
        if self.position == 0 and lines:
            lines[0] = lines[0].removeprefix(_BOM)
        return self._table(lines)

    @abstractmethod
    def _table(self, lines: list[bytes]) -> pa.Table: ...


class _Text(_Lines):
    def _open(self, location: Location) -> None:
        self._check_columns(["text"])
        super()._open(location)

    def _table(self, lines: list[bytes]) -> pa.Table:
        texts = [line.rstrip(b"\r\n").decode(errors="surrogateescape") for line in lines]
        return pa.table({"text": _array(texts, "text", self.odd)})


class _JsonLines(_Lines):
    def _table(self, lines: list[bytes]) -> pa.Table:
        return _from_records([_record(line) for line in lines], self)


class _JsonArray(Rows):
    """One array of records, parsed as a stream."""

    def _open(self, location: Location) -> None:
        stream = io.BufferedReader(location.open("detect"), 1 << 20)
        # Bytes that are no UTF-8 become half characters, and are told with the cells that hold them.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._records = _elements(text, self.url)

    def _skip(self, rows: int) -> int:
        return sum(1 for _ in itertools.islice(self._records, rows))

    def _take(self, rows: int) -> pa.Table:
        return _from_records(list(itertools.islice(self._records, rows)), self)


class _Unread(NamedTuple):
    """Stands for a record that cannot be read."""

    what: str
    shown: str


def _record(line: bytes) -> Any:
    """The record of a line; a blank one holds nothing, and is a record all the same: rows are counted by lines."""
    try:
        text = line.strip(b" \t\r\n").removeprefix(_BOM).decode()
        return _DECODER.decode(text) if text else {}
    except (ValueError, RecursionError) as error:
        return _Unread(f"line {_fault(error)}", line[:400].decode(errors="replace").strip("\r\n")[:80])


def _fault(error: Exception) -> str:
    """What is wrong with a record, without its place: rows with one fault are counted together."""
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return f"is not JSON: {getattr(error, 'msg', 'a number has too many digits').removesuffix(' at').strip()}"


def _elements(stream: io.TextIOWrapper, url: str) -> Iterator[Any]:
    """The elements of the array that a stream holds.

    Raises:
        SourceError: where an element or the array ends cannot be told.
    """
    text = stream.read(_PIECE).lstrip().removeprefix("[").lstrip()
    place, number, size, mark = 0, 1, _PIECE, ""
    if text.startswith("]"):
        place, mark = 1, "]"
    while mark != "]":
        try:
            value, end, mark = _element(text, place)
        except (ValueError, RecursionError) as error:  # broken, or `text` is too short
            piece = stream.read(size)
            if not piece or len(text) - place > _LONGEST:
                raise SourceError(
                    f"{url}: record {number} {_fault(error)}. Where the next one begins cannot be told: correct it."
                ) from None
            text, place, size = (text[place:] + piece).lstrip(), 0, 2 * size
            continue
        yield value
        place, number, size = end, number + 1, _PIECE
    if text[place:].strip() or stream.read().strip():
        raise SourceError(f"{url} is not JSON: something follows the array's end. Correct the file.")


def _element(text: str, place: int) -> tuple[Any, int, str]:
    """The element of an array at `place`, the place of the next, and the comma or bracket between.

    Raises:
        ValueError, RecursionError: it is broken, or goes on behind `text`.
    """
    try:
        value, end = _DECODER.raw_decode(text, place)
    except (ValueError, RecursionError) as error:
        # Brackets tell where it ends, if what is wrong cannot be a missing quote.
        sure = not isinstance(error, json.JSONDecodeError) or error.msg.startswith("Invalid \\")
        end = _closing(text, place) if sure else -1
        if end < 0:
            raise
        value = _Unread(f"record {_fault(error)}", _shown(text[place : place + 80]))
    if behind := _BEHIND(text, end):
        return value, behind.end(), behind[1]
    raise json.JSONDecodeError("Expecting ',' delimiter", text, end)


def _closing(text: str, place: int) -> int:
    """Behind the bracket that closes the one at `place`; -1 where there is none."""
    depth = 0
    for mark in _MARKS.finditer(text, place):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark[0], 0)
        if depth < 1:
            return mark.end() if mark[0] in "]}" else -1
        if mark[0] == '"':  # never closed
            return -1
    return -1


def _from_records(records: list[Any], rows: Rows) -> pa.Table:
    """Records of JSON as a table. A key that a record lacks is null, but some of the first that are read has it."""
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            known = isinstance(record, _Unread)
            rows.odd.append(Odd(row, "", *(record if known else ("record is not an object", _shown(record)))))
            records[row] = {}
    if rows.position == 0 and (names := list(dict.fromkeys(key for record in records for key in record))):
        rows._check_columns(names)
    cells = {column: [record.get(column) for record in records] for column in rows.columns}
    return pa.table(
        {
            column: as_json(values) if column in rows.nested else _array(values, column, rows.odd)
            for column, values in cells.items()
        }
    )


def as_json(values: Sequence[Any]) -> pa.Array:
    """Cells as JSON, null where there is nothing."""
    return pa.array([None if value is None else json.dumps(value, default=str) for value in values], pa.string())


def _array(values: list[Any], column: str, odd: list[Odd]) -> pa.Array:
    """Values of JSON as an array of one type; as strings, as in a CSV file, where they are of several."""
    try:
        array = pa.array(values)
        kind = array.type
        if pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
            return array
        if pa.types.is_floating(kind) and not any(isinstance(value, bool) for value in values):
            return array
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass  # several types, numbers over 64 bits, or half a character
    found = [_what(value) for value in values]
    odd.extend(Odd(row, column, what, _shown(values[row])) for row, what in enumerate(found) if what)
    kept = ("", BOOLEAN, FRACTION)
    return pa.array(
        [_string(value) if what in kept else None for value, what in zip(values, found, strict=True)], pa.string()
    )


def _what(value: Any) -> str:
    """What is odd about a value of JSON; empty where nothing is."""
    if isinstance(value, bool):
        return BOOLEAN
    if isinstance(value, float):
        return "" if _is_whole(value) else FRACTION
    if isinstance(value, list | dict):
        return "is a list" if isinstance(value, list) else "is an object"
    try:
        (value if isinstance(value, str) else "").encode()
    except UnicodeEncodeError as error:
        escaped = "\udc80" <= value[error.start] <= "\udcff"  # as Python decodes bytes that are none
        return "is not UTF-8" if escaped else "holds half a character (a lone surrogate)"
    return ""


def _is_whole(value: float) -> bool:
    return value.is_integer() and abs(value) < 2**63


def _string(value: Any) -> str | None:
    if isinstance(value, str | None):
        return value
    return json.dumps(int(value) if isinstance(value, float) and _is_whole(value) else value)


def _shown(value: Any) -> str:
    """How a value begins, in characters that any file can hold."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "..."
    return text[:80].encode(errors="backslashreplace").decode()[:80]


def _constant(name: str) -> float | None:
    """NaN, which is no JSON, but what Python writes for a missing value."""
    return None if name == "NaN" else float(name)


_DECODER = json.JSONDecoder(parse_constant=_constant)


def _is_array(location: Location) -> bool:
    with reading(location.url), location.open("detect") as stream:
        return bytes(stream.read(64)).removeprefix(_BOM).lstrip()[:1] == b"["


_KINDS: dict[str, type[Rows]] = {
    "parquet": _Parquet,
    "arrow": _Arrow,
    "csv": _Csv,
    "tsv": _Tsv,
    "jsonl": _JsonLines,
    "json": _JsonArray,
    "text": _Text,
}
