"""The whole job in one process: results, what is skipped, bad input."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import MINILM, ROOT, SIX, demo_rows, read_jsonl

import bertray
from bertray import bundle as bundles
from bertray.errors import BertrayError
from bertray.storage import Location
from bertray.store import Store


def test_the_demo_is_good_and_leaves_what_it_should(demo):
    folder = Path(demo["output"])
    assert demo["metrics"]["test"]["accuracy"] > 0.82
    assert demo["metrics"]["test"]["rows"] == 180
    assert demo["metrics"]["train"]["rows"] == 720
    assert {row["text"]: row["label"] for row in demo["examples"]} == SIX
    assert json.loads((folder / "metrics.json").read_text()) == demo
    for split in demo["metrics"].values():
        assert set(split) == {"accuracy", "macro_f1", "micro_f1", "auroc", "ece", "loss", "outliers", "rows"}
    assert demo["metrics"]["test"]["outliers"] < 0.05
    assert set(demo["seconds"]) == {"prepare", "start", "embed", "fit", "evaluate", "report", "total"}
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json", "report.html", "left_out.npz", "head", "stores", "predictions", "rows", "logs",
    }  # fmt: skip


def test_predictions_hold_every_row_in_order(demo):
    table = pq.read_table(Path(demo["output"]) / "predictions" / "test.parquet")
    assert table["text"].to_pylist() == [row["text"] for row in demo_rows("test")]
    right = [a == b for a, b in zip(table["label"].to_pylist(), table["predicted"].to_pylist(), strict=True)]
    assert sum(right) / len(right) == demo["metrics"]["test"]["accuracy"]


def test_the_demos_rows_are_distinct_and_hold_none_of_the_six():
    plain = lambda text: "".join(c for c in text.lower() if c.isalnum())  # noqa: E731
    texts = [plain(row["text"]) for split in ("train", "test") for row in demo_rows(split)]
    assert len(texts) == len(set(texts)) >= 600
    assert not {plain(text) for text in SIX} & set(texts)
    words = [set(row["text"].lower().split()) for split in ("train", "test") for row in demo_rows(split)]
    for text in SIX:
        mine = set(text.lower().split())
        assert max(len(mine & other) / len(mine | other) for other in words) < 0.5


def written(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet") if "stores" in path.parts}


def test_running_again_skips_what_is_done(demo, caplog, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = Path(demo["output"])
    shards = written(folder)
    caplog.set_level("INFO", "bertray")
    again = bertray.run("jobs/specs/demo.yaml", overrides=[f"output={folder}"])
    assert again == demo
    assert caplog.messages == ["embedding: done already", "fitting: done already", "evaluating: done already"]
    other = bertray.run("jobs/specs/demo.yaml", overrides=[f"output={folder}", "head.l2=0.01"])
    assert other["metrics"] != demo["metrics"]
    assert other["seconds"]["embed"] == demo["seconds"]["embed"]  # as it was: nothing was encoded
    assert written(folder) == shards
    assert bertray.run("jobs/specs/demo.yaml", overrides=[f"output={folder}"])["metrics"] == demo["metrics"]


def test_a_bundle_from_before_there_was_ood_is_used_as_it_is(tiny, tmp_path, ray_cluster, rows_file):
    spec = {
        "data": {"train": rows_file([{"text": f"text {i}", "label": i % 2} for i in range(40)])},
        "encoder": {"model": str(tiny), "pooling": "mean"},
        "output": str(tmp_path / "run"),
    }
    summary = bertray.run(spec)
    assert 0 <= summary["metrics"]["train"]["outliers"] < 0.2
    made = bundles.load(summary["bundle"])
    assert made.ood.map.shape == (32, 32)
    bundles.save(replace(made, ood=None), summary["bundle"])
    (tmp_path / "run" / "metrics.json").unlink()
    again = bertray.run(spec)
    assert bundles.load(summary["bundle"]).ood is None
    expected = summary["metrics"]["train"]
    assert again["metrics"]["train"] == {name: expected[name] for name in expected if name != "outliers"}


def test_a_lost_shard_alone_is_encoded_again(tiny, tmp_path, ray_cluster, rows_file):
    """On two encoder processes; the vectors do not depend on which."""
    rows = [{"text": f"text number {i}", "label": i % 2} for i in range(60)]
    spec = {
        "data": {"train": rows_file(rows), "unit_rows": 20},
        "encoder": {"model": str(tiny), "pooling": "mean"},
        "ray": {"workers": 2, "cpus_per_worker": 1},
        "output": str(tmp_path / "run"),
    }
    bertray.run(spec, until="embed")
    shards = written(tmp_path)
    lost = sorted(shards)[1]
    content = pq.read_table(lost)
    lost.unlink()
    (lost.parents[1] / "manifest.json").unlink()
    bertray.run(spec, until="embed")
    after = written(tmp_path)
    assert {path for path in shards if shards[path] != after[path]} == {lost}
    assert pq.read_table(lost).equals(content)
    bertray.run(spec, overrides=["encoder.pooling=cls"], until="embed")  # another store beside it
    assert len(written(tmp_path)) == 6


def test_odd_rows_are_counted_and_nothing_is_lost(tiny, tmp_path, ray_cluster, rows_file):
    rows = [{"id": f"r{i}", "text": f"some text {i}", "label": ["no", "yes"][i % 2]} for i in range(20)]
    rows += [
        {"id": "empty", "text": "", "label": "no"},
        {"id": "blank", "text": " \t ", "label": "yes"},
        {"id": "long", "text": "word " * 2000, "label": "no"},
        # A unit of its own, in which nothing is left:
        {"id": "null", "text": None, "label": "no"},
        {"id": "unlabelled", "text": "who knows", "label": None},
    ]
    spec = {
        "data": {"train": rows_file(rows), "id": "id", "unit_rows": 23},
        "encoder": {"model": str(tiny), "max_length": 64},
        "output": str(tmp_path / "run"),
    }
    summary = bertray.run(spec)
    counts = summary["rows"]["train"]
    assert {name: counts[name] for name in ("rows", "empty", "truncated", "rejected")} == {
        "rows": 23, "empty": 2, "truncated": 1, "rejected": 2,
    }  # fmt: skip
    assert counts["reasons"] == {"text is null": 1, "label is null": 1}
    (rejects,) = tmp_path.rglob("rejects/*.jsonl")
    assert [row["id"] for row in read_jsonl(rejects)] == ["null", "unlabelled"]
    assert "test" not in summary["metrics"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "There were no test rows" in report
    assert "1 because <bdi>text is null</bdi>" in report


def test_long_texts_in_windows_are_counted(tiny, tmp_path, ray_cluster, rows_file):
    rows = [{"text": f"{i} " * (1 + 200 * (i == 3)), "label": i % 2} for i in range(8)]
    spec = {
        "data": {"train": rows_file(rows)},
        "encoder": {"model": str(tiny), "pooling": "mean", "max_length": 32, "overlap": 8, "truncation": "window"},
        "output": str(tmp_path / "run"),
    }
    counts = bertray.run(spec)["rows"]["train"]
    assert (counts["rows"], counts["windowed"], counts["truncated"], counts["rejected"]) == (8, 1, 0, 0)
    assert counts["tokens"] > 230
    with pytest.raises(BertrayError, match="8 of 8 rows|1 of 8 rows are set aside so far"):
        bertray.run(spec, overrides=["encoder.truncation=error", "data.max_rejects=0"])


def test_of_new_and_changed_files_only_those_are_encoded(tiny, tmp_path, ray_cluster):
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("text,label\n" + f"{name},x\nother {name},y\n" * 20)
    spec = {
        "data": {"train": f"{tmp_path}/*.csv", "unit_rows": 20},
        "encoder": {"model": str(tiny), "pooling": "mean"},
        "output": str(tmp_path / "run"),
    }

    def shards():
        return {shard.name: shard.stat().st_mtime_ns for shard in tmp_path.rglob("shards/*.parquet")}

    bertray.run(spec, until="embed")
    first = shards()
    assert len(first) == 4
    (tmp_path / "aa.csv").write_text("text,label\n" + "new,x\n" * 20)  # between the others
    assert bertray.run(spec, until="embed")["rows"]["train"]["rows"] == 100
    second = shards()
    assert {name: second[name] for name in first} == first
    assert len(second) == 5
    (tmp_path / "b.csv").write_text("text,label\n" + "b,x\nanother b,y\n" * 20)
    with pytest.raises(
        BertrayError, match=r"data.train: b.csv changed after being encoded. Restore what it was, or set"
    ):
        bertray.run(spec, overrides=["data.changed=refuse"], until="embed")
    assert shards() == second
    bertray.run(spec, until="embed")
    third = shards()
    assert {name: third[name] for name in second} == second
    assert len(third) == 7
    (store,) = (tmp_path / "run" / "stores").iterdir()
    texts = [text for table in Store(str(store)).tables(["text"]) for text in table["text"].to_pylist()]
    assert texts == ["a", "other a"] * 20 + ["new"] * 20 + ["b", "another b"] * 20


@pytest.mark.parametrize("kind", ["pandas", "datasets"])
def test_rows_from_memory_and_pairs(tiny, tmp_path, ray_cluster, kind):
    import datasets

    rows = pd.DataFrame({"a": ["one", "two"] * 10, "b": ["uno", "drei"] * 10, "same": [1, 0] * 10})
    given = rows if kind == "pandas" else datasets.Dataset.from_pandas(rows)
    spec = {
        "data": {"text": "a", "text_pair": "b", "label": "same", "labels": ["other", "same"]},
        "encoder": {"model": str(tiny)},
        "output": str(tmp_path / "run"),
    }
    summary = bertray.run(spec, train=given, test=given)
    assert summary["metrics"]["test"]["rows"] == 20
    predictor = bertray.load(summary["bundle"])
    assert predictor.predict(["one"], ["uno"]).probabilities.shape == (1, 2)
    with pytest.raises(BertrayError, match="takes pairs of texts"):
        predictor.predict(["one"])


FEW = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}] * 3
BAD_SPECS = {
    "no source": ({}, "data.train must name a path or a hub data set"),
    "no such file": ({"data": {"train": "/no/such.csv"}}, "/no/such.csv does not exist"),
    "slice of a file": ({"data": {"train": {"path": "a.csv", "split": "train[:9]"}}}, "split and config are for hub"),
    "wrong column": ({"data": {"text": "words"}}, "has no column 'words'. It has: text, label"),
    "label outside": ({"data": {"labels": ["x", "z"]}}, "label 'y' is none of data.labels"),
    "one label": ({"rows": FEW[:1] * 3}, "one label only"),
    "all rejected": ({"rows": [{"text": None, "label": "x"}, {"text": "a"}]}, "none of the 2 rows can be used"),
    "too many set aside": (
        {"rows": [*FEW, {"text": None, "label": "x"}, {"text": "a"}], "data": {"max_rejects": 1}},
        r"train: 2 of 8 rows are set aside so far, more than data.max_rejects \(1\) allows; rows.jsonl:6, for one",
    ),
    "a share set aside": (
        {"rows": [*FEW, {"text": None, "label": "x"}], "data": {"max_rejects": 0.1}},
        r"1 of 7 rows are set aside so far, more than data.max_rejects \(0.1\)",
    ),
    "float labels": ({"rows": [{"text": "a", "label": 0.5}]}, "rows.jsonl:1: label is not a whole number"),
    "no such model": ({"encoder": {"model": "some-one/nothing"}}, "was not found: it is not in the Hugging Face cache"),
    "no gpu": ({"ray": {"device": "cuda"}}, "the Ray cluster has no GPU"),
    "too many workers": ({"ray": {"workers": 99}}, "ray.workers 99 of 1 CPUs each is more than the Ray"),
    "too large workers": ({"ray": {"cpus_per_worker": 99}}, "a worker of 99 CPUs each is more than the Ray"),
    "too long": ({"encoder": {"max_length": 5000}}, "max_length must be at most 512"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SPECS)
def test_bad_input_is_one_clear_line(name, tiny, tmp_path, ray_cluster, rows_file, capfd):
    change, message = BAD_SPECS[name]
    spec = {
        "data": {"train": rows_file(change.get("rows", FEW)), **change.get("data", {})},
        "encoder": {"model": str(tiny), **change.get("encoder", {})},
        "ray": change.get("ray", {}),
        "output": str(tmp_path / "run"),
    }
    if name == "no source":
        del spec["data"]["train"]
    with pytest.raises(BertrayError, match=message) as caught:
        bertray.run(spec)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_real_tweets_reduced(shared, tmp_path, ray_cluster):
    """The notebook's rows and settings; 500 test rows give a standard error of 0.022."""
    spec = {
        "data": {
            "train": {"path": str(shared / "tweets" / "train.jsonl"), "limit": 2000},
            "test": {"path": str(shared / "tweets" / "test.jsonl"), "limit": 500},
            "id": "id",
            "labels": ["negative", "neutral", "positive"],
        },
        "encoder": {"model": MINILM},
        "output": str(tmp_path / "run"),
    }
    summary = bertray.run(spec)
    assert summary["metrics"]["train"]["rows"] == 2000
    assert summary["rows"]["train"]["empty"] == 1
    assert summary["metrics"]["test"]["accuracy"] > 0.52
    mean = bertray.run(spec, overrides=["encoder.pooling=mean", "data.train.limit=1000"])
    assert mean["metrics"]["test"]["accuracy"] > 0.58


def test_real_intents_reduced(shared, tmp_path, ray_cluster):
    """The first 20 of banking77's 77 classes: its rows lie in runs of one class."""
    rows = {split: read_jsonl(shared / "banking77" / f"{split}.jsonl") for split in ("train", "test")}
    few = {split: pd.DataFrame([row for row in rows[split] if row["label"] < 20]) for split in rows}
    spec = {
        "data": {"id": "id"},
        "encoder": {"model": MINILM, "pooling": "mean"},
        "head": {"optimizer": "lbfgs", "l2": 1e-4},
        "output": str(tmp_path / "run"),
    }
    summary = bertray.run(
        spec, train=few["train"].groupby("label").head(30), test=few["test"].groupby("label").head(15)
    )
    assert summary["metrics"]["test"]["rows"] == 300
    assert summary["metrics"]["test"]["accuracy"] > 0.92


def test_the_notebook_itself(tmp_path, ray_cluster, monkeypatch):
    """jobs/specs/tweets.yaml, where its data set and bert-base-uncased are on this disk."""
    from bertray.checkpoints import find
    from bertray.sources import from_hub

    monkeypatch.chdir(ROOT)
    spec = bertray.load_spec("jobs/specs/tweets.yaml", [f"output={tmp_path}"])
    try:
        find(spec.encoder.model)
        from_hub(spec.data.train)
    except BertrayError as error:
        pytest.skip(f"bert-base-uncased or the tweets are not on this disk: {error}")
    summary = bertray.run(spec)
    assert summary["metrics"]["test"]["accuracy"] > 0.55


def test_the_spec_for_ones_own_files(tmp_path, ray_cluster, monkeypatch):
    monkeypatch.chdir(ROOT)
    summary = bertray.run("jobs/specs/files.yaml", overrides=[f"output={tmp_path}"])
    assert summary["metrics"]["test"]["accuracy"] > 0.8
    assert Location(summary["report"]).exists()
