"""What the report shows besides the metrics: a whole run whose rows have mistakes that were planted."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import MINILM, demo_rows
from handmade import bundle, store_of

import bertray
from bertray import examine, pipeline
from bertray.search import Choice, Setting
from bertray.sources import Columns
from bertray.splits import Split
from bertray.store import Manifest, Receipt

OTHER = {"negative": "positive", "positive": "negative"}


def rows(split):
    return [{"text": row["text"], "label": row["label"]} for row in demo_rows(split) if row["label"] in OTHER]


@pytest.fixture(scope="module")
def planted(tmp_path_factory, ray_cluster):
    """A run on real rows; its summary, and the details that its report was made of."""
    folder = tmp_path_factory.mktemp("planted")
    train, test = rows("train")[:240], rows("test")[:60]
    wrong = [7, 51, 98, 149, 203]
    for i in wrong:
        train[i] = {**train[i], "label": OTHER[train[i]["label"]]}
    train += [{"text": "It  Was Fine", "label": "positive"}, {"text": "it was fine", "label": "negative"}]
    train += [{"text": None, "label": "positive"}]
    test += [train[20], {"text": train[21]["text"].upper(), "label": OTHER[train[21]["label"]]}]
    for name, part in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    spec = {
        "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "unit_rows": 50},
        "encoder": {"model": MINILM, "pooling": "mean"},
        "head": {"optimizer": "lbfgs", "l2": 0.02, "standardize": True},
        "output": str(folder / "run"),
    }
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "examine", lambda *given: found.update(examine.details(*given)) or found)
        summary = bertray.run(spec)
    return summary, found, wrong, train, test


def test_labels_that_are_probably_wrong_are_found(planted):
    _, details, wrong, train, _ = planted
    doubted = {int(row["id"].rpartition(":")[2]): row for row in details["doubts"]}
    assert len(doubted) == len(details["doubts"]) <= 20
    assert len(doubted.keys() & set(wrong)) >= 4
    for number, row in doubted.items():
        assert (row["text"], row["label"]) == (train[number]["text"][:300], train[number]["label"])
        assert row["suggested"] == OTHER[row["label"]]
        assert row["p_suggested"] > row["p_label"]
    margins = [row["p_suggested"] - row["p_label"] for row in details["doubts"]]
    assert margins == sorted(margins, reverse=True)


def test_texts_with_two_labels_and_in_two_splits_are_found(planted):
    _, details, _, train, _ = planted
    (conflict,) = details["conflicts"]
    assert conflict["text"] == "It  Was Fine"
    assert conflict["labels"] == {"positive": 1, "negative": 1}
    overlap = details["overlap"]
    assert (overlap["rows"], overlap["differing"]) == (2, 1)
    assert [each["text"] for each in overlap["examples"]] == [train[20]["text"], train[21]["text"].upper()]
    near = {(pair["train"]["text"], pair["test"]["text"]): pair["cosine"] for pair in details["near"]}
    assert near[train[20]["text"], train[20]["text"]] == pytest.approx(1, abs=1e-3)


def test_rows_that_were_set_aside_are_shown(planted):
    _, details, *_ = planted
    assert details["rejected"] == [{"id": "train.jsonl:242", "reason": "text is null", "preview": ""}]


def test_the_map_shows_the_rows_that_are_judged(planted):
    summary, details, _, _, test = planted
    shown = details["map"]
    assert shown["text"] == [row["text"] for row in test]
    assert shown["label"] == [row["label"] for row in test]
    assert shown["predicted"] == pq.read_table(f"{summary['output']}/predictions/test.parquet")["predicted"].to_pylist()
    vectors = bertray.load(summary["bundle"]).encoder.encode(shown["text"]).vectors.astype(float)
    vectors -= vectors.mean(0)
    u, s, _ = np.linalg.svd(vectors, full_matrices=False)
    for name, i in (("x", 0), ("y", 1)):
        assert abs(np.corrcoef(shown[name], u[:, i] * s[i])[0, 1]) == pytest.approx(1, abs=0.01)


def made(folder, labels, texts, form):
    made_bundle = bundle(
        *{"names": ("text-classification", "multi_label"), "tokens": ("token-classification",)}[form],
        labels=("B-x", "O") if form == "tokens" else ("a", "b"),
    )
    words = form == "tokens"
    vectors = np.random.default_rng(0).normal(size=(len(texts), 4)).astype(np.float32)
    if words:
        from handmade import words_of

        vectors, spans = words_of([len(text.split()) for text in texts], 4)
    store = store_of(folder, {"text": texts, "label": labels}, vectors, spans=spans if words else None)
    return made_bundle, Split("x", (), Columns("text", label="label", form=form), store, {})


@pytest.mark.parametrize(
    ("form", "labels", "told"),
    [
        ("names", ['["1"]', '["0", "1"]', "[]"], ["b", "a, b", ""]),
        ("tokens", ['["0", "1"]', '["1", "1"]', '["0", "0"]'], ["Bo (x)", "none", "Al (x), yes (x)"]),
    ],
)
def test_labels_that_are_written_as_numbers_are_told_by_their_names(tmp_path, form, labels, told):
    texts = ["Bo sits", "he sits", "Al yes"]
    given, split = made(tmp_path, labels, texts, form)
    classes = {"0": 0, "1": 1}
    choice = Choice(Setting(("mean_6",), "concat", 0.0, 0))
    manifests = {"train": Manifest("x", {}, (Receipt("u0", 3, 0, 0, 0, 0, 0.0),))}
    predictions = pq.read_table(split.store.shard("u0").path).select(["id", "text", "label"])
    predictions = predictions.append_column("predicted", predictions["label"])
    found = examine.details({"train": split, "test": split}, manifests, given, choice, classes, predictions, "test")
    assert (found["overlap"]["rows"], found["overlap"]["differing"]) == (3, 0)
    assert [each["label"] for each in found["overlap"]["examples"]] == told


def test_doubts_with_rows_to_choose_by_are_of_those(tmp_path):
    texts = [f"t{i}" for i in range(40)]
    labels = ["a", "b"] * 20
    store = store_of(tmp_path, {"text": texts, "label": labels}, np.zeros((40, 4), np.float32), shards=(11, 11, 30))
    targets = np.array([0, 1] * 20)
    logits = np.zeros((40, 2), np.float32)
    logits[np.arange(40), targets] = 3
    logits[[12, 31]] = [[-4, 4], [5, -5]]  # these are surely of the other class
    choice = Choice(Setting(("mean_6",), "concat", 0.0, 0), logits=logits, targets=targets, temperature=1.0)
    found = examine._doubts(store, bundle(labels=("a", "b")), choice, {"a": 0, "b": 1})
    assert [(row["id"], row["label"], row["suggested"]) for row in found] == [("r31", "b", "a"), ("r12", "a", "b")]
