"""A survey: what a source holds, told from a bounded look at it.

Files that tell how many rows they hold (Parquet) are believed; of others, and where there are many files, rows are
estimated by the bytes that those which were looked at take. A few thousand rows from all over are kept as a sample.
Knows nothing of encoders.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bertray.errors import SourceError
from bertray.formats import compression_of, open_rows, reading, rows_in, whole_records
from bertray.sources import (
    STAGED_ROWS,
    Batch,
    Columns,
    Reader,
    Unit,
    cut,
    file_format,
    find_files,
    from_hub,
    normalize,
    stage,
)
from bertray.spec import Source
from bertray.splits import is_data_set
from bertray.storage import FileInfo, Location

SAMPLE_ROWS = 4000
_PLACES = 16  # in the source that rows of the sample come from
_FOOTERS = 64  # files that are asked how many rows they hold
_BYTES = 16 << 20  # that are read of files that do not tell
_RATIO = 8  # bytes that are unpacked for each that is read, at most
_REACH = 8 << 20  # bytes of a group of rows that are passed over, at most, on the way to a place in it
_SECONDS = 5.0  # after which no further place is looked at
_TELLING = ("parquet", "arrow")  # formats that tell how many rows there are
_ANYWHERE = ("jsonl", "text")  # a record a line: can be read from any place on


@dataclass(frozen=True)
class Survey:
    """What a source holds.

    bytes: of all its files. exact: whether rows and units were counted, and not estimated.
    parts: of each file its bytes, its units, and the parts of it that can only be read from their start on.
    sample: rows in the form that `sources.normalize` gives them; places: [rows] which of the places each is from.
    looked, rejected: rows that were read, and how many of them cannot be used.
    remote: whether it lies in an object store. format: of its files.
    how: where the sample is from.
    """

    rows: int
    exact: bool
    parts: tuple[tuple[int, int, int], ...]
    sample: pa.Table
    places: NDArray[np.int64]
    looked: int
    rejected: int
    remote: bool
    format: str
    how: str

    @property
    def bytes(self) -> int:
        return sum(size for size, _, _ in self.parts)

    @property
    def units(self) -> int:
        return sum(units for _, units, _ in self.parts)

    def read_bytes(self, workers: int) -> int:
        """Bytes that so many workers read in all: each passes over what others encode of a part that it needs."""
        return sum(size * min(workers, math.ceil(units / blocks)) for size, units, blocks in self.parts)

    def counted_bytes(self, tasks: int) -> float:
        """Bytes that each of so many tasks at once reads before units can be cut: all of files that have to be read to
        know how many rows they hold. A file is read by one of them."""
        if self.format == "parquet":
            return 0.0
        sizes = [size for size, _, _ in self.parts]
        return max(self.bytes / min(tasks, len(sizes)), max(sizes))

    def opened(self, workers: int) -> int:
        """How often a file is opened by some worker."""
        return sum(min(workers, units) for _, units, _ in self.parts)


@dataclass(frozen=True)
class _Look:
    """What a look at a file tells: its rows, whether they were counted, its groups, and pieces of it."""

    rows: int
    exact: bool
    groups: tuple[int, ...] = ()
    batches: tuple[Batch, ...] = ()


@dataclass(frozen=True)
class _Piece(Location):
    """Some bytes of a file in place of the file."""

    data: bytes = b""

    def open(self, compression: str | None = None) -> Any:
        return pa.BufferReader(self.data)


def survey(name: str, source: Source, columns: Columns, unit_rows: int | str = "auto") -> Survey:
    """Look at the source of a split.

    Raises:
        SourceError: it cannot be read, holds no rows, or none of those that were looked at can be used.
        SpecError: the source asks for what files have not.
    """
    if is_data_set(name, source):
        return _of_data_set(source, columns, unit_rows)
    return _of_files(source, columns, unit_rows)


def _of_files(source: Source, columns: Columns, unit_rows: int | str) -> Survey:
    ends = time.monotonic() + _SECONDS
    files = [file for file in find_files(source) if file.size]
    if not files:
        raise SourceError(f"{source.path} holds no rows.")
    kind = file_format(files[0], source)
    telling = kind in _TELLING
    chosen = _chosen(files, _FOOTERS if telling else _PLACES, source.limit)
    if telling:
        with ThreadPoolExecutor(8) as pool:
            looks = list(pool.map(lambda file: _counted(file, kind, columns), chosen))
    else:
        looks = list(_read(chosen, kind, columns, source.limit, ends))
        chosen = chosen[: len(looks)]
    rows, parts = _parts(files, dict(zip([file.url for file in chosen], looks, strict=True)), source.limit, unit_rows)
    if not rows:
        raise SourceError(f"{source.path} holds no rows.")
    if telling:
        batches = list(_at_places(chosen, looks, kind, columns, rows, ends))
        weights = [1.0] * len(batches)
    else:
        batches = [batch for look in looks for batch in look.batches]
        weights = [look.rows * share for look in looks for share in _shares(look.batches)]
    exact = len(chosen) == len(files) and all(look.exact for look in looks)
    how = _how(len(files), len(chosen), len(batches), exact and not telling)
    if not exact and not telling and (kind not in _ANYWHERE or compression_of(files[0].name)):
        how += ", at the beginning of each"
    return Survey(rows, exact, parts, *_sampled(batches, weights, source), not Location(files[0].url).local, kind, how)


def _how(files: int, looked_at: int, places: int, whole: bool) -> str:
    """Where a sample is from, in words."""
    of_files = f"{files:,} file{'s' * (files > 1)}"
    if whole:
        return f"spread over all rows of {of_files}"
    among = of_files if looked_at == files else f"{looked_at} of {of_files}"
    return f"from {places} place{'s' * (places > 1)} in {among}"


def _chosen(files: list[FileInfo], most: int, limit: int) -> list[FileInfo]:
    """As many files as that, evenly spread over the bytes of all; the first ones where only the first rows count."""
    if len(files) <= most or limit:
        return files[:most]
    ends = np.cumsum([file.size for file in files])
    middles = (np.arange(most) + 0.5) * ends[-1] / most
    return [files[place] for place in np.unique(np.searchsorted(ends, middles, side="right"))]


def _parts(
    files: Sequence[FileInfo], looks: dict[str, _Look], limit: int, unit_rows: int | str
) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    """The rows of all files, and their parts, as `Survey` has them; of files that were not looked at by their size."""
    seen = [(file.size, looks[file.url]) for file in files if file.url in looks]
    size = sum(size for size, _ in seen)
    density = sum(look.rows for _, look in seen) / size
    blocks = sum(len(look.groups) for _, look in seen) / size
    parts, rows = [], 0
    for file in files:
        look = looks.get(file.url) or _Look(round(file.size * density), False)
        own = min(look.rows, limit - rows) if limit else look.rows
        if own > 0:
            ranges = sum(start < own for start, _ in cut(look.rows, look.groups, file.size, unit_rows))
            count = len(look.groups) if file.url in looks else round(file.size * blocks)
            used = math.ceil(file.size * own / max(1, look.rows))
            parts.append((used, ranges, max(1, min(ranges, count))))
            rows += own
    return rows, tuple(parts)


def _shares(batches: Sequence[Batch]) -> list[float]:
    """The share of a file's rows that each of its pieces stands for: those in it, of pieces of equal size."""
    counts = [batch.rows.num_rows for batch in batches]
    return [count / max(1, sum(counts)) for count in counts]


def _sampled(
    batches: Sequence[Batch], weights: Sequence[float], source: Source
) -> tuple[pa.Table, NDArray[np.int64], int, int]:
    """The sample from what was read at each place, the place of each row, how many rows were read, and rejected.

    Args:
        weights: how many rows of the source each place stands for.

    Raises:
        SourceError: none of them can be used.
    """
    kept = []
    for batch, weight in zip(batches, weights, strict=True):
        count = min(batch.rows.num_rows, math.ceil(SAMPLE_ROWS * weight / max(1e-9, sum(weights))))
        picked = np.unique(np.linspace(0, batch.rows.num_rows - 1, count).astype(int))
        kept.append(batch.rows.take(picked) if count else None)
    tables = [table for table in kept if table is not None]
    rejected = sum(batch.rejects.num_rows for batch in batches)
    if not tables:
        reason = next((batch.rejects["reason"][0] for batch in batches if batch.rejects.num_rows), "nothing was read")
        raise SourceError(f"{source.path or source.hub}: none of the {rejected} rows looked at can be used: {reason}.")
    sample = pa.concat_tables(tables).combine_chunks()
    places = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    looked = sum(batch.rows.num_rows for batch in batches) + rejected
    return sample, places, looked, rejected


def _spread(length: int, count: int) -> NDArray[np.int64]:
    """So many places on a length, one somewhere in each part of equal size: what comes again and again, such as the
    beginnings of equal files, must not be met each time."""
    return ((np.arange(count) + np.random.default_rng(0).random(count)) * length / count).astype(np.int64)


# --- files that tell how many rows they hold --------------------------------------------------------------


def _counted(file: FileInfo, kind: str, columns: Columns) -> _Look:
    rows = open_rows(file.url, kind, columns.names, columns.nested)
    groups = rows.groups
    return _Look(rows.count(), True, groups)


def _at_places(
    files: Sequence[FileInfo], looks: Sequence[_Look], kind: str, columns: Columns, rows: int, ends: float
) -> Iterator[Batch]:
    """What lies at places spread evenly over the rows of files."""
    edges = np.cumsum([0, *(look.rows for look in looks)])
    total = min(int(edges[-1]), rows)
    bytes_a_row = sum(file.size for file in files) / max(1, int(edges[-1]))
    whole = total <= SAMPLE_ROWS and total * bytes_a_row <= _BYTES
    each = max(1, min(math.ceil(SAMPLE_ROWS / _PLACES), int(_BYTES / _PLACES / bytes_a_row)))
    starts = edges[:-1][np.diff(edges) > 0] if whole else _spread(total - each, _PLACES)
    starts = starts[starts < total]
    reader = Reader(columns)
    for number in sorted(range(len(starts)), key=lambda i: (i % 4, i)):  # if time ends, what is missing is spread too
        file = int(np.searchsorted(edges, starts[number], side="right")) - 1
        look, local = looks[file], int(starts[number] - edges[file])
        own = min(look.rows, total - int(edges[file]))
        part = math.ceil(
            own / math.ceil(own / each)
        )  # files in equal parts: no row is met more often for where it lies
        begin = 0 if whole else _reachable(local - local % part, look, files[file].size)
        end = look.rows if whole else begin + part
        yield reader.read(Unit(files[file].url, files[file].name, kind, "", begin, min(end, own)))
        if time.monotonic() > ends:
            return


def _reachable(row: int, look: _Look, size: int) -> int:
    """A row's place, or in large groups one nearer to the group's start: what lies between has to be decoded."""
    behind = next((end for end in look.groups if end > row), look.rows)
    start = max((end for end in look.groups if end <= row), default=0)
    reach = max(SAMPLE_ROWS, _REACH * look.rows // size)
    return row if behind - start <= reach else start + (row - start) * reach // (behind - start)


# --- files that do not ------------------------------------------------------------------------------------


def _read(files: Sequence[FileInfo], kind: str, columns: Columns, limit: int, ends: float) -> Iterator[_Look]:
    """What pieces of files tell."""
    rows = 0
    for file in files:
        look = _look(file, kind, columns, limit, _BYTES // len(files), _PLACES // len(files))
        if limit:
            look = replace(look, batches=tuple(replace(b, rows=b.rows.slice(0, limit - rows)) for b in look.batches))
        yield look
        rows += look.rows
        if (limit and rows >= limit) or time.monotonic() > ends:
            return


def _look(file: FileInfo, kind: str, columns: Columns, limit: int, size: int, places: int) -> _Look:
    packed = compression_of(file.name)
    with reading(file.url):
        if packed or kind not in _ANYWHERE or file.size <= size or limit or places < 2:
            pieces = [_head(file, kind, size, packed)]
        else:
            starts = _spread(file.size - size // places, places).tolist()
            pieces = [_lines(file, start, size // places) for start in starts]
    batches = [_parsed(file, kind, data, columns) for data, _ in pieces]
    rows = sum(batch.rows.num_rows + batch.rejects.num_rows for batch in batches)
    taken = sum(taken for _, taken in pieces)
    if not rows and taken < file.size:
        raise SourceError(f"{file.url}: no record ends within its first {size >> 20} MB, so rows cannot be estimated.")
    return _Look(round(rows * file.size / taken), taken == file.size, (), tuple(batches))


def _head(file: FileInfo, kind: str, size: int, packed: str) -> tuple[bytes, int]:
    """The whole records among a file's first bytes, unpacked, and how many bytes of the file they take."""
    raw = _bytes(file, 0, size)
    whole = len(raw) == file.size
    data, taken = _unpacked(raw, packed, None if whole else _RATIO * size) if packed else (raw, len(raw))
    if whole:
        return data, file.size
    kept = whole_records(data, kind)
    return kept, taken * len(kept) // max(1, len(data))


def _unpacked(raw: bytes, packed: str, most: int | None) -> tuple[bytes, int]:
    """What the beginning of a packed file holds, up to about so many bytes, and how many of the file's that takes."""
    source, parts, count = pa.BufferReader(raw), [], 0
    stream = pa.CompressedInputStream(source, packed)
    try:
        while (most is None or count < most) and (part := stream.read(1 << 16)):
            parts.append(part)
            count += len(part)
    except OSError:  # the end is missing
        if most is None:
            raise
    return b"".join(parts), source.tell()


def _lines(file: FileInfo, start: int, size: int) -> tuple[bytes, int]:
    """The whole lines among the bytes of a file from some place on, and how many bytes they are."""
    data = _bytes(file, start, size)
    if start:
        data = data[data.find(b"\n") + 1 :]
    kept = whole_records(data, "text")
    return kept, len(kept)


def _bytes(file: FileInfo, start: int, size: int) -> bytes:
    """So many bytes of a file, fewer at its end."""
    location = Location(file.url)

    def read() -> bytes:
        with location.open_random() as raw:
            raw.seek(start)
            return bytes(raw.read(size))

    return location.patiently(read)


def _parsed(file: FileInfo, kind: str, data: bytes, columns: Columns) -> Batch:
    piece = _Piece(file.url, data)
    count = rows_in(piece, kind, columns.names, columns.nested).count()
    rows = rows_in(piece, kind, columns.names, columns.nested)
    table = rows.read(0, count)
    with reading(file.url):
        return normalize(table, columns, Unit(file.url, file.name, kind, "", 0, count), rows.odd)


# --- data sets that are no files yet ----------------------------------------------------------------------


def _of_data_set(source: Source, columns: Columns, unit_rows: int | str) -> Survey:
    rows = from_hub(source)
    total = len(rows)
    picked = rows.select(np.unique(np.linspace(0, total - 1, min(total, SAMPLE_ROWS)).astype(int)).tolist())
    with tempfile.TemporaryDirectory(prefix="bertray-") as folder:
        stage(picked, columns, Location(folder))
        found = _of_files(Source(path=folder, format="parquet"), columns, unit_rows)
    parts = []
    for start in range(0, total, STAGED_ROWS):
        own = min(STAGED_ROWS, total - start)
        size = found.bytes * own // len(picked)
        parts.append((size, sum(1 for _ in cut(own, (own,), size, unit_rows)), 1))
    places = np.arange(found.sample.num_rows) * _PLACES // found.sample.num_rows
    how = f"{len(picked):,} rows spread evenly over the data set"
    return replace(found, rows=total, exact=True, parts=tuple(parts), places=places, how=how)
