"""Metrics of each form against scikit-learn, or values made by hand, and the predictions that are written."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from handmade import bundle, store_of, words_of
from scipy import stats
from sklearn import metrics as sk

from bertray import metrics, ood
from bertray.evaluate import evaluate
from bertray.heads import LinearHead, probabilities
from bertray.storage import Location

NAMES = {"a": 0, "b": 1, "c": 2}
SHARDS = (10, 10, 37)


def judged(folder, made, store, classes=NAMES, **more):
    file = folder / "predictions.parquet"
    found = evaluate(store, made, classes, Location(str(file)), **more)
    return found, pq.read_table(file).to_pylist()


def head_of(outputs, width, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(0, scale, (outputs, width)), rng.normal(0, 0.1, outputs)
    return LinearHead(weight.astype(np.float32), bias.astype(np.float32))


def texts_of(folder, labels, width=4, seed=1, **more):
    vectors = np.random.default_rng(seed).normal(size=(len(labels), width)).astype(np.float32)
    rows = {"text": [f"text {i}" for i in range(len(labels))], "label": labels, **more}
    return store_of(folder / "store", rows, vectors, shards=SHARDS), vectors


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_one_label(tmp_path, threshold):
    y = np.random.default_rng(0).integers(0, 3, 60)
    store, x = texts_of(tmp_path, [list(NAMES)[i] for i in y])
    made = bundle(head=head_of(3, 4), threshold=threshold)
    found, rows = judged(tmp_path, made, store)
    p = probabilities("softmax", made.head.logits(x))
    given = p.argmax(1)
    expected = {
        "accuracy": sk.accuracy_score(y, given),
        "macro_f1": sk.f1_score(y, given, average="macro"),
        "auroc": sk.roc_auc_score(y, p.astype(float) / p.sum(1, keepdims=True, dtype=float), multi_class="ovr"),
        "loss": sk.log_loss(y, p.astype(float) / p.sum(1, keepdims=True, dtype=float)),
        "rows": 60,
    }
    if threshold:
        sure = p.max(1) >= threshold
        expected |= {"coverage": sure.mean(), "accuracy_answered": (given == y)[sure].mean()}
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert 0 <= found.metrics["ece"] <= 1
    low, high = found.intervals["accuracy"]
    assert low < expected["accuracy"] < high
    assert found.details["confusion"] == sk.confusion_matrix(y, given).tolist()
    assert [row["text"] for row in rows] == [f"text {i}" for i in range(60)]
    names = [list(NAMES)[i] if p[row].max() >= threshold else None for row, i in enumerate(given)]
    assert [row["predicted"] for row in rows] == names
    np.testing.assert_allclose([row["loss"] for row in rows], -np.log(p[np.arange(60), y]), atol=1e-5)
    worst = found.details["worst"]
    losses = [row["loss"] for row in rows if row["label"] != row["predicted"]]
    assert [row["loss"] for row in worst] == sorted(losses, reverse=True)[:20]
    assert all(row["label"] != row["predicted"] for row in worst)


@pytest.mark.parametrize("apart", [False, True])
def test_the_share_of_rows_unlike_the_training_rows(tmp_path, apart):
    """Of pairs encoded apart, in what a head sees of both."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 4)).astype(np.float32)
    vectors[[3, 50]] += 40
    rows, more = {"text": list(map(str, range(60))), "label": ["a", "b", "c"] * 20}, {}
    seen = vectors
    if apart:
        first, second = rng.permutation(60), rng.permutation(60)
        u, v = vectors[first], vectors[second]
        seen = np.hstack([u, v, abs(u - v), u * v])
        more["texts"] = store_of(tmp_path / "texts", {"text": rows["text"]}, vectors)
        store = store_of(
            tmp_path / "store", rows | {"text_pair": rows["text"], "first": first, "second": second}, 0, ()
        )
    else:
        store = store_of(tmp_path / "store", rows, vectors, shards=SHARDS)
    known = ood.fit(rng.normal(size=(400, seen.shape[1])), np.zeros(400, np.int64))
    expected = (known.distance(seen) > known.threshold).mean()
    assert 2 / 60 <= expected < 1
    made = bundle(
        head=head_of(3, seen.shape[1]), ood=known, **({"pair": "b", "encoder": {"pair": "siamese"}} if apart else {})
    )
    assert judged(tmp_path, made, store, **more)[0].metrics["outliers"] == pytest.approx(expected)
    assert "outliers" not in judged(tmp_path, replace(made, ood=None), store, **more)[0].metrics


def test_any_number_of_labels(tmp_path):
    truth = np.random.default_rng(0).random((60, 3)) < 0.4
    store, x = texts_of(tmp_path, [json.dumps([n for n, has in zip(NAMES, row, strict=True) if has]) for row in truth])
    made = bundle(problem="multi_label", head=head_of(3, 4))
    found, rows = judged(tmp_path, made, store)
    z = made.head.logits(x)
    expected = {
        "exact": sk.accuracy_score(truth, z > 0),
        "micro_f1": sk.f1_score(truth, z > 0, average="micro"),
        "macro_f1": sk.f1_score(truth, z > 0, average="macro"),
        "auroc": sk.roc_auc_score(truth, z, average="macro"),
        "rows": 60,
    }
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert [row["label"] for row in rows] == [[n for n, has in zip(NAMES, t, strict=True) if has] for t in truth]
    assert [row["predicted"] for row in rows] == [[n for n, has in zip(NAMES, t, strict=True) if has] for t in z > 0]
    assert [row["f1"] for row in found.details["per_class"]] == pytest.approx(sk.f1_score(truth, z > 0, average=None))


def test_numbers(tmp_path):
    y = np.random.default_rng(0).normal(size=60)
    store, x = texts_of(tmp_path, list(map(repr, y.tolist())))
    made = bundle(problem="regression", labels=("n",), head=head_of(1, 4))
    found, rows = judged(tmp_path, made, store, {})
    given = made.head.logits(x)[:, 0].astype(float)
    expected = {
        "pearson": stats.pearsonr(y, given)[0],
        "spearman": stats.spearmanr(y, given)[0],
        "rmse": sk.root_mean_squared_error(y, given),
        "mae": sk.mean_absolute_error(y, given),
        "r2": sk.r2_score(y, given),
    }
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose([row["predicted"] for row in rows], given, atol=1e-5)
    np.testing.assert_allclose(found.details["scatter"]["true"], y, atol=1e-5)


TAGS = ("B-x", "I-x", "B-y", "O")


@pytest.mark.parametrize("numbered", [False, True])
def test_words(tmp_path, numbered):
    """Tags may be written as numbers: what is told of them is their names."""
    counts = [4, 0, 6, 1, 9, 3] * 10
    vectors, spans = words_of(counts, 4)
    rng = np.random.default_rng(3)
    true = [[TAGS[i] for i in rng.choice(4, count, p=[0.2, 0.1, 0.1, 0.6])] for count in counts]
    classes = {str(i) if numbered else tag: i for i, tag in enumerate(TAGS)}
    labels = [json.dumps([str(TAGS.index(tag)) if numbered else tag for tag in own]) for own in true]
    rows = {"text": [" ".join("x" * count) for count in counts], "label": labels}
    store = store_of(tmp_path / "store", rows, vectors, ("first_6",), spans, SHARDS)
    made = bundle("token-classification", labels=TAGS, head=head_of(4, 4), features=("first_6",))
    found, rows = judged(tmp_path, made, store, classes)
    given = [[TAGS[i] for i in made.head.logits(own).argmax(1)] if len(own) else [] for own in vectors]
    assert [row["tags"] for row in rows] == given
    assert [json.loads(row["label"]) for row in rows] == true
    scores = metrics.entity_scores(metrics.entity_counts(true, given))
    assert found.metrics["f1"] == pytest.approx(scores["micro"]["f1"])
    assert found.metrics["precision"] == pytest.approx(scores["micro"]["precision"])
    assert found.metrics["macro_f1"] == pytest.approx(scores["macro"]["f1"])
    words = [a == b for one, other in zip(true, given, strict=True) for a, b in zip(one, other, strict=True)]
    assert found.metrics["accuracy"] == pytest.approx(np.mean(words))
    low, high = found.intervals["f1"]
    assert low < found.metrics["f1"] < high
    assert len(found.details["worst"]) == 20
    wrong = {" ".join("x" * len(a)) for a, b in zip(true, given, strict=True) if a != b}
    assert {row["text"] for row in found.details["worst"]} <= wrong
    assert all(
        "(x)" in row["label"] or "(y)" in row["label"] or row["label"] == "none" for row in found.details["worst"]
    )


def questions(folder, labels, marks):
    """Contexts of five words; the head wants a token whose first number is high, and [CLS] where that is at [CLS].

    marks: for each question the tokens (0 is [CLS]) that the head will take for start and end.
    """
    count = len(labels)
    vectors, spans = words_of([7] * count, 2)
    for number, (start, stop) in enumerate(marks):
        vectors[number][:] = 0.01
        vectors[number][1 + start, 0] = 8
        vectors[number][1 + stop, 1] = 8
        places = np.arange(5) * 4
        spans[number] = np.vstack([np.zeros((2, 2), np.int64), np.stack([places, places + 3], 1)])
    rows = {"text": ["q"] * count, "text_pair": ["abc def ghi jkl mno"] * count, "label": list(map(json.dumps, labels))}
    weight = np.zeros((2, 6), np.float32)
    weight[[0, 1], [0, 1]] = 1
    made = bundle(
        "question-answering",
        labels=("start", "end"),
        pair="c",
        head=LinearHead(weight, np.zeros(2, np.float32)),
        lengths=tuple(np.log(np.full(5, 0.2))),
        threshold=0.0,
    )
    return made, store_of(folder / "store", rows, vectors, spans=spans, shards=(2, 2))


def test_questions(tmp_path):
    labels = [[[0, "abc"]], [[4, "def ghi"], [8, "ghi"]], [], [[12, "jkl"]], [], [[0, "abc def"]]]
    made, store = questions(tmp_path, labels, [(1, 1), (3, 3), (0, 0), (0, 0), (5, 5), (2, 2)])
    found, rows = judged(tmp_path, made, store, {})
    assert [row["predicted"] for row in rows] == ["abc", "ghi", "", "", "mno", "def"]
    assert found.metrics["exact"] == pytest.approx(3 / 6)
    assert found.metrics["f1"] == pytest.approx((1 + 1 + 1 + 0 + 0 + 2 / 3) / 6)
    assert found.metrics["has_answer_f1"] == pytest.approx((1 + 1 + 0 + 2 / 3) / 4)
    assert found.metrics["no_answer_f1"] == pytest.approx(1 / 2)
    worst = {row["label"]: row["predicted"] for row in found.details["worst"]}
    assert worst == {"jkl": "no answer", "no answer": "mno", "abc def": "def"}


def test_questions_that_have_no_answers_at_all(tmp_path):
    made, store = questions(tmp_path, [[], []], [(0, 0), (1, 1)])
    found, _ = judged(tmp_path, made, store, {})
    assert found.metrics["no_answer_f1"] == 0.5
    assert "has_answer_f1" not in found.metrics


def test_pairs_whose_texts_are_encoded_apart(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float16)
    texts = store_of(tmp_path / "texts", {"text": list("uvwxyz")}, vectors, shards=(4,))
    first, second, y = [0, 5, 2, 2, 1], [1, 1, 2, 4, 0], [0, 1, 0, 1, 1]
    rows = {"text": list("uzwwv"), "text_pair": list("vvwyu"), "label": ["ab"[i] for i in y]}
    rows |= {"first": first, "second": second}
    store = store_of(tmp_path / "store", rows, None, (), shards=(3,))
    made = bundle(labels=("a", "b"), pair="b", encoder={"pair": "siamese"}, head=head_of(2, 16))
    found, written = judged(tmp_path, made, store, {"a": 0, "b": 1}, texts=texts)
    u, v = (vectors[side].astype(np.float32) for side in (first, second))
    given = made.head.logits(np.hstack([u, v, abs(u - v), u * v])).argmax(1)
    assert [row["predicted"] for row in written] == ["ab"[i] for i in given]
    assert found.metrics["accuracy"] == (given == y).mean()


def test_classes_that_no_row_has_leave_metrics_that_are_defined(tmp_path):
    store, _ = texts_of(tmp_path, ["a"] * 40)
    found, _ = judged(tmp_path, bundle(head=head_of(3, 4)), store)
    assert found.metrics.get("auroc") is None
    assert found.metrics["rows"] == 40
    json.dumps(found.metrics, allow_nan=False)
