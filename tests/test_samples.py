"""A worker's rows of stores, as heads are fitted on them: which, in what order, and how much each counts."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from handmade import store_of, words_of
from sklearn.utils.class_weight import compute_class_weight

from bertray import samples as module
from bertray.features import related, with_surroundings
from bertray.samples import Share, Wanted, samples

ALONE = Share(0, 1)
NAMES = {"a": 0, "b": 1, "c": 2}


def read(wanted, share=ALONE, **options):
    with samples(wanted, share, device="cpu", **options) as found:
        vectors = found.take(slice(None), torch.float32).numpy().copy()
        whole = {
            name: None if (value := getattr(found, name)) is None else value.numpy().copy()
            for name in ("targets", "folds", "weights", "edges", "others")
        }
        return replace(found, vectors=None, questions=None), vectors, whole


def texts_of(folder, count=40, seed=0, form="name", features=("mean_5", "cls_6"), **more):
    rng = np.random.default_rng(seed)
    labels = {
        "name": lambda: str(rng.choice(list(NAMES), p=[0.6, 0.3, 0.1])),
        "names": lambda: json.dumps([name for name in NAMES if rng.random() < 0.4]),
        "number": lambda: repr(float(rng.normal())),
    }[form]
    rows = {"text": [f"text {rng.integers(25)}" for _ in range(count)], "label": [labels() for _ in range(count)]}
    vectors = rng.normal(size=(count, 4 * len(features))).astype(np.float16)
    return store_of(folder, rows, vectors, features, shards=(7, 7, 30), **more), rows, vectors


@pytest.mark.parametrize(("form", "kind"), [("name", "softmax"), ("names", "sigmoid"), ("number", "squared")])
def test_rows_of_texts(tmp_path, form, kind):
    store, rows, vectors = texts_of(tmp_path, form=form)
    found, x, parts = read(Wanted((store,), form, NAMES, 1 if form == "number" else 3))
    assert (found.kind, found.count, found.edges) == (kind, 40, None)
    np.testing.assert_array_equal(x, vectors.astype(np.float32))
    if form == "name":
        expected = [NAMES[label] for label in rows["label"]]
    elif form == "names":
        expected = [[name in json.loads(label) for name in NAMES] for label in rows["label"]]
    else:
        expected = [[np.float32(label)] for label in rows["label"]]
    np.testing.assert_array_equal(parts["targets"], np.array(expected))
    assert (parts["weights"] == 1).all()


def test_some_features_side_by_side_or_averaged(tmp_path):
    store, _, vectors = texts_of(tmp_path)
    with samples(Wanted((store,), "name", NAMES, 3), ALONE, device="cpu") as found:
        blocks = vectors.astype(np.float32).reshape(40, 2, 4)
        rows = torch.tensor([5, 2])
        np.testing.assert_array_equal(found.of([1], False).take(rows, torch.float32), blocks[[5, 2], 1])
        np.testing.assert_allclose(found.of([0, 1], True).take(rows, torch.float32), blocks[[5, 2]].mean(1), atol=1e-6)
        assert [found.of(*each).width for each in (([0, 1], False), ([0], False), ([0, 1], True))] == [8, 4, 4]


def test_equal_texts_are_left_out_together(tmp_path):
    store, rows, _ = texts_of(tmp_path, 400)
    _, _, parts = read(Wanted((store,), "name", NAMES, 3, folds=4))
    folds = {}
    for text, fold in zip(rows["text"], parts["folds"].tolist(), strict=True):
        assert folds.setdefault(text, fold) == fold
    assert set(folds.values()) == {0, 1, 2, 3}
    _, _, other = read(Wanted((store,), "name", NAMES, 3, folds=4, seed=1))
    assert (other["folds"] != parts["folds"]).any()


def test_rows_to_choose_by_count_for_nothing_else(tmp_path):
    train, *_ = texts_of(tmp_path / "train")
    dev, *_ = texts_of(tmp_path / "dev", 31, 1)
    found, _, parts = read(Wanted((train, dev), "name", NAMES, 3, folds=5, balanced=True))
    assert found.count == 71
    assert parts["folds"].tolist() == [1] * 40 + [0] * 31
    assert not parts["weights"][40:].any()
    _, _, alone = read(Wanted((train,), "name", NAMES, 3, balanced=True))
    np.testing.assert_array_equal(parts["weights"][:40], alone["weights"])


def test_balanced_weights_are_scikit_learns(tmp_path):
    store, rows, _ = texts_of(tmp_path, 200)
    _, _, parts = read(Wanted((store,), "name", NAMES, 3, balanced=True))
    each = compute_class_weight("balanced", classes=np.array(list(NAMES)), y=np.array(rows["label"]))
    np.testing.assert_allclose(parts["weights"], [each[NAMES[label]] for label in rows["label"]], rtol=1e-6)


def test_a_class_that_no_row_has_leaves_the_others_as_they_are(tmp_path):
    store, *_ = texts_of(tmp_path, 200)
    _, _, parts = read(Wanted((store,), "name", NAMES, 3, balanced=True))
    _, _, more = read(Wanted((store,), "name", {**NAMES, "d": 3}, 4, balanced=True))
    np.testing.assert_array_equal(more["weights"], parts["weights"])


COUNTS = [3, 0, 5, 1, 0, 2, 4, 0]


def tagged(folder, **more):
    vectors, spans = words_of(COUNTS, 8)
    vectors[2][4] = 0  # cut off
    rng = np.random.default_rng(0)
    labels = [json.dumps([str(rng.choice(list(NAMES))) for _ in range(count)]) for count in COUNTS]
    rows = {"text": [f"text {i}" for i in range(len(COUNTS))], "label": labels}
    return store_of(folder, rows, vectors, ("first_5", "first_6"), spans, shards=(3,)), vectors, labels


def test_rows_of_words(tmp_path):
    store, vectors, labels = tagged(tmp_path)
    found, x, parts = read(Wanted((store,), "tokens", NAMES, 3, folds=3))
    assert (found.kind, found.count) == ("softmax", len(COUNTS))
    np.testing.assert_array_equal(x, np.concatenate(vectors))
    assert parts["edges"].tolist() == np.cumsum([0, *COUNTS]).tolist()
    assert parts["targets"].tolist() == [NAMES[tag] for label in labels for tag in json.loads(label)]
    assert parts["weights"].tolist() == [float(i != 7) for i in range(15)]
    for start, stop in pairwise(parts["edges"]):
        assert len(set(parts["folds"][start:stop].tolist())) <= 1


def test_balanced_words_leave_out_what_was_cut_off(tmp_path):
    store, _, labels = tagged(tmp_path)
    _, _, parts = read(Wanted((store,), "tokens", NAMES, 3, balanced=True))
    tags = np.delete([tag for label in labels for tag in json.loads(label)], 7)
    each = compute_class_weight("balanced", classes=np.array(sorted(set(tags))), y=tags)
    expected = [dict(zip(sorted(set(tags)), each, strict=True))[tag] for tag in tags]
    np.testing.assert_allclose(np.delete(parts["weights"], 7), expected, rtol=1e-6)
    assert parts["weights"][7] == 0


def asked(folder, counts=(4, 6, 3, 5), context="x x x x x x", zeros=()):
    """Questions: each has its own vector, [CLS], and one for each token of the context, of a letter each."""
    vectors, spans = words_of(counts, 4)
    for question, token in zeros:
        vectors[question][token] = 0
    for number, count in enumerate(counts):
        own = np.arange(count - 2) * 2
        spans[number] = np.vstack([np.zeros((2, 2), np.int64), np.stack([own, own + 1], 1)])
    labels = [json.dumps(label) for label in ([[0, "x"]], [[2, "x x"], [0, "x"]], [], [[4, "x"]])]
    rows = {"text": ["q"] * 4, "text_pair": [context] * 4, "label": labels}
    return store_of(folder, rows, vectors, ("mean_6",), spans, columns={"text_pair": "context"}), vectors


def test_rows_of_questions(tmp_path):
    store, vectors = asked(tmp_path)
    found, x, parts = read(Wanted((store,), "answers", {}, 2))
    assert (found.kind, found.count) == ("span", 4)
    assert parts["edges"].tolist() == [0, 3, 8, 10, 14]
    assert parts["others"].tolist() == [0] * 3 + [1] * 5 + [2] * 2 + [3] * 4
    expected = []
    for own in vectors:
        around = with_surroundings(own[:, None], np.array([0, len(own)]))[1:, 1]
        expected.append(related(own[1:], np.repeat(own[:1], len(own) - 1, 0), around))
    np.testing.assert_allclose(x, np.concatenate(expected), atol=1e-6)
    targets = np.split(parts["targets"], parts["edges"][1:-1])
    assert targets[0].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert targets[1].tolist() == [[0, 0], [0.5, 0.5], [0.5, 0], [0, 0.5], [0, 0]]
    assert targets[2].tolist() == [[1, 1], [0, 0]]
    assert targets[3].tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]


def test_pairs_are_told_by_the_rows_of_their_texts(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 6)).astype(np.float32)
    texts = store_of(tmp_path / "texts", {"text": list("vwxyz")}, vectors, ("mean_5", "mean_6"))
    first, second = [0, 4, 2, 2], [1, 1, 2, 3]
    rows = {"text": ["v", "z", "x", "x"], "label": list("abca"), "first": first, "second": second}
    store = store_of(tmp_path / "pairs", rows, None, ())
    _, x, parts = read(Wanted((store,), "name", NAMES, 3, pairs=texts))
    np.testing.assert_array_equal(x, related(vectors[first], vectors[second]))
    assert x.shape == (4, 24)
    assert parts["targets"].tolist() == [0, 1, 2, 0]


FORMS = {"name": texts_of, "number": partial(texts_of, form="number"), "tokens": tagged, "answers": asked}


@pytest.mark.parametrize("form", FORMS)
def test_three_workers_have_the_rows_of_one(tmp_path, form):
    store, *_ = FORMS[form](tmp_path)
    wanted = Wanted((store,), form, NAMES, {"number": 1, "answers": 2}.get(form, 3), folds=2)
    one, x, whole = read(wanted)
    edges = whole["edges"] if whole["edges"] is not None else np.arange(len(x) + 1)
    shares = [read(wanted, Share(rank, 3)) for rank in range(3)]
    assert {share.count for share, _, _ in shares} == {one.count}
    for rank, (_, mine, parts) in enumerate(shares):
        rows = np.concatenate([np.arange(edges[g], edges[g + 1]) for g in range(rank, one.count, 3)])
        np.testing.assert_array_equal(mine, x[rows])
        for name in ("targets", "folds", "weights"):
            np.testing.assert_array_equal(parts[name], whole[name][rows])
        if whole["edges"] is not None:
            assert np.diff(parts["edges"]).tolist() == np.diff(edges)[rank::3].tolist()


@pytest.mark.parametrize("form", ["name", "tokens", "answers"])
def test_vectors_in_a_file_are_those_in_memory(tmp_path, form):
    count = 3_000
    vectors, spans = words_of([3] * count, 64)
    labels = {"name": "a", "tokens": '["a", "b", "a"]', "answers": "[]"}[form]
    rows = {"text": [f"t{i}" for i in range(count)], "text_pair": ["x"] * count, "label": [labels] * count}
    flat = np.concatenate(vectors).reshape(count, -1)
    store = store_of(
        tmp_path, rows, flat if form == "name" else vectors, ("mean_6",), None if form == "name" else spans
    )
    wanted = Wanted((store,), form, NAMES, 2 if form == "answers" else 3)
    held, x, parts = read(wanted)
    streamed, same, others = read(wanted, memory=1)
    assert held.spare > 0 == streamed.spare
    np.testing.assert_array_equal(x, same)
    for name, value in parts.items():
        np.testing.assert_array_equal(value, others[name])


def test_a_worker_without_a_row(tmp_path):
    store = store_of(tmp_path, {"text": ["a"], "label": ["a"]}, np.ones((1, 4), np.float32))
    found, x, parts = read(Wanted((store,), "name", NAMES, 3), Share(1, 2))
    assert (found.count, len(x), len(parts["targets"])) == (1, 0, 0)


def test_tokens_that_were_cut_off_are_no_place_for_an_answer(tmp_path):
    """Their logits are not looked at when questions are answered: what is fitted must not know them either."""
    store, _ = asked(tmp_path, zeros=[(0, 3), (3, 3), (3, 4)])
    _, x, parts = read(Wanted((store,), "answers", {}, 2))
    assert x.any(1).all()
    assert parts["edges"].tolist() == [0, 2, 7, 9, 11]
    targets = np.split(parts["targets"], parts["edges"][1:-1])
    assert targets[0].tolist() == [[0, 0], [1, 1]]
    assert targets[3].tolist() == [[1, 1], [0, 0]]  # its answer was cut off


@pytest.mark.parametrize(
    ("limit", "used"),
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
def test_the_memory_of_a_container_is_what_it_may_use(tmp_path, monkeypatch, limit, used):
    """What is in its cache of files counts as free."""
    (tmp_path / "memory").mkdir()
    for name, text in ((limit, "3000000"), (used, "2600000")):
        (tmp_path / name).write_text(text + "\n")
    name = "total_inactive_file" if "/" in used else "inactive_file"
    (tmp_path / used).with_name("memory.stat").write_text(f"anon 1\n{name} 600000\n")
    monkeypatch.setattr(module, "_GROUPS", tmp_path)
    assert module._room("auto", 1) == 500_000
    (tmp_path / limit).write_text("max\n")
    assert module._room("auto", 2) > 10_000_000  # the machine's
