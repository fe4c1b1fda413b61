"""Every spec in jobs/specs runs and gives good figures, and the rows written for them are what they should be."""

import csv
import json
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl

import bertray
from bertray.spec import load_spec

SPECS = {path.stem for path in (ROOT / "jobs" / "specs").glob("*.yaml")}
ELSEWHERE = {"demo": "test_pipeline", "files": "test_pipeline"}
HUB = {"tweets"}  # need what only the hub has
BOUNDS = {  # a little below what they reach
    "pairs": ("accuracy", 0.88),
    "topics": ("micro_f1", 0.70),
    "ratings": ("pearson", 0.65),
    "entities": ("f1", 0.65),
    "questions": ("f1", 0.55),
    "search": ("accuracy", 0.85),
}
DATA = ROOT / "jobs" / "data"
KINDS = ("person", "place", "organisation", "product", "date")
TOPICS = {"food", "health", "money", "pets", "sport", "travel", "weather", "work"}


def rows_of(name):
    """{split: rows} of the files of that name."""
    found = {}
    for path in sorted(DATA.glob(f"demo-{name}-*")):
        with path.open(encoding="utf-8", newline="") as file:
            found[path.stem.split("-")[-1]] = list(csv.DictReader(file)) if path.suffix == ".csv" else read_jsonl(path)
    assert {"train", "test"} <= set(found)
    return found


def distinct(keys):
    """Whether no two rows are the same but for case, spaces and punctuation."""
    plain = ["".join(c for c in "|".join(key).lower() if c.isalnum() or c == "|") for key in keys]
    return all(plain) and len(plain) == len(set(plain))


def test_every_spec_is_run_somewhere():
    assert set(ELSEWHERE) | HUB | set(BOUNDS) == SPECS


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_spec_says_what_it_shows(name):
    path = ROOT / "jobs" / "specs" / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("# ") for line in lines[:2])
    assert load_spec(path).output == f"runs/{name}"


@pytest.mark.parametrize("name", [*sorted(BOUNDS), *sorted(HUB)])
def test_a_spec_gives_good_figures(name, ray_cluster, monkeypatch, tmp_path):
    if name in HUB:
        pytest.skip("its rows are on the Hugging Face hub")
    monkeypatch.chdir(ROOT)
    summary = bertray.run(f"jobs/specs/{name}.yaml", overrides=[f"output={tmp_path}"])
    metric, bound = BOUNDS[name]
    assert summary["metrics"]["test"][metric] > bound
    assert all(rows["rejected"] == rows["truncated"] == 0 for rows in summary["rows"].values())
    assert (tmp_path / "report.html").exists()
    if name == "search":
        test = summary["metrics"]["test"]
        assert 0.6 < test["coverage"] < 1
        assert test["accuracy_answered"] > test["accuracy"]


def test_files_are_small_and_end_their_lines():
    files = list(DATA.iterdir())
    assert sum(path.stat().st_size for path in files) < 700_000
    for path in files:
        text = path.read_bytes().decode("utf-8")
        assert text.endswith("\n")
        assert "\r" not in text
        assert "\n\n" not in text


def test_pairs():
    splits = rows_of("pairs")
    both = [sorted((row["text"], row["text_pair"])) for rows in splits.values() for row in rows]
    assert distinct(both)
    assert all(one != two for one, two in both)
    for rows in splits.values():
        assert 0.4 < sum(row["label"] == "yes" for row in rows) / len(rows) < 0.6
    # A question is in one split only: what is judged is not what was learned by heart.
    train, test = ({row[side] for row in splits[name] for side in ("text", "text_pair")} for name in ("train", "test"))
    assert not train & test


def test_topics():
    splits = rows_of("topics")
    assert distinct([row["text"]] for rows in splits.values() for row in rows)
    for rows in splits.values():
        assert {topic for row in rows for topic in row["topics"]} == TOPICS
        assert {len(row["topics"]) for row in rows} == {0, 1, 2, 3}
        assert all(row["topics"] == sorted(set(row["topics"])) for row in rows)


def test_ratings():
    splits = rows_of("ratings")
    assert distinct([row["text"]] for rows in splits.values() for row in rows)
    for rows in splits.values():
        assert {float(row["stars"]) for row in rows} == {half / 2 for half in range(2, 11)}


def test_entities():
    splits = rows_of("entities")
    assert distinct([" ".join(row["words"])] for rows in splits.values() for row in rows)
    known = {"O", *(f"{first}-{kind}" for first in "BI" for kind in KINDS)}
    for rows in splits.values():
        assert {tag for row in rows for tag in row["tags"]} == known
        for row in rows:
            assert len(row["words"]) == len(row["tags"])
            assert all(word and not any(c.isspace() for c in word) for word in row["words"])
            for before, tag in zip(["O", *row["tags"]], row["tags"], strict=False):
                assert tag[0] != "I" or before[1:] == tag[1:], row


def test_questions():
    splits = rows_of("questions")
    assert distinct([row["question"], row["context"]] for rows in splits.values() for row in rows)
    assert not {row["context"] for row in splits["train"]} & {row["context"] for row in splits["test"]}
    for rows in splits.values():
        assert 0.1 < sum(not row["answers"] for row in rows) / len(rows) < 0.35
        for row in rows:
            for answer in row["answers"]:
                start, text = answer["answer_start"], answer["text"]
                assert text
                assert row["context"][start : start + len(text)] == text


def test_the_comment_of_entities_shows_plain_text_rightly():
    lines = Path(ROOT / "jobs" / "specs" / "entities.yaml").read_text(encoding="utf-8").splitlines()
    row = next(json.loads(line[2:]) for line in lines if line.startswith('# {"words": "'))
    assert [row["words"][tag["start"] : tag["end"]] for tag in row["tags"]] == ["Marta Danso"]
