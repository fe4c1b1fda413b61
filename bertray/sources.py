"""Sources: from what a spec names to units of rows with an id, a text or a pair, and a label.

A unit is a range of rows of one file. Where it is cut depends on that file alone, so the same file gives the
same units in every run, and new files beside it do not move them. What is not a file yet (hub data sets,
frames in memory) is written as Parquet files first. Knows nothing of encoders.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray.errors import SourceError
from bertray.formats import FAULT, RAW, Rows, format_of, open_rows, reading
from bertray.spec import Source
from bertray.storage import FileInfo, Location

UNIT_ROWS = 20_000
_STAGED_ROWS = 100_000
_STAGED = re.compile(r"part-\d{5}-[0-9a-f]{16}\.parquet")
_PREVIEW_ROWS = 100
_HASHED_BYTES = 64 << 20
_IS_NULL = " is null"
_UNIT_BYTES = 16 << 20  # of the file, for a unit of long texts


@dataclass(frozen=True)
class Columns:
    """The names of the columns to read; empty where there is none."""

    text: str
    text_pair: str = ""
    label: str = ""
    id: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in (self.id, self.text, self.text_pair, self.label) if name))


@dataclass(frozen=True)
class Unit:
    """Rows start to stop of one file: the grain of work, of retry and of resume.

    stamp: of the file's content; version: size and time of change, as they were when the unit was cut.
    """

    url: str
    name: str
    format: str
    stamp: str
    start: int
    stop: int
    version: str = ""

    @property
    def key(self) -> str:
        """A file name for what is made of this unit; another file, content or range has another."""
        content = hashlib.sha256(repr((self.name, self.stamp, self.start, self.stop)).encode()).hexdigest()
        readable = "".join(c if c.isalnum() or c in ".-" else "-" for c in self.name)[-60:].lstrip("-.")
        return f"{readable}-{self.start:010d}-{content[:12]}"


@dataclass(frozen=True)
class Batch:
    """The rows of a unit.

    rows: table with id, text, label (string, null where there is none) and, for pairs, text_pair.
    rejects: rows set aside, as table with id, reason and preview.
    """

    rows: pa.Table
    rejects: pa.Table


def units(source: Source, columns: Columns, unit_rows: int | str = "auto") -> list[Unit]:
    """Cut the files of a source into units, in the order of the rows.

    Raises:
        SourceError: there are no files, a file is not readable or lacks a column, or there are no rows.
    """
    files = find_files(source)
    with ThreadPoolExecutor(8) as pool:
        stamps = pool.map(_stamp, files)
        groups = list(pool.map(lambda file: _groups(file, source, columns), files))
    left = source.limit or sum(map(sum, groups))
    found = []
    for file, stamp, sizes in zip(files, stamps, groups, strict=True):
        step = _unit_rows(sum(sizes), file.size) if unit_rows == "auto" else int(unit_rows)
        format = _format(file, source)
        for start, stop in _ranges(sizes, step):
            if start < left:
                found.append(Unit(file.url, file.name, format, stamp, start, min(stop, left), file.stamp))
        left -= min(sum(sizes), left)
    if not found:
        raise SourceError(f"{source.path} holds no rows.")
    _look_at(found[0], columns)
    return found


def _ranges(groups: Iterable[int], step: int) -> Iterator[tuple[int, int]]:
    """Cut rows into ranges of at most that many: each lies within a group, or holds whole groups."""
    start = end = 0
    for rows in groups:
        if end > start and end - start + rows > step:
            yield start, end
            start = end
        end += rows
        if end - start > step:  # a group of its own
            yield from ((cut, min(cut + step, end)) for cut in range(start, end, step))
            start = end
    if end > start:
        yield start, end


def _look_at(first: Unit, columns: Columns) -> None:
    """Let mistakes in columns show before anything is started."""
    head = replace(first, stop=min(first.stop, _PREVIEW_ROWS))
    try:
        batch = Reader(columns).read(head)
    except SourceError:
        batch = Reader(columns).read(first)  # a record's key may occur further down
    reasons = batch.rejects["reason"].to_pylist()
    if not batch.rows.num_rows and not any(reason.endswith(_IS_NULL) for reason in reasons):
        raise SourceError(f"{first.url}: none of its first {len(reasons)} rows can be used: {reasons[0]}.")


def looked_at_again(units: Iterable[Unit]) -> tuple[Unit, ...]:
    """The same units of files that may have been copied or touched since.

    Raises:
        SourceError: a file is gone, or its content is another.
    """
    versions: dict[str, str] = {}
    for unit in units:
        if unit.url not in versions:
            found = Location(unit.url).file()
            if not found or _stamp(found) != unit.stamp:
                raise SourceError(f"{unit.url} is gone or not what it was when it was encoded. Run the spec again.")
            versions[unit.url] = found.stamp
    return tuple(replace(unit, version=versions[unit.url]) for unit in units)


def find_files(source: Source) -> list[FileInfo]:
    """The files that a source with a path names, sorted by name."""
    with reading(source.path):
        files = Location(source.path).match()
    if not files:
        raise SourceError(
            f"{source.path} does not exist, or no file fits it, or it is a pipe or device. Check the path (relative "
            "paths start at the folder where the command is run)."
        )
    if source.format == "auto" and len(files) > 1:
        files = [file for file in files if format_of(file.name)]  # a folder may hold a README.md and the like
        formats = sorted({format_of(file.name) for file in files})
        if len(formats) != 1:
            found = (
                f"files of several formats ({', '.join(formats)})" if formats else "no file whose name tells a format"
            )
            raise SourceError(f"{source.path} holds {found}. Set format, or give a glob such as {source.path}/*.csv.")
    return files


def _format(file: FileInfo, source: Source) -> str:
    if source.format != "auto":
        return source.format
    if found := format_of(file.name):
        return found
    raise SourceError(f"{file.url}: the name does not tell the format. Set format to parquet, csv, jsonl or another.")


def _groups(file: FileInfo, source: Source, columns: Columns) -> list[int]:
    """The rows of each part of a file."""
    return open_rows(file.url, _format(file, source), columns.names).groups() if file.size else []


def _stamp(file: FileInfo) -> str:
    """What tells one content of a file from another: small local files by hash, so that a copy of them (a new
    clone, a submitted job) is the same source; others by size and time of change."""
    location = Location(file.url)
    if file.size > _HASHED_BYTES or not location.local:
        return file.stamp
    return hashlib.sha256(location.read()).hexdigest()


def _unit_rows(rows: int, size: int) -> int:
    """About 16 units a file, so that small files spread over workers too, of 2,000 to 20,000 rows; fewer if they are
    long."""
    return max(1, min(UNIT_ROWS, max(2_000, math.ceil(rows / 16)), rows * _UNIT_BYTES // max(size, 1)))


class Reader:
    """Reads units. Keeps the last file open, so that units in rising order read a file once."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._rows: Rows | None = None

    def read(self, unit: Unit) -> Batch:
        """The rows of a unit.

        Raises:
            SourceError: the rows are not there any more, or a column holds what it must not.
        """
        if self._rows is None or self._rows.url != unit.url or self._rows.position > unit.start:
            self._rows = open_rows(unit.url, unit.format, self.columns.names)
        rows, self._rows = self._rows, None  # after an error its place in the file is not known
        table = rows.read(unit.start, unit.stop)
        if unit.version and ((file := Location(unit.url).file()) is None or file.stamp != unit.version):
            raise SourceError(f"{unit.url} has changed since this run looked at it. Run the command again.")
        self._rows = rows
        return normalize(table, self.columns, unit)


def normalize(table: pa.Table, columns: Columns, unit: Unit) -> Batch:
    """Bring the user's columns into their form: ids, texts and labels as strings, rejects apart."""
    place = f"{unit.url} (rows {unit.start} to {unit.stop})"
    # An empty field of a CSV file is an empty text, but neither an id nor a label.
    none = "" if unit.format in ("csv", "tsv") else None
    reason = table[FAULT] if FAULT in table.column_names else pa.nulls(table.num_rows, pa.string())
    derived = pa.array([f"{unit.name}:{row}" for row in range(unit.start, unit.start + table.num_rows)], pa.string())
    arrays = {"id": derived}
    if columns.id:
        ids, faults = _keys(table, columns.id, place, none)
        arrays["id"], reason = pc.coalesce(ids, derived), pc.coalesce(reason, faults)
    for name in ("text", "text_pair"):
        if column := getattr(columns, name):
            arrays[name], faults = _texts(table, column, place)
            reason = pc.coalesce(reason, faults)
    arrays["label"] = pa.nulls(table.num_rows, pa.string())
    if columns.label:
        arrays["label"], faults = _keys(table, columns.label, place, none)
        reason = pc.coalesce(reason, faults)
    for name in ("text", "text_pair", "label"):
        if getattr(columns, name):
            null = pc.if_else(pc.is_null(arrays[name]), f"{name}{_IS_NULL}", pa.scalar(None, pa.string()))
            reason = pc.coalesce(reason, null)
    rows = pa.table(arrays)
    rejected = pc.is_valid(reason)
    shown = pc.coalesce(table[RAW], rows["text"], "") if RAW in table.column_names else pc.coalesce(rows["text"], "")
    preview = pc.utf8_slice_codeunits(shown, 0, 80)
    rejects = pa.table({"id": rows["id"], "reason": reason, "preview": preview}).filter(rejected)
    return Batch(rows.filter(pc.invert(rejected)).combine_chunks(), rejects)


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    column = table[name]
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _texts(table: pa.Table, name: str, place: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """A column of texts, and for each row what is wrong with it."""
    column = _column(table, name)
    if not (_is_string(column.type) or pa.types.is_null(column.type)):
        raise SourceError(f"{place}: column {name!r} must hold strings. It holds {column.type} instead.")
    return _decoded(column.cast(pa.string()), name)


def _keys(table: pa.Table, name: str, place: str, none: str | None) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """A column of ids or labels as strings: strings, whole numbers and booleans, `none` stands for null; and for each
    row what is wrong with it."""
    column = _column(table, name)
    faults = pa.nulls(len(column), pa.string())
    if pa.types.is_floating(column.type):  # whole numbers beside missing ones, as pandas keeps them
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.and_(pc.is_finite(column), pc.equal(column, pc.floor(column)))
        odd = pc.fill_null(pc.invert(whole), False)
        told = pc.binary_join_element_wise(f"{name} is ", column.cast(pa.string()), ", not a whole number", "")
        faults = pc.if_else(odd, told, faults)
        column = pc.if_else(odd, None, column).cast(pa.int64(), safe=False)
    if not any(test(column.type) for test in (_is_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)):
        raise SourceError(
            f"{place}: column {name!r} must hold strings or whole numbers. It holds {column.type} instead."
        )
    column, undecoded = _decoded(column.cast(pa.string()), name)
    faults = pc.coalesce(faults, undecoded)
    return column if none is None else pc.if_else(pc.equal(column, none), None, column), faults


def _decoded(column: pa.ChunkedArray, name: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """A column of strings, null where their bytes are not UTF-8 (Parquet does not check), and what is wrong there."""
    faults = pa.nulls(len(column), pa.string())
    try:
        column.validate(full=True)
        return column, faults
    except pa.ArrowInvalid:
        values = column.cast(pa.binary()).to_pylist()
    texts = [_decode(value) for value in values]
    wrong = [value is not None and text is None for value, text in zip(values, texts, strict=True)]
    return pa.chunked_array([pa.array(texts, pa.string())]), pc.if_else(wrong, f"{name} is not UTF-8 text", faults)


def _decode(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def stage(rows: Any, columns: Columns, folder: Location) -> tuple[str, ...]:
    """Write rows that are not files yet as Parquet files into a folder, named by their content.

    Args:
        rows: a `datasets.Dataset`, a pandas frame, an Arrow table or a Ray Dataset.

    Returns:
        The label names that the rows carry themselves (`ClassLabel`), if any.
    """
    _check_names(rows, columns)
    names = tuple(getattr((getattr(rows, "features", None) or {}).get(columns.label), "names", None) or ())
    written = []
    for number, table in enumerate(_tables(rows, columns.names)):
        if names:  # numbers would be taken for names, where the names are numbers
            classes = pc.if_else(pc.less(table[columns.label], 0), None, table[columns.label])
            place = table.column_names.index(columns.label)
            table = table.set_column(place, columns.label, pc.take(pa.array(names, pa.string()), classes))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue()
        name = f"part-{number:05d}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        written.append(name)
        if not (folder / name).exists():
            (folder / name).write(data)
    for file in folder.files():
        if file.name not in written and _STAGED.fullmatch(file.name):
            (folder / file.name).delete()  # of an earlier content
    if not written:
        raise SourceError("The rows are empty. Give at least one.")
    return names


def _check_names(rows: Any, columns: Columns) -> None:
    if not any(hasattr(rows, name) for name in ("column_names", "columns")):
        raise SourceError(f"Rows in memory must be a frame, a data set or a table. Got {type(rows).__name__} instead.")
    names = rows.column_names if hasattr(rows, "column_names") else rows.columns
    names = names() if callable(names) else names  # a Ray Dataset asks its first block
    for name in columns.names:
        if name not in names:
            raise SourceError(
                f"The rows have no column {name!r}. They have: {', '.join(map(str, names))}. "
                "Set data.text, data.label and so on to the names there."
            )


def _tables(rows: Any, names: Iterable[str]) -> Iterator[pa.Table]:
    names = list(names)
    if hasattr(rows, "iter_batches"):  # a Ray Dataset
        batches: Iterable[Any] = rows.select_columns(names).iter_batches(
            batch_size=_STAGED_ROWS, batch_format="pyarrow"
        )
    elif hasattr(rows, "with_format"):  # a datasets.Dataset
        batches = rows.select_columns(names).with_format("arrow").iter(_STAGED_ROWS)
    else:
        try:
            table = rows if isinstance(rows, pa.Table) else pa.Table.from_pandas(rows[names], preserve_index=False)
        except pa.ArrowException as error:
            raise SourceError(f"The rows cannot be read: {' '.join(map(str, error.args))}") from None
        batches = (table.slice(start, _STAGED_ROWS) for start in range(0, table.num_rows, _STAGED_ROWS))
    for batch in batches:
        yield batch.select(names).replace_schema_metadata(None)


def from_hub(source: Source) -> Any:
    """The `datasets.Dataset` of a hub source, or of a folder that `save_to_disk` wrote.

    Raises:
        SourceError: it cannot be had, or the split is missing or unknown.
    """
    import datasets

    place = source.hub or source.path
    try:
        if source.hub:
            found = datasets.load_dataset(
                source.hub, source.config or None, split=source.split or None, revision=source.revision
            )
        else:
            found = datasets.load_from_disk(source.path)
            if source.split:
                found = _slice(found, source.split)
    except Exception as error:  # the library and its loaders raise many kinds: say what they said
        raise SourceError(
            f"The data set {place} cannot be loaded: {' '.join(str(error).split())[:300]} "
            "Check name, config, split and revision, or download it first."
        ) from error
    if isinstance(found, dict):
        raise SourceError(f"{place} has several splits. Set split to one of: {', '.join(found)}.")
    return found.select(range(min(source.limit, len(found)))) if source.limit else found


def _slice(found: Any, split: str) -> Any:
    import datasets

    parts = found if isinstance(found, dict) else {split.split("[")[0]: found}
    instructions = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(d) for name, d in parts.items()})
    chosen = [parts[i.splitname].select(range(i.from_, i.to)) for i in instructions]
    return datasets.concatenate_datasets(chosen) if len(chosen) > 1 else chosen[0]


def is_saved_dataset(source: Source) -> bool:
    """Whether a path is a folder that `datasets.save_to_disk` wrote."""
    if not source.path or source.format != "auto":
        return False
    folder = Location(source.path)
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
