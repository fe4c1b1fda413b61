"""Every task from spec to answers: in Python, in files and over HTTP, which all have to say the same."""

import json
import random
import urllib.request
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import MINILM, demo_rows, serving

import bertray
from bertray import bundle as bundles
from bertray.predict import Predictor, predict_files
from bertray.sources import Columns
from bertray.spec import RaySizes, Source
from bertray.store import Store

NAMES = ["Ann", "Bert", "Carla", "Dmitri", "Esra", "Femi", "Greta", "Hugo"]
TOWNS = ["Paris", "Lagos", "Lima", "Oslo", "Cairo", "Delhi", "Quito", "Tunis"]
MINI = {"model": MINILM}
SOLVED = {"optimizer": "lbfgs", "standardize": True, "l2": 0.01}


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def journeys(count, seed):
    """Sentences of who goes where: words with tags, and the same as text with ranges."""
    rng = random.Random(seed)
    for number in range(count):
        name, town, other = rng.choice(NAMES), rng.choice(TOWNS), rng.choice(TOWNS)
        words = rng.choice(
            [f"{name} went to {town} by train", f"In {town} they met {name} again", f"{name} left {town} for {other} ."]
        )
        words = words.split()
        tags = ["B-who" if word in NAMES else "B-where" if word in TOWNS else "O" for word in words]
        yield {"id": f"{seed}-{number}", "words": words, "tags": tags}


def ranges(row):
    text, found = " ".join(row["words"]), []
    for place, (word, tag) in enumerate(zip(row["words"], row["tags"], strict=True)):
        start = len(" ".join(row["words"][:place])) + (place > 0)
        if tag != "O":
            found.append({"start": start, "end": start + len(word), "label": tag[2:]})
    return {"id": row["id"], "text": text, "entities": found}


def asked(count, seed):
    """Questions about a short context; every fourth has no answer in it."""
    rng = random.Random(seed)
    for number in range(count):
        name, town = rng.choice(NAMES), rng.choice(TOWNS)
        context = (
            f"The shop opens at nine. {name} works there on Mondays. It lies in the middle of {town}, near a park."
        )
        question, answer = rng.choice([("Who works there?", name), ("Where does the shop lie?", town)])
        if number % 4 == 3:
            question, answer = "What colour is the moon on the flag?", None
        answers = [{"text": answer, "answer_start": context.index(answer)}] if answer else []
        yield {"id": f"{seed}-{number}", "question": question, "context": context, "answers": answers}


@pytest.fixture(scope="module")
def words(tmp_path_factory, ray_cluster):
    """A head for words, fitted on lists of words with tags: its summary, and the folder of its rows."""
    folder = tmp_path_factory.mktemp("words")
    rows = {
        name: list(journeys(count, seed)) for name, count, seed in (("train", 150, 1), ("dev", 40, 2), ("test", 40, 3))
    }
    spec = {
        "task": "token-classification",
        "data": {name: write(folder / f"{name}.jsonl", part) for name, part in rows.items()}
        | {"text": "words", "label": "tags", "id": "id"},
        "encoder": {**MINI, "pooling": "first", "layers": "all"},
        "head": {**SOLVED, "search": {"layers": [3, 4, "last"], "l2": [0.001, 0.01]}},
        "examples": ["Greta flew to Oslo"],
        "output": str(folder / "run"),
    }
    return bertray.run(spec), folder, spec


def test_words_from_spec_to_answers(words):
    summary, _, _ = words
    assert summary["metrics"]["test"]["f1"] > 0.9
    (example,) = summary["examples"]
    assert "Greta (who)" in example["label"]
    predictor = bertray.load(summary["bundle"])
    (found,) = predictor.predict("Hugo was seen in Lima").labels
    assert [(entity["label"], entity["text"], entity["start"]) for entity in found] == [
        ("who", "Hugo", 0),
        ("where", "Lima", 17),
    ]
    assert predictor.predict([["Hugo", "was", "seen", "in", "Lima"]]).labels == [found]  # also as a list of words
    assert predictor.predict(["", "  "]).labels == [[], []]


def test_states_that_are_encoded_again_give_the_same_head(words, tmp_path):
    _, _, spec = words
    head = {**SOLVED, "folds": 0}
    kept, made = (
        bertray.run(
            {
                **spec,
                "head": head,
                "encoder": {**MINI, "pooling": "first", "layers": [4], "states": states},
                "output": str(tmp_path / states),
            }
        )
        for states in ("store", "encode")
    )
    one, other = (bertray.load(run["bundle"]).bundle.head for run in (kept, made))
    np.testing.assert_allclose(one.weight, other.weight, atol=1e-5)
    assert kept["metrics"]["test"] == pytest.approx(made["metrics"]["test"])
    (shard,) = (tmp_path / "encode").glob("stores/train-*/shards/*")
    assert pq.read_schema(shard).names == ["id", "text", "label", "starts", "stops"]


def test_ranges_of_characters_give_the_same_head(words, tmp_path):
    _, _, spec = words
    fields = {"encoder": {**MINI, "pooling": "mean", "layers": [4]}, "head": {**SOLVED, "folds": 0}}
    rows = {name: list(journeys(count, seed)) for name, count, seed in (("train", 80, 1), ("test", 40, 3))}
    runs = []
    for kind, text, label, change in (("lists", "words", "tags", dict), ("texts", "text", "entities", ranges)):
        data = {name: write(tmp_path / f"{kind}-{name}.jsonl", map(change, part)) for name, part in rows.items()}
        data |= {"text": text, "label": label, "labels": ["O", "B-who", "B-where"]}
        runs.append(bertray.run({**spec, **fields, "examples": [], "data": data, "output": str(tmp_path / kind)}))
    one, other = (bertray.load(run["bundle"]).bundle.head for run in runs)
    np.testing.assert_allclose(one.weight, other.weight, atol=1e-5)
    assert runs[0]["metrics"]["test"]["f1"] == runs[1]["metrics"]["test"]["f1"] > 0.8


def test_rows_with_wrong_annotations_are_set_aside(tmp_path, ray_cluster):
    rows = [
        *({"words": row["words"], "tags": row["tags"]} for row in journeys(40, 5)),
        {"words": ["a"], "tags": ["O", "O"]},
    ]
    rows += [
        {"words": "a text", "tags": [{"start": 0, "end": 99, "label": "who"}]},
        {"words": 5, "tags": []},
        {"words": None, "tags": []},
    ]
    spec = {
        "task": "token-classification",
        "data": {"train": write(tmp_path / "rows.jsonl", rows), "text": "words", "label": "tags"},
        "encoder": {**MINI, "pooling": "first"},
        "head": {**SOLVED, "folds": 0},
        "output": str(tmp_path / "run"),
    }
    train = bertray.run(spec, until="fit")["rows"]["train"]
    assert (train["rows"], train["rejected"]) == (40, 4)
    assert sorted(train["reasons"]) == [
        "label has 2 tags for 1 words",
        "label has a range from 0 to 99 in a text of 6 characters",
        "text is a number",
        "text is null",
    ]


@pytest.fixture(scope="module")
def questions(tmp_path_factory, ray_cluster):
    folder = tmp_path_factory.mktemp("questions")
    spec = {
        "task": "question-answering",
        "data": {
            "train": write(folder / "train.jsonl", asked(160, 1)),
            "test": write(folder / "test.jsonl", asked(40, 2)),
            "id": "id",
            "text": "question",
            "text_pair": "context",
            "label": "answers",
        },
        "encoder": {**MINI, "pooling": "mean", "layers": [4]},
        "head": SOLVED,
        "output": str(folder / "run"),
    }
    return bertray.run(spec), folder, spec


def test_questions_from_spec_to_answers(questions):
    summary, _, spec = questions
    assert summary["metrics"]["test"]["f1"] > 0.8
    assert summary["metrics"]["test"]["no_answer_f1"] > 0.8
    predictor = bertray.load(summary["bundle"])
    row = next(asked(1, 9))
    (found,) = predictor.predict([row["question"]], [row["context"]]).labels
    assert found["text"] == row["context"][found["start"] : found["stop"]] == row["answers"][0]["text"]
    (none,) = predictor.predict(["What colour is the moon on the flag?"], [row["context"]]).labels
    assert (none["text"], none["start"], none["stop"]) == ("", 0, 0)
    again = bertray.run(
        {**spec, "encoder": {**spec["encoder"], "states": "encode"}, "output": spec["output"] + "-again"}
    )
    np.testing.assert_allclose(
        bertray.load(again["bundle"]).bundle.head.weight, predictor.bundle.head.weight, atol=1e-4
    )


def test_long_contexts_are_read_in_windows(questions):
    summary, _, _ = questions
    predictor = bertray.load(summary["bundle"])
    row = next(asked(1, 9))
    predictor.encoder.tokenizer.truncation, predictor.encoder.tokenizer.max_length = "window", 64
    predictor.encoder.tokenizer.overlap = 16
    long = "Nothing of note is said here about anything at all. " * 12 + row["context"]
    (found,) = predictor.predict([row["question"]], [long]).labels
    assert found["text"] == row["answers"][0]["text"]
    assert found["start"] > 600


def topics(rows):
    return [[word for word in ("happy", "sad", "work", "home") if word in row["text"].lower()] for row in rows]


@pytest.fixture(scope="module")
def several(tmp_path_factory, ray_cluster):
    """Any number of labels a row."""
    folder = tmp_path_factory.mktemp("several")
    data = {}
    for name in ("train", "test"):
        rows = demo_rows(name)
        found = zip(rows, topics(rows), strict=True)
        data[name] = write(folder / f"{name}.jsonl", ({"text": row["text"], "topics": own} for row, own in found))
    spec = {
        "problem": "multi_label",
        "data": {**data, "label": "topics"},
        "encoder": {**MINI, "pooling": "mean"},
        "head": SOLVED,
    }
    return bertray.run({**spec, "output": str(folder / "run")}), folder


def test_several_labels(several):
    summary, _ = several
    assert {"exact", "micro_f1", "macro_f1", "auroc", "loss"} <= set(summary["metrics"]["test"])
    assert summary["metrics"]["train"]["micro_f1"] > 0.8
    labels, probabilities = bertray.load(summary["bundle"]).predict(["so sad about my work at home", "the bus is late"])
    assert set(labels[0]) <= {"happy", "sad", "work", "home"}
    for own, row in zip(labels, probabilities, strict=True):
        assert len(own) == (row > 0.5).sum()


@pytest.fixture(scope="module")
def numbers(tmp_path_factory, ray_cluster):
    folder = tmp_path_factory.mktemp("numbers")
    scale = {"negative": -1.0, "neutral": 0.0, "positive": 1.0}
    data = {}
    for name in ("train", "test"):
        rows = [{"text": row["text"], "mood": scale[row["label"]]} for row in demo_rows(name)]
        data[name] = write(
            folder / f"{name}.jsonl", [*rows, {"text": "x", "mood": "much"}, {"text": "x", "mood": None}]
        )
    # One precision, since `auto` chooses by measurement, in each process anew.
    encoder = {**MINI, "pooling": "mean", "precision": "fp32"}
    spec = {"problem": "regression", "data": {**data, "label": "mood"}, "encoder": encoder}
    return bertray.run({**spec, "head": {**SOLVED, "l2": 0.1}, "output": str(folder / "run")}), folder


def test_numbers(numbers):
    summary, folder = numbers
    assert summary["metrics"]["test"]["pearson"] > 0.6
    assert summary["rows"]["test"]["reasons"] == {"label is no number": 1, "label is null": 1}
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (train,), (test,) = (list((folder / "run" / "stores").glob(f"{name}-*")) for name in ("train", "test"))
    (x, y), (u, v) = (Store(str(place)).load() for place in (train, test))
    ridge = make_pipeline(StandardScaler(), Ridge(alpha=0.1 * len(x))).fit(x.astype(float), np.array(y, float))
    expected = np.corrcoef(ridge.predict(u.astype(float)), np.array(v, float))[0, 1]
    assert summary["metrics"]["test"]["pearson"] == pytest.approx(expected, abs=1e-4)
    (label,) = bertray.load(summary["bundle"]).predict("I love this so much").labels
    assert label > 0.2


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, ray_cluster):
    """Pairs whose texts recur in rows and splits, encoded apart."""
    folder = tmp_path_factory.mktemp("pairs")
    rng, rows = random.Random(0), demo_rows("train")[:60]
    made = [
        {"a": one["text"], "b": other["text"], "same": "yes" if one["label"] == other["label"] else "no"}
        for one, other in (rng.sample(rows, 2) for _ in range(300))
    ]
    spec = {
        "data": {
            "train": write(folder / "train.jsonl", made[:240]),
            "test": write(folder / "test.jsonl", made[240:]),
            "text": "a",
            "text_pair": "b",
            "label": "same",
        },
        "encoder": {**MINI, "pooling": "mean", "pair": "siamese"},
        "head": SOLVED,
        "output": str(folder / "run"),
    }
    return bertray.run(spec), folder, spec, made


def test_each_distinct_text_of_pairs_is_encoded_once(pairs):
    summary, folder, spec, made = pairs
    distinct = {row[side] for row in made for side in ("a", "b")}
    assert summary["rows"]["texts"]["rows"] == len(distinct) <= 60
    assert (summary["rows"]["train"]["rows"], summary["rows"]["test"]["rows"]) == (240, 60)
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("run/stores/*/shards/*")}
    bertray.run({**spec, "head": {**SOLVED, "l2": 0.1}})
    assert {path: path.stat().st_mtime_ns for path in folder.glob("run/stores/*/shards/*")} == shards
    predictor = bertray.load(summary["bundle"])
    answers = pq.read_table(folder / "run" / "predictions" / "test.parquet")
    labels, _ = predictor.predict([row["a"] for row in made[240:]], [row["b"] for row in made[240:]])
    assert len(labels) == answers.num_rows


@pytest.mark.parametrize("kind", ["words", "questions", "several", "numbers", "pairs"])
@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_files_say_what_python_says(request, tmp_path, kind, format):
    if format != "jsonl" and kind not in ("words", "several"):
        pytest.skip("each way of writing lists once is enough")
    summary, folder, *_ = request.getfixturevalue(kind)
    predictor = bertray.load(summary["bundle"])
    names = predictor.bundle.columns
    output = tmp_path / f"answers.{format}"
    columns = Columns(names["text"], names["text_pair"])
    predict_files(summary["bundle"], Source(path=str(folder / "test.jsonl")), str(output), columns, RaySizes())
    rows = [row for line in (folder / "test.jsonl").read_text().splitlines() if (row := json.loads(line))]
    texts, second = (
        [row[names["text"]] for row in rows],
        [row[names["text_pair"]] for row in rows if names["text_pair"]],
    )
    expected = predictor.predict(texts, second or None).labels
    if format == "csv":
        import pandas

        found = [json.loads(cell) for cell in pandas.read_csv(output)["entities" if kind == "words" else "label"]]
    elif format == "parquet":
        found = pq.read_table(output)["entities" if kind == "words" else "label"].to_pylist()
    else:
        answers = [json.loads(line) for line in output.read_text().splitlines()]
        found = [row.get("entities", row.get("label", row.get("answer"))) for row in answers]
    if kind == "questions":
        expected = [answer["text"] for answer in expected]
    if kind == "numbers":
        np.testing.assert_allclose(found, expected, atol=1e-4)
    elif kind == "words":
        shown = [[[(e["label"], e["start"], e["stop"]) for e in row] for row in part] for part in (found, expected)]
        assert shown[0] == shown[1]
    else:
        assert found == expected


KINDS = ["words", "questions", "several", "numbers", "pairs"]


@pytest.fixture(scope="module")
def address(request):
    """Of one service with a head of every kind, on one encoder in one precision."""
    folder = request.getfixturevalue("tmp_path_factory").mktemp("served")
    for kind in KINDS:
        bundle = bundles.load(request.getfixturevalue(kind)[0]["bundle"])
        bundles.save(replace(bundle, encoder={**bundle.encoder, "precision": "fp32"}), str(folder / kind / "head"))
    with serving(*(folder / kind / "head" for kind in KINDS)) as running:
        yield running.address


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_served_is_what_python_says(request, address, kind):
    summary, *_ = request.getfixturevalue(kind)
    context = next(asked(1, 9))["context"]
    inputs = {
        "words": "Greta flew to Oslo",
        "questions": {"question": "Who works there?", "context": context},
        "pairs": ["so happy", "so sad"],
    }.get(kind, "so sad about my work at home")
    body = json.dumps({"inputs": inputs}).encode()
    with urllib.request.urlopen(f"{address}/v1/heads/{kind}/predict", body, timeout=60) as response:
        (answer,) = json.load(response)["predictions"]
    bundle = bundles.load(summary["bundle"])
    predictor = Predictor(replace(bundle, encoder={**bundle.encoder, "precision": "fp32"}))
    if kind == "questions":
        (expected,) = predictor.predict(["Who works there?"], [context]).labels
        assert answer["answer"] == expected["text"]
        return
    texts = ([inputs[0]], [inputs[1]]) if kind == "pairs" else (inputs,)
    labels, probabilities = predictor.predict(*texts)
    if kind == "words":
        found = [(entity["entity_group"], entity["start"], entity["end"]) for entity in answer["entities"]]
        assert found == [(entity["label"], entity["start"], entity["stop"]) for entity in labels[0]]
    elif kind == "numbers":
        assert answer["value"] == pytest.approx(labels[0], abs=1e-4)
    else:
        assert answer["scores"][0]["score"] == pytest.approx(float(probabilities[0].max()), abs=1e-4)
        assert answer["labels" if kind == "several" else "label"] == labels[0]
