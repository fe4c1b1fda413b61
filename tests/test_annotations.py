"""Labels as data sets write them: each form, and what is wrong with those that are of none."""

import json

import numpy as np
import pytest

from bertray.annotations import Wrong, answers_of, label_of, names_in, tags_of, text_of, words_of

TEXT = "Ann flew to New York"
SPANS = np.array([[0, 3], [4, 8], [9, 11], [12, 15], [16, 20]])


@pytest.mark.parametrize(
    ("form", "cell", "kept"),
    [
        ("names", ["b", "a", "b"], ["a", "b"]),
        ("names", [], []),
        ("names", [2, 0], ["0", "2"]),
        ("names", "a|b", ["a", "b"]),
        ("names", '["a, b"]', ["a, b"]),
        ("names", "", []),
        ("names", "5", ["5"]),
        ("names", "5|1", ["1", "5"]),
        ("names", "true", ["true"]),
        ("tokens", [{"start": 12, "end": 20, "label": "city"}, {"start": 0, "end": 3, "type": "who"}],
         [[0, 3, "who"], [12, 20, "city"]]),
        ("tokens", "[]", []),
        ("answers", [{"text": "New York", "answer_start": 12}] * 2, [[12, "New York"]]),
        ("answers", {"text": ["New York", "Ann"], "answer_start": [12, 0]}, [[0, "Ann"], [12, "New York"]]),
        ("answers", {"text": [], "answer_start": []}, []),
        ("answers", [], []),
    ],
)  # fmt: skip
def test_labels_as_they_are_kept(form, cell, kept):
    assert json.loads(label_of(form, cell, TEXT, None, TEXT)) == kept


@pytest.mark.parametrize(("cell", "kept"), [(4, 4.0), (4.5, 4.5), ("-1e3", -1000.0), ("0.1", 0.1)])
def test_numbers(cell, kept):
    assert float(label_of("number", cell, TEXT, None)) == kept


def test_tags_of_words():
    lengths = [3, 4]
    assert json.loads(label_of("tokens", ["B-who", "O"], "Ann flew", lengths)) == ["B-who", "O"]
    assert json.loads(label_of("tokens", [1, 0], "Ann flew", lengths)) == ["1", "0"]
    assert json.loads(label_of("tokens", "B-who O", "Ann flew", lengths)) == ["B-who", "O"]
    assert json.loads(label_of("tokens", "0", "Ann", [3])) == ["0"]
    with pytest.raises(Wrong, match="has 1 tags for 2 words"):
        label_of("tokens", ["O"], "Ann flew", lengths)


@pytest.mark.parametrize(
    ("form", "cell", "what"),
    [
        ("names", 5, "is no list of labels"),
        ("names", [False], "is no list of labels"),
        ("names", '{"a": 1}', "is no list of labels"),
        ("answers", "[" * 5000, "is no list of objects"),
        ("names", [["a"]], "is no list of labels"),
        ("names", [None], "is no list of labels"),
        ("number", "four", "is no number"),
        ("number", True, "is no number"),
        ("number", float("nan"), "is no number"),
        ("number", "inf", "is no number"),
        ("number", [4], "is no number"),
        ("number", 1e39, "is no number"),  # infinite in float32, as which it would end a fit
        ("number", 10**400, "is no number"),
        ("number", "1_000", "is no number"),
        ("tokens", ["O"], "is no list of objects"),
        ("tokens", 7, "is no list of ranges"),
        ("tokens", [{"start": 0, "end": 3}], "is no list of objects"),
        ("tokens", [{"start": 3, "end": 3, "label": "x"}], "has a range from 3 to 3"),
        ("tokens", [{"start": 0, "end": 99, "label": "x"}], "in a text of 20 characters"),
        ("tokens", [{"start": "0", "end": 3, "label": "x"}], "has a range from '0'"),
        ("answers", [{"text": "York", "answer_start": 12}], "is not where answer_start says"),
        ("answers", [{"text": "", "answer_start": 0}], "is not where answer_start says"),
        ("answers", [{"text": "Ann"}], "is no list of objects with text"),
        ("answers", ["Ann"], "is no list of objects with text"),
        ("answers", "Ann", "is no list of objects with text"),
        ("answers", {"text": ["Ann"], "answer_start": []}, "has not as many answer_start as text"),
        ("names", ["\ud800"], "half a character"),
    ],
)
def test_what_is_wrong_is_told(form, cell, what):
    with pytest.raises(Wrong, match=what):
        label_of(form, cell, TEXT, None, TEXT)


def test_texts_and_lists_of_words():
    assert text_of("a b") == ("a b", None)
    assert text_of(["a", "", "bc"]) == ("a  bc", [1, 0, 2])
    assert text_of([]) == ("", [])
    np.testing.assert_array_equal(words_of([1, 0, 2]), [[0, 1], [2, 2], [3, 5]])
    assert words_of([]).shape == (0, 2)
    for cell, what in ((3, "is a number"), ({}, "is an object"), ([1], "other things than words"), ("\udfff", "half")):
        with pytest.raises(Wrong, match=what):
            text_of(cell)


@pytest.mark.parametrize(
    ("ranges", "tags"),
    [
        ([[0, 3, "who"], [12, 20, "city"]], ["B-who", "O", "O", "B-city", "I-city"]),
        ([[14, 18, "city"]], ["O", "O", "O", "B-city", "I-city"]),  # ends inside words: these count whole
        ([[0, 8, "a"], [4, 11, "b"]], ["B-a", "I-a", "B-b", "O", "O"]),  # a word belongs to the first
        ([], ["O"] * 5),
    ],
)
def test_ranges_become_tags(ranges, tags):
    assert tags_of(json.dumps(ranges), SPANS) == tags


def test_names_and_answers_of_kept_labels():
    assert list(names_in("name", "a")) == ["a"]
    assert list(names_in("names", '["a", "b"]')) == ["a", "b"]
    assert list(names_in("tokens", '["O", "B-x"]')) == ["O", "B-x"]
    assert list(names_in("number", "4.5")) == list(names_in("answers", "[]")) == []
    assert answers_of('[[3, "x"]]') == [(3, "x")]
