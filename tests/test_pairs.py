"""Pairs whose texts are encoded by themselves: each distinct text once, whatever pairs and splits it is in."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import read_jsonl

import bertray
from bertray.checkpoints import find
from bertray.encoder import Encoder
from bertray.errors import BertrayError
from bertray.pairs import encode
from bertray.spec import Encoder as EncoderSpec
from bertray.store import Store
from bertray.vectors import vectors_of

LONG = "word " * 40


def made(count, start=0):
    return [
        {"a": f"text {i % 7}", "b": f"text {(i * 3 + 1) % 11}", "same": ["no", "yes"][i % 2]}
        for i in range(start, start + count)
    ]


@pytest.fixture
def spec(tiny, tmp_path, rows_file, ray_cluster):
    def of(train, test=None, dev=None, name="run", **encoder):
        sources = {"train": train, "test": test, "dev": dev}
        data = {split: rows_file(rows, f"{name}-{split}.jsonl") for split, rows in sources.items() if rows}
        return {
            "data": {**data, "text": "a", "text_pair": "b", "label": "same", "unit_rows": 16},
            "encoder": {"model": str(tiny), "pooling": "mean", "pair": "siamese", "max_length": 16} | encoder,
            "head": {"optimizer": "lbfgs", "l2": 0.1, "folds": 0},
            "output": str(tmp_path / name),
        }

    return of


def store(output, name):
    (folder,) = Path(output).glob(f"stores/{name}-*")
    return Store(str(folder))


def column(output, split, name):
    return [one for table in store(output, split).tables([name]) for one in table[name].to_pylist()]


def test_each_distinct_text_of_all_splits_is_encoded_once(spec, tiny):
    rows = made(30), made(30, 9), made(20, 40)
    wanted = spec(*rows)
    summary = bertray.run(wanted, until="embed")
    texts = column(wanted["output"], "texts", "text")
    assert sorted(texts) == sorted({row[side] for part in rows for row in part for side in "ab"})
    assert {name: each["rows"] for name, each in summary["rows"].items()} == {
        "train": 30, "test": 30, "dev": 20, "texts": len(texts),
    }  # fmt: skip
    (table,) = store(wanted["output"], "texts").tables(["mean_2"])
    vectors = Encoder(find(str(tiny)), EncoderSpec(pooling="mean", max_length=16)).encode(texts).vectors
    np.testing.assert_allclose(vectors_of(table, ["mean_2"]), vectors, atol=1e-3)
    for split, part in zip(("train", "test", "dev"), rows, strict=True):
        for role, side in (("first", "a"), ("second", "b")):
            assert [texts[i] for i in column(wanted["output"], split, role)] == [row[side] for row in part]


def test_only_what_is_missing_is_done_again(spec):
    wanted = spec(made(60), made(10))
    bertray.run(wanted, until="embed")
    output = Path(wanted["output"])
    before = {path: path.stat().st_mtime_ns for path in output.glob("stores/*/shards/*")}
    (manifest,) = output.glob("stores/texts-*/manifest.json")
    manifest.unlink()
    (lost,) = manifest.parent.glob("shards/*")
    lost.unlink()
    bertray.run(wanted, until="embed")
    after = {path: path.stat().st_mtime_ns for path in output.glob("stores/*/shards/*")}
    assert {path for path in after if after[path] != before[path]} == {lost}
    wanted = spec(made(60), [*made(10), {"a": "quite new", "b": "text 1", "same": "no"}])
    assert bertray.run(wanted, until="embed")["rows"]["texts"]["rows"] == 12


@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs_with_a_text_that_cannot_be_encoded_are_set_aside(spec, split):
    """What is left is what it would be without them."""
    good = {"train": made(60), "test": made(20, 5)}
    bad = [{"a": LONG, "b": "text 1", "same": "no"}, {"a": None, "b": "x", "same": "no"}]
    bad += [{"a": "text 2", "b": LONG + "more", "same": "yes"}]
    mixed = {**good, split: [bad[0], *good[split][:7], bad[1], *good[split][7:], bad[2]]}
    clean = bertray.run(spec(good["train"], good["test"], name="clean", truncation="error"))
    wanted = spec(mixed["train"], mixed["test"], name="mixed", truncation="error")
    summary = bertray.run(wanted)
    assert summary["rows"][split]["reasons"] == {"longer than 16 tokens": 2, "text is null": 1}
    assert summary["rows"][split]["rows"] == len(good[split])
    for name in ("train", "test"):
        assert summary["metrics"][name] == pytest.approx(clean["metrics"][name], abs=1e-4)
    one, other = (bertray.load(run["bundle"]).bundle.head for run in (summary, clean))
    np.testing.assert_allclose(one.weight, other.weight, atol=1e-5)
    rejects = [row for path in Path(wanted["output"]).glob(f"stores/{split}-*/rejects/*") for row in read_jsonl(path)]
    assert {row["id"]: row["reason"] for row in rejects} == {
        f"mixed-{split}.jsonl:0": "longer than 16 tokens",
        f"mixed-{split}.jsonl:8": "text is null",
        f"mixed-{split}.jsonl:{len(good[split]) + 2}": "longer than 16 tokens",
    }
    shards = {path: path.stat().st_mtime_ns for path in Path(wanted["output"]).glob("stores/*/shards/*")}
    assert bertray.run(wanted) == summary
    assert {path: path.stat().st_mtime_ns for path in Path(wanted["output"]).glob("stores/*/shards/*")} == shards
    with pytest.raises(BertrayError, match="rows are set aside so far, more than data.max_rejects"):
        bertray.run({**wanted, "data": {**wanted["data"], "max_rejects": 2}, "output": wanted["output"] + "-strict"})


def test_when_no_pair_is_left_it_is_told(spec):
    with pytest.raises(BertrayError, match="train: none of the 2 rows can be used"):
        bertray.run(spec([{"a": None, "b": "x", "same": "no"}, {"a": "x", "b": None, "same": "yes"}]), until="embed")


def test_labels_that_are_none_of_those_given_are_told(spec):
    wanted = spec(made(20))
    wanted["data"]["labels"] = ["no", "maybe"]
    with pytest.raises(BertrayError, match="label 'yes' is none of data.labels"):
        bertray.run(wanted, until="embed")


def test_answers_in_python_are_those_of_the_evaluation(spec):
    rows = made(20, 5)
    summary = bertray.run(spec(made(60), rows))
    predictor = bertray.load(summary["bundle"])
    labels, probabilities = predictor.predict([row["a"] for row in rows], [row["b"] for row in rows])
    table = pq.read_table(Path(summary["output"]) / "predictions" / "test.parquet")
    assert labels == table["predicted"].to_pylist()
    np.testing.assert_allclose(probabilities.max(1), table["score"].to_numpy(), atol=1e-3)
    swapped = predictor.predict([row["b"] for row in rows], [row["a"] for row in rows]).probabilities
    assert not np.allclose(swapped, probabilities, atol=1e-3)


def test_pairs_that_fail_alone_and_texts_once(tiny):
    encoder = Encoder(find(str(tiny)), EncoderSpec(pooling="mean", max_length=16, truncation="error"))
    given, failed = encode(encoder, ["a", LONG, "b", "a"], ["b", "a", LONG, "a"])
    assert failed == {1: "longer than 16 tokens", 2: "longer than 16 tokens"}
    a, b = encoder.encode(["a", "b"]).vectors.astype(np.float32)
    np.testing.assert_allclose(given.vectors[0], np.concatenate([a, b, abs(a - b), a * b]), atol=1e-3)
    np.testing.assert_allclose(given.vectors[3], np.concatenate([a, a, 0 * a, a * a]), atol=1e-3)
