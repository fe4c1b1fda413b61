"""Sources: from what a spec names to units of rows with an id, a text or a pair, and a label.

A unit is a range of rows of one file. Where it is cut depends on that file alone, so the same file gives the
same units in every run, and new files beside it do not move them. What is not a file yet (hub data sets,
frames in memory) is written as Parquet files first. Knows nothing of encoders.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray import annotations
from bertray.errors import SourceError
from bertray.formats import BOOLEAN, FRACTION, Odd, Rows, format_of, open_rows, reading
from bertray.spec import Source
from bertray.storage import FileInfo, Location

UNIT_ROWS = 20_000
STAGED_ROWS = 100_000  # of each file that rows become which are none yet
PREVIEW = 80  # characters of a text that is set aside
_STAGED = re.compile(r"part-\d{5}-[0-9a-f]{16}\.parquet")
_UNIT_BYTES = 16 << 20
_PREVIEW_ROWS = 100
_PLACES = 3  # that a reader keeps open
_HASHED_BYTES = 64 << 20
_FAR_BYTES = 1 << 30  # up to here to ask the nodes of a cluster takes longer than to read


@dataclass(frozen=True)
class Columns:
    """The names of the columns to read; empty where there is none.

    form: what the labels are, as in `annotations`.
    """

    text: str
    text_pair: str = ""
    label: str = ""
    id: str = ""
    form: str = "name"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in (self.id, self.text, self.text_pair, self.label) if name))

    @property
    def part(self) -> str:
        """What of the texts becomes a vector."""
        return annotations.part_of(self.form)

    @property
    def nested(self) -> tuple[str, ...]:
        """Those that may hold lists: texts as lists of words, and labels that are more than a name."""
        words = (self.text,) if self.form == "tokens" else ()
        return (*words, *((self.label,) if self.form in annotations.NESTED and self.label else ()))


@dataclass(frozen=True)
class Unit:
    """Rows start to stop of one file: the grain of work, of retry and of resume.

    version: the file's size and time of change when the unit was cut; empty if nobody is to look.
    """

    url: str
    name: str
    format: str
    stamp: str
    start: int
    stop: int
    version: str = ""

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> str:
        """A file name for what is made of this unit; another file, content or range has another."""
        content = hashlib.sha256(repr((self.name, self.stamp, self.start, self.stop)).encode()).hexdigest()
        readable = "".join(c if c.isalnum() or c in ".-" else "-" for c in self.name)[-60:].lstrip("-.")
        return f"{readable}-{self.start:010d}-{content[:12]}"


@dataclass(frozen=True)
class Batch:
    """The rows of a unit.

    rows: table with id, text, label (string, null where there is none), for pairs text_pair, and where texts come as
        lists of words, those words' lengths.
    rejects: rows set aside, as table with id, reason and preview.
    """

    rows: pa.Table
    rejects: pa.Table


# Maps a function over files, as `map` does, but elsewhere.
OverNodes = Callable[[Callable[[FileInfo], Any], Sequence[FileInfo]], Iterable[Any]]


def units(
    source: Source, columns: Columns, unit_rows: int | str = "auto", over_nodes: OverNodes | None = None
) -> list[Unit]:
    """Cut the files of a source into units, in the order of the rows.

    Args:
        over_nodes: where large files are counted whose number of rows only reading them tells; None is here.

    Raises:
        SourceError: there are no files, a file is not readable or lacks a column, or there are no rows.
    """
    files = find_files(source)
    count = partial(_count, source=source, columns=columns)
    to_read = sum(file.size for file in files if file_format(file, source) != "parquet")
    with ThreadPoolExecutor(8) as pool:
        counting = over_nodes(count, files) if over_nodes and to_read > _FAR_BYTES else pool.map(count, files)
        stamps = pool.map(_stamp, files)
        known = list(zip(files, counting, stamps, strict=True))
    left = source.limit or sum(rows for _, (rows, _), _ in known)
    found = []
    for file, (rows, groups), stamp in known:
        for start, stop in cut(rows, groups, file.size, unit_rows):
            if start < left:
                stop = min(stop, left)
                found.append(Unit(file.url, file.name, file_format(file, source), stamp, start, stop, file.stamp))
        left -= min(rows, left)
    if not found:
        raise SourceError(f"{source.path} holds no rows.")
    _check_first(found[0], columns)
    return found


def looked_at_again(units: Iterable[Unit]) -> tuple[Unit, ...]:
    """The same units of files that may have been copied or touched since.

    Raises:
        SourceError: a file is gone, or its content is another.
    """
    versions: dict[str, str] = {}
    for unit in units:
        if unit.url not in versions:
            file = Location(unit.url).file()
            if not file or _stamp(file) != unit.stamp:
                raise SourceError(f"{unit.url} is gone or not what it was when it was encoded. Run the spec again.")
            versions[unit.url] = file.stamp
    return tuple(replace(unit, version=versions[unit.url]) for unit in units)


def _check_first(first: Unit, columns: Columns) -> None:
    """Mistakes in columns show before anything is started: where no row can be used, it is no matter of rows."""
    head = replace(first, stop=min(first.stop, _PREVIEW_ROWS))
    try:
        batch = Reader(columns).read(head)
    except SourceError:
        batch = Reader(columns).read(first)  # a key of JSON may occur for the first time later
    reasons = batch.rejects["reason"].to_pylist()
    odd = [row for row, reason in enumerate(reasons) if not reason.endswith(" is null")]
    if odd and not batch.rows.num_rows:
        raise SourceError(
            f"{first.url}:{odd[0] + 1}: {reasons[odd[0]]}. None of the first {len(reasons)} rows can be used: correct "
            "the file, or set data.text, data.label and so on to the columns meant."
        )


def find_files(source: Source) -> list[FileInfo]:
    """The files that a source with a path names, sorted by name."""
    location = Location(source.path)
    with reading(location.url):
        files = location.match()
    if not files:
        raise SourceError(
            f"{source.path} does not exist, or no file fits it. Check the path (relative paths start "
            "at the folder where the command is run)."
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


def file_format(file: FileInfo, source: Source) -> str:
    """The format of a file: the source's, or what the file's name tells.

    Raises:
        SourceError: neither tells one.
    """
    if source.format != "auto":
        return source.format
    if found := format_of(file.name):
        return found
    raise SourceError(f"{file.url}: the name does not tell the format. Set format to parquet, csv, jsonl or another.")


def _count(file: FileInfo, source: Source, columns: Columns) -> tuple[int, tuple[int, ...]]:
    """How many rows a file has, and behind which of them its groups end."""
    if not file.size:
        return 0, ()
    rows = open_rows(file.url, file_format(file, source), columns.names, columns.nested)
    return rows.count(), rows.groups


def _stamp(file: FileInfo) -> str:
    """What tells one content of a file from another: small local files by hash, so that a copy of them (a new
    clone, a submitted job) is the same source; others by size and time of change."""
    location = Location(file.url)
    if file.size > _HASHED_BYTES or not location.local:
        return file.stamp
    with reading(file.url):
        return location.patiently(lambda: _sha256(location.path))


def _sha256(path: str) -> str:
    with open(path, "rb") as stream:  # a piece at a time: several files are hashed at once
        return hashlib.file_digest(stream, "sha256").hexdigest()


@lru_cache(8)
def _location(url: str) -> Location:
    """Kept, since a connection to an object store costs more than a look at a file."""
    return Location(url)


def _check_unchanged(unit: Unit) -> None:
    """Raises a SourceError if a unit's file is not what it was when the unit was cut."""
    if not unit.version:
        return
    location = _location(unit.url)
    with reading(unit.url):
        now = location.file()
    # A local file may be another node's copy: its content tells.
    if now is None or (now.stamp != unit.version and _stamp(now) != unit.stamp):
        raise SourceError(f"{unit.url} has changed since this run looked at it. Run the command again.")


def cut(rows: int, groups: Sequence[int], size: int, unit_rows: int | str = "auto") -> Iterator[tuple[int, int]]:
    """The units of a file, as ranges of its rows.

    Args:
        groups: behind which rows its groups end.
        size: of the file, in bytes.
    """
    return _ranges(rows, groups, _unit_rows(rows, size) if unit_rows == "auto" else int(unit_rows))


def _unit_rows(rows: int, size: int) -> int:
    """About 16 units a file, so that small files spread over workers too, of 2,000 to 20,000 rows; fewer where those
    are more than 16 MB of the file."""
    step = min(UNIT_ROWS, max(2_000, math.ceil(rows / 16)))
    return max(1, min(step, _UNIT_BYTES * rows // max(1, size)))


def _ranges(rows: int, groups: Sequence[int], step: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `step` rows. Of groups, a large one is cut inside itself and small ones are joined."""
    if not groups:
        yield from ((start, min(start + step, rows)) for start in range(0, rows, step))
        return
    start = last = 0
    for end in groups:
        if start < last and end - start > step:
            yield start, last
            start = last
        last = end
        if end - start > step:
            size, parts = end - start, math.ceil((end - start) / step)
            yield from ((start + size * part // parts, start + size * (part + 1) // parts) for part in range(parts))
            start = end
    if start < last:
        yield start, last


class Reader:
    """Reads units. Keeps the places where it stands open, so that units in rising order read a file once, and so do a
    few such series beside each other."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._places: list[Rows] = []  # the last one used last

    def read(self, unit: Unit) -> Batch:
        """The rows of a unit.

        Raises:
            SourceError: the rows are not there any more, or a column holds what it must not.
        """
        try:
            rows = self._taken(unit)  # after an error its place in the file is not known
            table = rows.read(unit.start, unit.stop)
        except SourceError:
            _check_unchanged(unit)  # which may be why
            raise
        _check_unchanged(unit)
        self._places = [*self._places, rows][-_PLACES:]
        with reading(unit.url):
            return normalize(table, self.columns, unit, rows.odd)

    def _taken(self, unit: Unit) -> Rows:
        """The place before a unit that is nearest, which is not kept any longer; else the start of its file."""
        before = [rows for rows in self._places if rows.url == unit.url and rows.position <= unit.start]
        if not before:
            _check_unchanged(unit)
            return open_rows(unit.url, unit.format, self.columns.names, self.columns.nested)
        rows = max(before, key=lambda rows: rows.position)
        self._places.remove(rows)
        return rows


def normalize(table: pa.Table, columns: Columns, unit: Unit, odd: Sequence[Odd] = ()) -> Batch:
    """Bring the user's columns into their form: ids, texts and labels as strings, rejects apart.

    Args:
        odd: the cells of the table that are not as they should be.
    """
    derived = pa.array([f"{unit.name}:{row}" for row in range(unit.start, unit.start + table.num_rows)], pa.string())
    arrays: dict[str, Any] = {}
    reasons = [_reasons({cell.row: cell.what for cell in odd if not cell.column}, table.num_rows)]
    for role in ("text", "text_pair", "label", "id"):
        if name := getattr(columns, role):
            if name in columns.nested:
                found, wrong = _nested(table[name], role, arrays, columns.form)
                arrays |= found
            else:
                arrays[role], wrong = _values(table, role, columns, unit, odd)
            reasons.append(_reasons(wrong, table.num_rows))
            if role != "id":
                reasons.append(pc.if_else(pc.is_null(arrays[role]), f"{role} is null", pa.scalar(None, pa.string())))
    arrays["id"] = pc.coalesce(arrays["id"], derived) if columns.id else derived
    arrays.setdefault("label", pa.nulls(table.num_rows, pa.string()))
    rows = pa.table({role: arrays[role] for role in ("id", "text", "text_pair", "label", "words") if role in arrays})
    reason = pc.coalesce(*reasons)
    rejected = pc.is_valid(reason)
    shown = _reasons({cell.row: cell.shown for cell in odd if cell.column in ("", columns.text)}, table.num_rows)
    preview = pc.utf8_slice_codeunits(pc.coalesce(rows["text"], shown, ""), 0, PREVIEW)
    rejects = pa.table({"id": rows["id"], "reason": reason, "preview": preview}).filter(rejected)
    return Batch(rows.filter(pc.invert(rejected)).combine_chunks(), rejects)


def _values(
    table: pa.Table, role: str, columns: Columns, unit: Unit, odd: Sequence[Odd]
) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """The column that has a role, as strings, and the reasons why rows cannot be used for it."""
    column = getattr(columns, role)
    read, fine = (_texts, FRACTION) if role.startswith("text") else (_keys, BOOLEAN)
    values, wrong = read(table, column, unit)
    wrong |= {cell.row: cell.what for cell in odd if cell.column == column and cell.what != fine}
    return values, {row: f"{role} {what}" for row, what in wrong.items()}


def _nested(
    column: pa.ChunkedArray, role: str, arrays: Mapping[str, Any], form: str
) -> tuple[dict[str, pa.Array], dict[int, str]]:
    """Texts (and the lengths of their words) or labels from cells of JSON, and what is wrong in which rows."""
    cells = [None if cell is None else json.loads(cell) for cell in column.to_pylist()]
    values: list[Any] = [None] * len(cells)
    wrong: dict[int, str] = {}
    others = [
        arrays[name].to_pylist() if name in arrays else [None] * len(cells) for name in ("text", "words", "text_pair")
    ]
    for row, (cell, text, words, pair) in enumerate(zip(cells, *others, strict=True)):
        try:
            if cell is not None and role == "text":
                values[row] = annotations.text_of(cell)
            elif cell is not None and text is not None:
                values[row] = annotations.label_of(form, cell, text, words, pair or "")
        except annotations.Wrong as error:
            wrong[row] = f"{role} {error}"
    if role == "label":
        return {"label": pa.array(values, pa.string())}, wrong
    texts, lengths = (
        zip(*((None, None) if value is None else value for value in values), strict=True) if values else ((), ())
    )
    return {"text": pa.array(texts, pa.string()), "words": pa.array(lengths, pa.list_(pa.int32()))}, wrong


def _reasons(found: dict[int, str], rows: int) -> pa.Array:
    """What was found as a column of strings, null in all other rows."""
    return pa.array([found.get(row) for row in range(rows)], pa.string()) if found else pa.nulls(rows, pa.string())


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    column = table[name]
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _texts(table: pa.Table, name: str, unit: Unit) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """A column of texts as strings, and what is wrong in which rows."""
    column = _column(table, name)
    if _is_string(column.type) or pa.types.is_null(column.type):
        return _strings(column)
    if unit.format in ("json", "jsonl"):  # each record has its own types
        what = BOOLEAN if pa.types.is_boolean(column.type) else "is a number"
        return column.cast(pa.string()), dict.fromkeys(_places(pc.is_valid(column)), what)
    raise SourceError(f"{_place(unit)}: column {name!r} must hold strings. It holds {column.type} instead.")


def _keys(table: pa.Table, name: str, unit: Unit) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """A column of ids or labels as strings: strings, whole numbers and booleans. And what is wrong in which rows."""
    column, wrong = _column(table, name), {}
    if pa.types.is_floating(column.type):  # whole numbers beside missing ones, as pandas keeps them
        column = column.cast(pa.float64())
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2.0**63))
        wrong = dict.fromkeys(_places(pc.invert(whole)), FRACTION)
        column = pc.if_else(whole, column, None).cast(pa.int64())
    if not any(test(column.type) for test in (_is_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)):
        raise SourceError(
            f"{_place(unit)}: column {name!r} must hold strings or whole numbers. It holds {column.type} instead."
        )
    column, undecodable = _strings(column)
    if unit.format in ("csv", "tsv"):  # an empty field is an empty text, but neither an id nor a label
        column = pc.if_else(pc.equal(column, ""), None, column)
    return column, wrong | undecodable


def _strings(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """A column as strings. Parquet and Arrow files may hold bytes there that are none: those become null."""
    column = column.cast(pa.string())
    try:
        column.validate(full=True)
        return column, {}
    except pa.ArrowInvalid:
        values = [_decoded(value) for value in column.cast(pa.binary()).to_pylist()]
    wrong = [row for row, valid in enumerate(column.is_valid().to_pylist()) if valid and values[row] is None]
    return pa.chunked_array([pa.array(values, pa.string())]), dict.fromkeys(wrong, "is not UTF-8")


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _places(chosen: pa.ChunkedArray) -> list[int]:
    return pc.indices_nonzero(chosen).to_pylist()


def _place(unit: Unit) -> str:
    return f"{unit.url} (rows {unit.start} to {unit.stop})"


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def set_aside(batch: Batch, failed: Mapping[int, str]) -> Batch:
    """A batch without the rows that cannot be used, which become rejects: {row: reason}."""
    if not failed:
        return batch
    bad = sorted(failed)
    rows = batch.rows.take(bad)
    rejects = pa.table(
        {
            "id": rows["id"],
            "reason": pa.array([failed[row] for row in bad], pa.string()),
            "preview": pc.utf8_slice_codeunits(rows["text"], 0, PREVIEW),
        }
    )
    good = np.delete(np.arange(batch.rows.num_rows), bad)
    return Batch(batch.rows.take(good), pa.concat_tables([batch.rejects.cast(rejects.schema), rejects]))


def empty(texts: pa.ChunkedArray) -> int:
    """How many texts hold nothing but white space."""
    return int(pc.sum(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)).as_py() or 0)


def stage(rows: Any, columns: Columns, folder: Location) -> tuple[str, ...]:
    """Write rows that are not files yet as Parquet files into a folder, named by their content.

    Args:
        rows: a `datasets.Dataset`, a pandas frame, an Arrow table or a Ray Dataset.

    Returns:
        The label names that the rows carry themselves (`ClassLabel`), if any.
    """
    _check_names(rows, columns)
    feature = (getattr(rows, "features", None) or {}).get(columns.label)
    single = getattr(feature, "names", None)
    names = tuple(single or getattr(getattr(feature, "feature", None), "names", None) or ())  # of a list's items
    written = []
    for number, table in enumerate(_tables(rows, columns.names)):
        if single:  # numbers would be taken for names, where the names are numbers
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
        batches: Iterable[Any] = rows.select_columns(names).iter_batches(batch_size=STAGED_ROWS, batch_format="pyarrow")
    elif hasattr(rows, "with_format"):  # a datasets.Dataset
        batches = rows.select_columns(names).with_format("arrow").iter(STAGED_ROWS)
    else:
        try:
            table = rows if isinstance(rows, pa.Table) else pa.Table.from_pandas(rows[names], preserve_index=False)
        except (pa.ArrowException, ValueError) as error:  # ValueError: half characters, columns of one name
            raise SourceError(f"The rows cannot be read: {' '.join(str(error).split())}") from None
        batches = (table.slice(start, STAGED_ROWS) for start in range(0, table.num_rows, STAGED_ROWS))
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
