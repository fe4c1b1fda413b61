"""From what a head gives to labels, numbers, entities and spans, against values made by hand."""

import json

import numpy as np
import pyarrow as pa
import pytest
from handmade import bundle

from bertray import answers
from bertray.features import related, with_surroundings
from bertray.heads import LinearHead

EVEN = tuple(np.log(np.full(3, 1 / 3)))


WORDS = bundle("token-classification", labels=("B-x", "I-x", "O"))
ASKED = bundle("question-answering", labels=("start", "end"), pair="context", lengths=EVEN)


def lists(found):
    return {name: column.to_pylist() for name, column in found.items()}


def test_one_label_of_several():
    p = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]], np.float32)
    found = lists(answers.columns(bundle(threshold=0.6), np.log(p), ["x", "y"]))
    assert found["predicted"] == ["a", None]  # the second is not sure enough
    assert found["score"] == pytest.approx([0.7, 0.5])
    np.testing.assert_allclose(found["probabilities"], p, atol=1e-6)
    assert lists(answers.columns(bundle(), np.log(p), ["x", "y"]))["predicted"] == ["a", "b"]


def test_any_number_of_labels():
    found = lists(answers.columns(bundle(problem="multi_label"), np.array([[2.0, -1, 0.1], [-1, -1, -1]]), ["x", "y"]))
    assert found["predicted"] == [["a", "c"], []]
    np.testing.assert_allclose(found["probabilities"][0], 1 / (1 + np.exp([-2, 1, -0.1])), atol=1e-6)


def test_numbers():
    found = answers.columns(
        bundle(problem="regression", labels=("n",)), np.array([[1.5], [-2]], np.float32), ["x", "y"]
    )
    assert lists(found) == {"predicted": [1.5, -2.0]}


def test_entities_in_their_texts():
    texts = ["Ann met Bo Lee", "", "no"]
    spans = np.array([[0, 3], [4, 7], [8, 10], [11, 14], [0, 2]])
    edges = np.array([0, 4, 4, 5])
    best = [0, 2, 0, 1, 2]
    given = np.zeros((5, 3), np.float32)
    given[np.arange(5), best] = np.log(8.0)  # a probability of 0.8
    found = lists(answers.columns(WORDS, given, texts, None, edges, spans))
    assert found["tags"] == [["B-x", "O", "B-x", "I-x"], [], ["O"]]
    assert found["predicted"][1:] == [[], []]
    assert [(e["label"], e["start"], e["stop"], e["text"]) for e in found["predicted"][0]] == [
        ("x", 0, 3, "Ann"),
        ("x", 8, 14, "Bo Lee"),
    ]
    assert [e["score"] for e in found["predicted"][0]] == pytest.approx([0.8, 0.8])


def test_answers_in_their_contexts():
    contexts = ["to Oslo by bus", "to Oslo by bus"]
    spans = np.array([[0, 0], [0, 2], [3, 7], [8, 10], [11, 14]] * 2)
    given = np.zeros((10, 2), np.float32)
    given[2, 0] = given[3, 1] = 6
    given[5] = 6
    found = lists(
        answers.columns(
            bundle("question-answering", labels=("start", "end"), pair="c", lengths=EVEN, threshold=0.0),
            given, ["q", "q"], contexts, np.array([0, 5, 10]), spans,
        )
    )  # fmt: skip
    assert found["predicted"] == ["Oslo by", ""]
    assert (found["start"], found["stop"]) == ([3, 0], [10, 0])
    always = bundle("question-answering", labels=("start", "end"), pair="c", lengths=EVEN, threshold=1e9)
    found = lists(answers.columns(always, given, ["q", "q"], contexts, np.array([0, 5, 10]), spans))
    assert found["predicted"][1] != ""


def test_what_a_head_sees_of_questions():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(9, 4)).astype(np.float32)
    vectors[3] = 0  # cut off
    edges, spans = np.array([0, 5, 9]), np.arange(18).reshape(9, 2)
    head = LinearHead(rng.normal(size=(2, 12)).astype(np.float32), np.zeros(2, np.float32))
    asked = bundle("question-answering", labels=("start", "end"), pair="c", head=head, features=("mean_5", "mean_6"))
    given, inner, places = answers.logits(asked, vectors, edges, spans)
    assert inner.tolist() == [0, 4, 7]
    np.testing.assert_array_equal(places, spans[[1, 2, 3, 4, 6, 7, 8]])
    around = with_surroundings(vectors.reshape(9, 2, 2), edges)[:, 2:].reshape(9, 4)
    tokens, owners = [1, 2, 3, 4, 6, 7, 8], [0, 0, 0, 0, 5, 5, 5]
    expected = head.logits(related(vectors[tokens], vectors[owners], around[tokens]))
    expected[2] = -np.inf
    np.testing.assert_allclose(given, expected, atol=1e-5)


@pytest.mark.parametrize("made", [bundle(), bundle(problem="multi_label"), WORDS, ASKED])
def test_no_rows_at_all(made):
    head = LinearHead(np.zeros((len(made.labels), 12 if made is ASKED else 4), np.float32), np.zeros(len(made.labels)))
    made = bundle(made.task, made.problem, made.labels, pair=made.columns["text_pair"], head=head, lengths=EVEN)
    words = made.task != "text-classification"
    edges, spans = (np.zeros(1, np.int64), np.zeros((0, 2), np.int64)) if words else (None, None)
    given, edges, spans = answers.logits(made, np.zeros((0, 4), np.float16), edges, spans)
    found = answers.columns(made, given, [], [], edges, spans)
    assert all(len(column) == 0 for column in found.values())
    assert pa.table(found).num_rows == 0


def test_losses():
    given = np.array([[1.0, 0, -1], [0, 0, 0]], np.float32)
    p = np.exp(given) / np.exp(given).sum(1, keepdims=True)
    np.testing.assert_allclose(
        answers.losses(bundle(), given, np.array([2, 0]), None), -np.log(p[[0, 1], [2, 0]]), atol=1e-6
    )
    truth = np.array([[1, 0, 1], [0, 0, 0]], np.float32)
    q = 1 / (1 + np.exp(-given.astype(float)))
    expected = -(truth * np.log(q) + (1 - truth) * np.log(1 - q)).sum(1)
    np.testing.assert_allclose(answers.losses(bundle(problem="multi_label"), given, truth, None), expected, atol=1e-6)
    squared = answers.losses(bundle(problem="regression"), given[:, :1], np.array([[3.0], [1]]), None)
    np.testing.assert_allclose(squared, [2, 0.5])
    words = answers.losses(WORDS, given, np.array([2, 0]), np.array([0, 0, 2]))
    np.testing.assert_allclose(words, [0, -np.log(p[[0, 1], [2, 0]]).mean()], atol=1e-6)


def test_the_loss_of_questions():
    given = np.array([[0, 1], [2, 0], [-np.inf, -np.inf], [0, 0]], np.float32)
    truth = np.array([[0, 0.5], [1, 0.5], [0, 0], [1, 1]], np.float32)
    start, end = (np.exp(given[:3, i]) / np.exp(given[:3, i]).sum() for i in (0, 1))
    expected = -(np.log(start[1]) + 0.5 * np.log(end[0]) + 0.5 * np.log(end[1])) / 2
    np.testing.assert_allclose(answers.losses(ASKED, given, truth, np.array([0, 3, 4])), [expected, 0], atol=1e-6)


def test_answers_as_people_read_them():
    assert answers.shown("tokens", json.dumps(["B-x", "I-x", "O"]), "Bo Lee ran") == "Bo Lee (x)"
    assert answers.shown("tokens", json.dumps(["O"]), "ran") == "none"
    assert answers.shown("answers", '[[0, "Bo"], [3, "Lee"]]', "Bo Lee") == "Bo / Lee"
    assert answers.shown("answers", "[]", "Bo Lee") == "no answer"
    assert answers.shown("names", '["a", "b"]', "") == "a, b"
    assert answers.shown("number", "4.5", "") == "4.5"
    for given, expected in ((["a", "b"], "a, b"), ([], "none"), (1.23456, "1.235"), ("", "no answer"), ("a", "a")):
        assert answers.told(given) == expected
    assert answers.told([{"text": "Bo", "label": "x"}]) == "Bo (x)"
