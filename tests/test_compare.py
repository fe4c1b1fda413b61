"""Runs side by side, from folders such as runs leave them."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from scipy.stats import binomtest

from bertray.compare import compare, lines, mcnemar
from bertray.errors import BertrayError

SUMMARY = {
    "task": "text-classification",
    "problem": "single_label",
    "encoder": {"model": "minilm", "pooling": "mean", "max_length": 512},
    "features": ["mean_6"],
    "head": {"optimizer": "lbfgs", "l2": 0.001},
    "rows": {"train": {"rows": 720}, "test": {"rows": 6}},
    "metrics": {"train": {"accuracy": 1.0, "loss": 0.1}, "test": {"accuracy": 0.5, "loss": 0.7, "rows": 6}},
    "intervals": {"test": {"accuracy": [0.25, 0.75]}},
    "seconds": {"embed": 1.25, "total": 2.5},
}
LABELS = ["a", "a", "a", "b", "b", "b"]


@pytest.fixture
def made(tmp_path):
    """A function that writes a run with some facts and answers, and gives its folder."""

    def write(name, predicted=None, labels=LABELS, ids=None, tags=None, **facts):
        folder = tmp_path / name
        (folder / "predictions").mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(SUMMARY | facts))
        if predicted is not None:
            ids = ids or [f"t.csv:{i}" for i in range(len(predicted))]
            table = pa.table({"id": ids, "label": labels, "predicted": predicted, "text": ["t"] * len(ids)})
            table = table if tags is None else table.append_column("tags", pa.array(tags))
            pq.write_table(table, folder / "predictions" / "test.parquet")
        return str(folder)

    return write


def test_only_what_differs_is_told_and_the_best_is_marked(made):
    better = {"test": {"accuracy": 0.75, "loss": 0.5, "ece": None}}
    head = {"optimizer": "adam", "l2": 0.001, "lr": 0.01}
    found = compare([made("one"), made("two", metrics=better, head=head, features=["cls_6"])])
    assert found["differing"] == {
        "features": [["mean_6"], ["cls_6"]],
        "head.optimizer": ["lbfgs", "adam"],
        "head.lr": [None, 0.01],
    }
    assert found["metrics"] == {
        "accuracy": {"values": [0.5, 0.75], "intervals": [[0.25, 0.75], [0.25, 0.75]], "best": [1]},
        "loss": {"values": [0.7, 0.5], "intervals": [None, None], "best": [1]},
        "ece": {"values": [None, None], "intervals": [None, None], "best": []},
    }
    assert [run["rows"] for run in found["runs"]] == [{"train": 720, "test": 6}] * 2
    assert json.loads(json.dumps(found)) == found


def test_equal_runs_have_no_best_and_no_difference(made):
    found = compare([made("one", LABELS), made("two", LABELS)])
    assert found["differing"] == {}
    assert found["metrics"]["accuracy"]["best"] == []
    assert found["paired"] == [{"first": 0, "other": 1, "rows": 6, "only_first": 0, "only_other": 0, "p": 1.0}]


def test_row_by_row_also_in_another_order(made):
    one = made("one", ["a", "a", "a", "b", "a", "a"])
    order = [5, 3, 1, 0, 2, 4]
    answers = ["a", "b", "b", "a", "b", "b"]
    ids = [f"t.csv:{i}" for i in order]
    two = made("two", [answers[i] for i in order], [LABELS[i] for i in order], ids)
    (pair,) = compare([one, two])["paired"]
    # one has 0, 1, 2, 3 right; two 0, 4, 5
    assert pair == {"first": 0, "other": 1, "rows": 6, "only_first": 3, "only_other": 2, "p": pytest.approx(1)}


def test_several_labels_a_row_are_compared_as_sets(made):
    labels = [["a", "b"], ["a"], []]
    kind = {"problem": "multi_label"}
    found = compare([made("one", [["b", "a"], [], []], labels, **kind), made("two", labels, labels, **kind)])
    assert (found["paired"][0]["only_first"], found["paired"][0]["only_other"]) == (0, 1)


def test_answers_are_compared_as_squad_does(made):
    labels = ['[[0, "The Oslo"], [9, "Oslo!"]]', "[]"]  # as predictions hold them
    kind = {"task": "question-answering"}
    found = compare([made("one", ["oslo", ""], labels, **kind), made("two", ["Rome", "x"], labels, **kind)])
    assert (found["paired"][0]["only_first"], found["paired"][0]["only_other"]) == (2, 0)


def test_words_are_compared_by_their_tags(made):
    labels, kind = ['["O", "B-who"]', '["O"]'], {"task": "token-classification"}
    entities = [[{"label": "who", "start": 2, "stop": 5}], []]
    one = made("one", entities, labels, tags=[["O", "B-who"], ["O"]], **kind)
    two = made("two", entities, labels, tags=[["O", "I-who"], ["O"]], **kind)
    found = compare([one, two])
    assert (found["paired"][0]["only_first"], found["paired"][0]["only_other"]) == (1, 0)


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ({"predicted": LABELS[:5], "labels": LABELS[:5]}, "their test rows differ"),
        ({"predicted": LABELS, "labels": ["c"] * 6}, "their test rows differ"),
        ({"predicted": LABELS, "ids": ["x"] * 6}, "their test rows differ"),
        ({"predicted": None}, "predictions are missing"),
    ],
)
def test_other_test_rows_are_not_compared_row_by_row(made, second, why):
    found = compare([made("one", LABELS), made("two", **second)])
    assert found["paired"] == []
    assert found["notes"] == [f"A and B are not compared row by row: {why}."]


def test_different_tasks_share_what_they_share(made):
    other = {"task": "token-classification", "metrics": {"test": {"f1": 0.5, "loss": 0.1}}}
    found = compare([made("one", LABELS), made("two", LABELS, **other)])
    assert list(found["metrics"]) == ["loss"]
    assert found["metrics"]["loss"]["best"] == [] and found["paired"] == []
    assert (
        "Different tasks, text-classification (single_label), token-classification (single_label)" in found["notes"][0]
    )


def test_without_test_rows_training_rows_are_judged(made):
    found = compare([made("one", LABELS), made("two", metrics={"train": {"accuracy": 0.9}})])
    assert found["metrics"]["accuracy"]["values"] == [0.5, 0.9]
    assert [run["judged"] for run in found["runs"]] == ["test", "train"]
    assert "Not all have test rows" in found["notes"][0]


@pytest.mark.parametrize("pair", [(0, 0), (0, 1), (3, 5), (10, 2), (100, 61), (4_000, 4_200)])
def test_mcnemar_is_the_binomial_test(pair):
    expected = binomtest(pair[0], sum(pair)).pvalue if sum(pair) else 1.0
    np.testing.assert_allclose([mcnemar(*pair), mcnemar(*pair[::-1])], expected, rtol=1e-9)


def test_mcnemar_of_very_many_rows():
    assert mcnemar(500_000, 500_000) == 1.0
    assert mcnemar(0, 1_000_000) == 0.0


def test_lines_fit_80_columns_whatever_the_runs_are_called(made):
    model = {"model": "an-organisation/a-model-with-a-name-" + "long-" * 30, "pooling": ["mean", "cls"]}
    folders = [made(f"{'deep-' * 20}{i}", LABELS, encoder=model | {"n": i}, head={"l2": 10.0**-i}) for i in range(9)]
    folders[3] = made("other", LABELS, encoder={"model": "minilm"})
    told = list(lines(compare(folders)))
    assert max(map(len, told)) <= 80
    assert "A and I" in "\n".join(told)
    assert sum(line.startswith("accuracy") for line in told) == 3  # four runs a block


def test_a_table_by_sight(made):
    one = made("one", ["b", "b", "b", *LABELS[3:]])
    two = made("two", LABELS, metrics={"test": {"accuracy": 1.0, "loss": 0.5}}, head={"optimizer": "adam", "l2": 0.0})
    told = list(lines(compare([one, two])))
    assert told[0].startswith("A  ") and told[0].endswith("/one")
    assert [line.split() for line in told[3:]] == [
        ["A", "B"],
        ["head.optimizer", "lbfgs", "adam"],
        ["head.l2", "0.001", "0"],
        ["train", "rows", "720", "720"],
        ["test", "rows", "6", "6"],
        ["accuracy", "0.5000", "1.0000*"],
        ["95", "%", "0.250-0.750", "0.250-0.750"],
        ["loss", "0.7000", "0.5000*"],
        ["embed,", "s", "1.2", "1.2"],
        ["total,", "s", "2.5", "2.5"],
        [],
        ["row", "by", "row", "only", "A", "right", "only", "other", "p"],
        ["A", "and", "B", "0", "3", "0.25"],
    ]


def test_what_is_no_finished_run_is_told_in_a_line(made, tmp_path):
    one = made("one")
    (tmp_path / "begun" / "stores").mkdir(parents=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.json").write_text("{")
    for folders, message in (
        ([one], "at least two"),
        ([one, str(tmp_path / "nothing")], "nothing is not the folder of a run"),
        ([one, str(tmp_path / "begun")], "begun is not evaluated yet"),
        ([one, str(tmp_path / "broken")], "metrics.json is damaged"),
    ):
        with pytest.raises(BertrayError, match=message) as error:
            compare(folders)
        assert "\n" not in str(error.value)
    damaged = made("damaged", LABELS)
    (tmp_path / "damaged" / "predictions" / "test.parquet").write_bytes(b"no")
    with pytest.raises(BertrayError, match="test.parquet is damaged"):
        compare([damaged, made("two", LABELS)])


def test_the_command(made):
    runs = [made("one", LABELS), made("two", LABELS)]
    command = [sys.executable, "-m", "bertray.cli", "compare"]
    plain = subprocess.run([*command, *runs], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "row by row" in plain.stdout
    done = subprocess.run([*command, "--json", *runs], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == compare(runs)
    wrong = subprocess.run([*command, runs[0], "nothing"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1
