import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SIX, demo_rows

import bertray
from bertray import bundle as bundles
from bertray.errors import BertrayError, BundleError
from bertray.predict import Predictor, join, predict_files
from bertray.sources import Columns
from bertray.spec import RaySizes, Source
from bertray.storage import Location
from bertray.store import Store
from bertray.vectors import vectors_of

TEST = str(ROOT / "jobs" / "data" / "demo-test.csv")


@pytest.fixture(scope="module")
def predictor(demo):
    return bertray.load(demo["bundle"])


def test_labels_and_probabilities_of_texts(predictor):
    labels, probabilities = predictor.predict(list(SIX))
    assert labels == list(SIX.values())
    assert probabilities.shape == (6, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert predictor.predict("this is great news!").labels == ["positive"]
    assert predictor.predict([]).labels == []


def test_its_vectors_are_the_stored_ones(demo, predictor):
    from pathlib import Path

    (folder,) = Path(demo["output"]).glob("stores/test-*")
    (table,) = Store(str(folder)).tables(["text", "mean_6"])
    vectors = predictor.encoder.encode(table["text"].to_pylist()).vectors
    np.testing.assert_allclose(vectors.astype(np.float32), vectors_of(table, ["mean_6"]).astype(np.float32), atol=1e-3)
    answers = pq.read_table(Path(demo["output"]) / "predictions" / "test.parquet")
    assert predictor.predict(table["text"].to_pylist()).labels == answers["predicted"].to_pylist()


@pytest.mark.parametrize("texts", [[5], [None], ["a", b"b"]])
def test_what_is_not_text_is_refused(predictor, texts):
    with pytest.raises(BertrayError, match="Texts must be strings"):
        predictor.predict(texts)


def test_pairs_are_refused_by_a_head_for_single_texts(predictor):
    with pytest.raises(BertrayError, match="takes single texts"):
        predictor.predict(["a"], ["b"])


def test_a_changed_encoder_is_refused(demo):
    from dataclasses import replace

    bundle = bundles.load(demo["bundle"])
    identity = {**bundle.encoder["identity"], "tokenizer": "0" * 64}
    with pytest.raises(BundleError, match="The tokenizer of .* is not what the bundle was fitted on"):
        Predictor(replace(bundle, encoder={**bundle.encoder, "identity": identity}))


@pytest.fixture(scope="module")
def answers(demo, tmp_path_factory, ray_cluster):
    """A folder of answers to the demo's test rows."""
    output = tmp_path_factory.mktemp("answers") / "answers"
    manifest = predict_files(demo["bundle"], Source(path=TEST), str(output), Columns("text"), RaySizes())
    assert manifest.total("rows") == 180
    return output


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", ""])
def test_files_are_labelled_in_order(demo, predictor, answers, tmp_path, kind):
    output = tmp_path / f"answers.{kind}" if kind else answers
    if kind == "csv":
        predict_files(demo["bundle"], Source(path=TEST), str(output), Columns("text"), RaySizes())
        assert [path.name for path in tmp_path.iterdir()] == ["answers.csv"]  # nothing is left beside it
    elif kind:
        join(Store(str(answers)), Location(str(output)), kind, bundles.load(demo["bundle"]))
    if kind == "csv":
        table = pa.csv.read_csv(output)
        assert table.column_names == ["id", "text", "label", "score", "p_negative", "p_neutral", "p_positive"]
    elif kind == "jsonl":
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        table = pa.Table.from_pylist(rows)
    else:
        table = pq.read_table(output if kind else output / "shards")
    texts = [row["text"] for row in demo_rows("test")]
    assert table["text"].to_pylist() == texts
    assert table["label"].to_pylist() == predictor.predict(texts).labels


def test_rows_that_cannot_be_labelled_are_kept_beside_the_answers(demo, tmp_path, ray_cluster):
    (tmp_path / "rows.jsonl").write_text('{"text": "so good"}\n{"text": null}\n{"text": "so bad"}\n')
    source, output = Source(path=str(tmp_path / "rows.jsonl")), str(tmp_path / "answers.csv")
    with pytest.raises(BertrayError, match="has no column 'words'"):
        predict_files(demo["bundle"], source, output, Columns("words"), RaySizes())
    predict_files(demo["bundle"], source, output, Columns("text"), RaySizes())  # not held up by the mistake before
    table = pa.csv.read_csv(output)
    assert table["id"].to_pylist() == ["rows.jsonl:0", "rows.jsonl:2"]
    (reject,) = [json.loads(line) for line in (tmp_path / "answers.csv.rejects.jsonl").read_text().splitlines()]
    assert reject == {"id": "rows.jsonl:1", "reason": "text is null", "preview": ""}


def test_pairs_and_places_that_do_not_fit_are_refused(demo, tmp_path):
    (tmp_path / "rows.csv").write_text("text,other\na,b\n")
    source = Source(path=str(tmp_path))
    with pytest.raises(BundleError, match="takes single texts"):
        predict_files(demo["bundle"], source, "x.csv", Columns("text", "other"), RaySizes())
    with pytest.raises(BertrayError, match="lies inside the input"):
        predict_files(demo["bundle"], source, str(tmp_path / "x.csv"), Columns("text"), RaySizes())
    with pytest.raises(BertrayError, match="is one of the input's files"):
        rows = str(tmp_path / "rows.csv")
        predict_files(demo["bundle"], Source(path=rows), rows, Columns("text"), RaySizes())


def test_answers_of_another_job_are_not_mixed_in(demo, answers, tmp_path):
    output = str(answers)
    predict_files(demo["bundle"], Source(path=TEST), output, Columns("text"), RaySizes())  # again: nothing to do
    with pytest.raises(BertrayError, match="holds predictions of another bundle or input"):
        predict_files(demo["bundle"], Source(path=TEST), output, Columns("label"), RaySizes())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(BertrayError, match="holds other files"):
        predict_files(demo["bundle"], Source(path=TEST), str(tmp_path / "mine"), Columns("text"), RaySizes())
