"""Vectors as columns of tables: a column a feature, a vector a row, or a list of them where words have vectors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bertray.annotations import Ints


def with_vectors(rows: pa.Table, encoded: Any, names: Sequence[str]) -> pa.Table:
    """Rows with their vectors as columns of those names; and where words have them, with `starts` and `stops`, where
    each word begins and ends in its text, in characters.

    Args:
        encoded: what the encoder gave them.
    """
    vectors, edges = encoded.vectors, None
    if vectors.dtype == object:
        edges = pa.array(np.cumsum([0, *map(len, vectors)]), pa.int32())
        spans = np.concatenate([np.zeros((0, 2), np.int64), *encoded.spans]).astype(np.int32)
        for name, places in (("starts", spans[:, 0]), ("stops", spans[:, 1])):
            rows = rows.append_column(name, pa.ListArray.from_arrays(edges, pa.array(places)))
        vectors = np.concatenate(vectors) if len(vectors) else np.zeros((0, len(names)), np.float16)
    for name, part in zip(names, np.split(vectors, len(names), 1), strict=True):
        flat = pa.array(np.ascontiguousarray(part).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, part.shape[1])
        rows = rows.append_column(name, column if edges is None else pa.ListArray.from_arrays(edges, column))
    return rows


def with_words(rows: pa.Table, encoded: Any, names: Sequence[str]) -> pa.Table:
    """Rows with where their words begin and end alone: their vectors are made again whenever they are wanted."""
    return with_vectors(rows, encoded, names).drop_columns(list(names))


def vectors_of(table: pa.Table, names: Sequence[str]) -> NDArray[Any]:
    """[rows or words, width] of a table's columns of those names, side by side."""
    return np.concatenate([_vectors(table[name].combine_chunks()) for name in names], 1)


def edges_of(table: pa.Table) -> Ints:
    """[rows + 1] where words have vectors: the words of row i are edges[i] to edges[i + 1]."""
    offsets = table["starts"].combine_chunks().offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]


def spans_of(table: pa.Table) -> Ints:
    """[words, 2] where each word begins and ends in its text."""
    columns = (table[name].combine_chunks().flatten().to_numpy() for name in ("starts", "stops"))
    return np.stack([column.astype(np.int64) for column in columns], 1)


def vector_columns(schema: pa.Schema) -> list[str]:
    """The columns that hold vectors."""
    return [field.name for field in schema if pa.types.is_fixed_size_list(_inner(field.type))]


def column_path(field: pa.Field) -> str:
    """How Parquet names the numbers of a column of vectors."""
    return f"{field.name}.list.element" + (".list.element" if pa.types.is_list(field.type) else "")


def _inner(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) else kind


def _vectors(column: pa.Array) -> NDArray[Any]:
    if pa.types.is_list(column.type):
        column = column.flatten()
    width = column.type.list_size
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)
