import tracemalloc

import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import cross_val_predict

from bertray import doubts


@pytest.mark.parametrize("seed", range(6))
def test_planted_mistakes_are_found_first(seed):
    rng = np.random.default_rng(seed)
    vectors, right = make_blobs(600, 8, centers=4, cluster_std=2.0, random_state=seed)
    flipped = rng.choice(600, 48, replace=False)
    true = right.copy()
    true[flipped] = (right[flipped] + rng.integers(1, 4, 48)) % 4
    probabilities = cross_val_predict(LinearDiscriminantAnalysis(), vectors, true, cv=3, method="predict_proba")
    rows, suggested = doubts.label_doubts(probabilities, true)
    assert len(np.intersect1d(rows[:48], flipped)) >= 45
    assert len(np.setdiff1d(rows, flipped)) <= 2
    planted = np.isin(rows, flipped)
    assert (suggested[planted] == right[rows[planted]]).mean() > 0.95


def test_label_doubts_by_hand():
    probabilities = np.array(
        [
            [0.9, 0.1, 0.0],
            [0.7, 0.3, 0.0],
            [0.3, 0.6, 0.1],  # thresholds are 0.633 and 0.4
            [0.6, 0.4, 0.0],  # nearer to 0, but not as near as its rows are
            [0.8, 0.2, 0.0],
            [0.3, 0.6, 0.1],
        ]
    )
    rows, suggested = doubts.label_doubts(probabilities, np.array([0, 0, 0, 1, 1, 1]))
    assert rows.tolist() == [4, 2]  # by 0.6 and by 0.3
    assert suggested.tolist() == [0, 1]


def test_a_label_that_is_the_most_probable_is_not_doubted():
    probabilities = np.array([[0.95, 0.05], [0.6, 0.4], [0.7, 0.3]])  # thresholds are 0.775 and 0.3
    rows, _ = doubts.label_doubts(probabilities, np.array([0, 0, 1]))  # for row 1 class 1 alone is likely
    assert len(rows) == 0


@pytest.mark.parametrize("true", [[], [1], [1, 1, 1], [0, 0, 0]])
def test_one_class_gives_no_doubts(true):
    probabilities = np.full((len(true), 3), 1 / 3, np.float32)
    rows, suggested = doubts.label_doubts(probabilities, np.array(true, int))
    assert len(rows) == len(suggested) == 0


def test_conflicts():
    texts = ["Good day", "good  DAY\n", "bad", "Bad", "good day", "e\u0301", "\u00e9", "Stra\u00dfe", "STRASSE", "bad"]
    labels = ["a", "b", "a", "a", "a", "a", "b", "b", "a", "a"]
    assert doubts.conflicts(texts, labels) == [
        {"text": "Good day", "labels": {"a": 2, "b": 1}, "rows": [0, 1, 4]},
        {"text": "e\u0301", "labels": {"a": 1, "b": 1}, "rows": [5, 6]},
        {"text": "Stra\u00dfe", "labels": {"b": 1, "a": 1}, "rows": [7, 8]},
    ]


def test_no_conflicts():
    assert doubts.conflicts([], []) == []
    assert doubts.conflicts(["a", "a", "b"], ["x", "x", "y"]) == []
    with pytest.raises(ValueError, match="shorter"):
        doubts.conflicts(["a", "b"], ["x"])


def test_overlap():
    train, test = ["One", "two", "ONE", "three"], ["four", " one", "Two", "two", "five"]
    found = doubts.overlap(iter(train), iter(test), ["a", "b", "c", "a"], ["a", "b", "b", "a", "a"], examples=2)
    assert (found.rows, found.differing) == (3, 2)
    assert found.examples == [
        {"text": " one", "row": 1, "train_row": 0, "label": "b", "train_label": "a"},
        {"text": "Two", "row": 2, "train_row": 1, "label": "b", "train_label": "b"},
    ]


def test_overlap_without_labels():
    found = doubts.overlap(["one", "\ud800", ""], ["\ud800", " ", "two"])
    assert (found.rows, found.differing) == (2, 0)
    assert found.examples[0] == {"text": "\ud800", "row": 0, "train_row": 1}


@pytest.mark.parametrize(("train", "test"), [([], ["a"]), (["a"], []), ([], []), (["a"], ["b"])])
def test_no_overlap(train, test):
    assert doubts.overlap(train, test) == doubts.Overlap(0, 0, [])


@pytest.mark.parametrize("seed", range(4))
def test_overlap_equals_sets(seed):
    rng = np.random.default_rng(seed)
    train, test = ([f"text {i}" for i in rng.integers(0, 500, 300)] for _ in range(2))
    assert doubts.overlap(train, test).rows == sum(text in set(train) for text in test)


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_equal_scikit_learn(seed):
    """More rows than are compared at once on either side."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(1_500, 6)), rng.normal(size=(1_100, 6))
    b[::20] = 3 * a[: len(b[::20])] + 0.01 * rng.normal(size=(len(b[::20]), 6))
    cosines = cosine_similarity(a, b)
    for least, most in ((0.98, 50), (0.999, 1_000), (0.9999, 10)):
        rows_a, rows_b, found = doubts.near_duplicates(a, b, least, most)
        np.testing.assert_allclose(found, np.sort(cosines[cosines >= least])[::-1][:most], atol=1e-6)
        np.testing.assert_allclose(found, cosines[rows_a, rows_b], atol=1e-6)
        assert len(set(zip(rows_a, rows_b, strict=True))) == len(found)


def test_near_duplicates_by_hand():
    a = np.array([[1, 0], [0, 0], [0, 2]], np.float16)
    b = np.array([[0, 0], [0, 5], [3, 0], [1, 1]], np.float16)
    rows_a, rows_b, cosines = doubts.near_duplicates(a, b, 0.7)
    assert list(zip(rows_a.tolist(), rows_b.tolist(), strict=True)) == [(0, 2), (2, 1), (0, 3), (2, 3)]
    assert cosines.tolist() == pytest.approx([1, 1, 0.5**0.5, 0.5**0.5])


def test_near_duplicates_of_nothing():
    some, none = np.ones((3, 2), np.float32), np.ones((0, 2), np.float32)
    for a, b, most in ((none, some, 5), (some, none, 5), (some, -some, 5), (some, some, 0)):
        assert [len(part) for part in doubts.near_duplicates(a, b, most_pairs=most)] == [0, 0, 0]


def test_near_duplicates_take_little_memory_even_if_all_rows_are_equal():
    a, b = np.ones((3_000, 16), np.float32), np.ones((1_100, 16), np.float32)
    tracemalloc.start()
    try:
        rows_a, rows_b, _ = doubts.near_duplicates(a, b)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert set(rows_a) == {0} and rows_b.tolist() == list(range(50))
