"""Vectors as columns of tables, and back."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import ragged, words_of

from bertray.vectors import column_path, edges_of, spans_of, vector_columns, vectors_of, with_vectors, with_words

NAMES = ["mean_5", "cls_6"]


def texts(dtype=np.float16):
    vectors = np.random.default_rng(0).normal(size=(5, 6)).astype(dtype)
    return vectors, with_vectors(pa.table({"text": list("abcde")}), SimpleNamespace(vectors=vectors), NAMES)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_column_a_feature(dtype):
    vectors, table = texts(dtype)
    assert table.column_names == ["text", *NAMES]
    assert vector_columns(table.schema) == NAMES
    np.testing.assert_array_equal(vectors_of(table, NAMES), vectors)
    np.testing.assert_array_equal(vectors_of(table, NAMES[1:]), vectors[:, 3:])
    np.testing.assert_array_equal(vectors_of(table, NAMES[::-1]), np.hstack([vectors[:, 3:], vectors[:, :3]]))
    assert vectors_of(table, NAMES).dtype == dtype


@pytest.mark.parametrize("words", [False, True])
def test_the_columns_of_a_file(tmp_path, words):
    """They come back as they were, also in part, and Parquet knows them by the names that are told."""
    if words:
        vectors, spans = words_of([2, 0, 3, 0], 6)
        table = with_vectors(pa.table({"id": list("abcd")}), SimpleNamespace(vectors=vectors, spans=spans), NAMES)
        flat = np.concatenate(vectors)
    else:
        flat, table = texts()
    pq.write_table(table, tmp_path / "x.parquet")
    names = [pq.read_metadata(tmp_path / "x.parquet").schema.column(i).path for i in range(len(table.schema))]
    assert [column_path(table.schema.field(name)) for name in NAMES] == names[-2:]
    back = pq.read_table(tmp_path / "x.parquet")
    np.testing.assert_array_equal(vectors_of(back, NAMES), flat)
    assert back.equals(table)


def test_words_are_lists_with_where_they_are():
    vectors, spans = words_of([3, 0, 1, 2], 6)
    table = with_vectors(pa.table({"text": list("abcd")}), SimpleNamespace(vectors=vectors, spans=spans), NAMES)
    assert table.column_names == ["text", "starts", "stops", *NAMES]
    assert vector_columns(table.schema) == NAMES
    np.testing.assert_array_equal(vectors_of(table, NAMES), np.concatenate(vectors))
    np.testing.assert_array_equal(spans_of(table), np.concatenate(spans))
    assert edges_of(table).tolist() == [0, 3, 3, 4, 6]
    for part, first, last in ((table.slice(1, 2), 1, 3), (table.slice(3), 3, 4), (table.slice(1, 1), 1, 2)):
        own = vectors[first:last]
        assert edges_of(part).tolist() == np.cumsum([0, *map(len, own)]).tolist()
        np.testing.assert_array_equal(vectors_of(part, NAMES), np.concatenate(own))
        np.testing.assert_array_equal(spans_of(part), np.concatenate(spans[first:last]))
    taken = table.take([3, 1, 0])
    assert edges_of(taken).tolist() == [0, 2, 2, 5]
    np.testing.assert_array_equal(vectors_of(taken, NAMES), np.concatenate([vectors[3], vectors[0]]))
    joined = pa.concat_tables([table.slice(2), table])
    assert edges_of(joined).tolist() == [0, 1, 3, 6, 6, 7, 9]
    np.testing.assert_array_equal(vectors_of(joined, NAMES), np.concatenate([*vectors[2:], *vectors]))


def test_texts_without_a_word():
    vectors, spans = words_of([0, 0], 6)
    table = with_vectors(pa.table({"text": ["", " "]}), SimpleNamespace(vectors=vectors, spans=spans), NAMES)
    assert vectors_of(table, NAMES).shape == (0, 6)
    assert edges_of(table).tolist() == [0, 0, 0]
    nothing = SimpleNamespace(vectors=ragged([]), spans=ragged([]))
    assert with_vectors(pa.table({"text": pa.array([], pa.string())}), nothing, NAMES).num_rows == 0


def test_where_words_are_alone():
    vectors, spans = words_of([3, 1], 6)
    table = with_words(pa.table({"text": list("ab")}), SimpleNamespace(vectors=vectors, spans=spans), NAMES)
    assert table.column_names == ["text", "starts", "stops"]
    np.testing.assert_array_equal(spans_of(table), np.concatenate(spans))
