"""Rows of each task as people's files have them: numbers for names, contexts, and what is set aside and why."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import MINILM

import bertray
from bertray.errors import BertrayError, SourceError

HEAD = {"optimizer": "lbfgs", "l2": 0.001}


@pytest.fixture
def run(tiny, tmp_path, rows_file, ray_cluster):
    def of(train, test=None, head=HEAD, encoder=(), until="evaluate", given=None, **parts):
        data = {**parts.pop("data", {})}
        if not given:
            data |= {"train": train if isinstance(train, str) else rows_file(train)}
            data |= {"test": rows_file(test, "test.jsonl")} if test else {}
        spec = {
            "data": data,
            "encoder": {"model": str(tiny), "pooling": "mean"} | dict(encoder),
            "head": head,
            "output": str(tmp_path / "run"),
        } | parts
        return bertray.run(spec, until=until, **(given or {}))

    return of


def tagged(count, names=("O", "B-n")):
    """Even numbers are entities."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        numbers = rng.integers(0, 9, rng.integers(0, 6)).tolist()
        yield {"text": [f"number{n}" for n in numbers], "label": [names[n % 2 == 0] for n in numbers]}


TOKENS = {"task": "token-classification"}


def test_tags_as_numbers_whose_names_the_rows_carry(run):
    import datasets

    names = ["O", "B-n"]
    kinds = {"text": datasets.List(datasets.Value("string")), "label": datasets.List(datasets.ClassLabel(names=names))}
    rows = list(tagged(40, (0, 1)))
    given = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    summary = run(None, given={"train": given, "test": given}, **TOKENS)
    bundle = bertray.load(summary["bundle"]).bundle
    assert bundle.labels == ("O", "B-n")
    table = pq.read_table(f"{summary['output']}/predictions/test.parquet")
    assert [json.loads(label) for label in table["label"].to_pylist()] == [
        [names[i] for i in row["label"]] for row in rows
    ]
    assert summary["metrics"]["test"]["f1"] > 0.9


@pytest.mark.parametrize("names", [("NOUN", "VERB"), (0, 1)])
def test_tags_that_are_none_are_refused_in_a_line(run, names):
    with pytest.raises(SourceError, match="is no tag of a word: these are O, or B-, I-, E- or S- and a type") as caught:
        run(list(tagged(20, names)), **TOKENS)
    assert "\n" not in str(caught.value)


def test_texts_without_a_word_have_no_tags_wherever_they_stand(run):
    rows = [{"text": [], "label": []}, *tagged(30), {"text": [], "label": []}]
    summary = run(rows, rows, **TOKENS)
    assert summary["rows"]["test"]["rows"] == 32
    table = pq.read_table(f"{summary['output']}/predictions/test.parquet")
    assert (table["tags"][0].as_py(), table["tags"][31].as_py()) == ([], [])
    assert table["loss"][0].as_py() == 0


def test_a_unit_of_which_no_row_can_be_used(run):
    bad = [{"text": ["a"], "label": ["O", "O"]}] * 5
    rows = [*tagged(5), *bad, *tagged(15), *bad]
    summary = run(rows, rows, data={"unit_rows": 5}, encoder={"precision": "fp32"}, **TOKENS)
    assert summary["rows"]["train"]["reasons"] == {"label has 2 tags for 1 words": 10}
    assert summary["metrics"]["test"]["rows"] == 20


def test_a_context_changes_the_tags(run):
    """The same words, whose tags depend on what they are said of."""
    contexts = {"The shop is near the river.": "B-shop", "The old king lives in a castle.": "B-king"}
    rows = [
        {"text": ["it", "was", f"word{i}"], "context": context, "label": [tag, "O", "O"]}
        for i in range(12)
        for context, tag in contexts.items()
    ]
    encoder = {"model": MINILM, "pooling": "first"}
    summary = run(rows, data={"text_pair": "context"}, encoder=encoder, **TOKENS)
    predictor = bertray.load(summary["bundle"])
    answers = predictor.predict([["it", "was", "late"]] * 2, list(contexts)).labels
    assert [row[0]["label"] for row in answers] == ["shop", "king"]
    with pytest.raises(BertrayError, match="takes pairs of texts"):
        predictor.predict([["it", "was", "late"]])


def test_questions_whose_answers_are_not_in_their_contexts_are_set_aside(run):
    good = [
        {"q": "who", "c": f"it is name{i} now", "label": [{"text": f"name{i}", "answer_start": 6}] if i % 3 else []}
        for i in range(30)
    ]
    bad = [
        {"q": "who", "c": "it is Bo", "label": [{"text": "Bo", "answer_start": 5}]},
        {"q": "who", "c": None, "label": []},
        {"q": None, "c": "it is Bo", "label": []},
        {"q": "who", "c": "it is Bo", "label": "Bo"},
        {"q": "who", "c": "it is Bo"},
    ]
    encoder = {"pooling": "mean"}
    data = {"text": "q", "text_pair": "c"}
    summary = run([*bad, *good], good[:9], data=data, encoder=encoder, task="question-answering")
    assert summary["rows"]["train"]["rows"] == 30
    assert summary["rows"]["train"]["reasons"] == {
        "label has an answer that is not where answer_start says": 1,
        "text_pair is null": 1,
        "text is null": 1,
        "label is no list of objects with text and answer_start": 1,
        "label is null": 1,
    }
    predictor = bertray.load(summary["bundle"])
    assert predictor.predict([], []).labels == []
    assert len(predictor.predict(["who", "who"], ["", "x"]).labels) == 2
    table = pq.read_table(f"{summary['output']}/predictions/test.parquet")
    found = [answer["text"] for answer in predictor.predict(["who"] * 9, [row["c"] for row in good[:9]]).labels]
    assert found == table["predicted"].to_pylist()


def test_several_labels_of_a_csv_file(run, tmp_path):
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + 'one two,1|2\none,1\ntwo,2\nthree,\nall,"[""1"", ""2"", 10]"\n' * 6
    )
    summary = run(str(tmp_path / "rows.csv"), problem="multi_label")
    assert summary["rows"]["train"]["rejected"] == 0
    assert bertray.load(summary["bundle"]).bundle.labels == ("1", "2", "10")
    table = pq.read_table(f"{summary['output']}/predictions/train.parquet")
    assert table["label"].to_pylist()[:5] == [["1", "2"], ["1"], ["2"], [], ["1", "2", "10"]]
    assert summary["metrics"]["train"]["exact"] > 0.9


def test_rows_without_any_label_at_all(run):
    with pytest.raises(SourceError, match="None of the training rows has a label"):
        run([{"text": f"text {i}", "label": []} for i in range(9)], problem="multi_label")


@pytest.mark.parametrize(
    ("problem", "labels", "reasons"),
    [
        (
            "multi_label",
            [["a"], "b|a", 5, None, [None], {"a": 1}],
            {"label is no list of labels": 3, "label is null": 1},
        ),
        ("regression", [1, "2.5", "much", None, True, [1]], {"label is no number": 3, "label is null": 1}),
        ("single_label", ["a", "b", 1.5, None, "a", "b"], {"label is not a whole number": 1, "label is null": 1}),
    ],
)
def test_labels_of_another_form_are_set_aside(run, problem, labels, reasons):
    rows = [{"text": f"text {i} {j}", "label": label} for j in range(3) for i, label in enumerate(labels)]
    summary = run(rows, problem=problem, until="embed")
    assert summary["rows"]["train"]["reasons"] == {reason: 3 * count for reason, count in reasons.items()}


def test_summaries_are_json_as_it_is_written(run):
    rows = [{"text": f"text {i % 5}", "label": "ab"[i % 2]} for i in range(20)]
    summary = run(rows, rows[:1])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
