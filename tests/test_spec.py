import json

import pytest
import yaml
from conftest import ROOT

from bertray.errors import SpecError
from bertray.spec import Spec, describe, load_spec


def mistakes(spec, overrides=()):
    with pytest.raises(SpecError) as caught:
        load_spec(spec, overrides)
    return str(caught.value).splitlines()


def test_defaults_are_the_notebooks():
    spec = Spec()
    assert spec.encoder.model == "google-bert/bert-base-uncased"
    assert spec.encoder.pooling == "pooler"
    assert (spec.head.optimizer, spec.head.lr, spec.head.batch_size, spec.head.epochs) == ("adam", 0.01, 32, 10)


def test_all_mistakes_are_told_at_once_with_place_and_what_is_allowed(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "data:\n  train: rows.csv\n  tests: other.csv\n  labels: [a, 3]\n"
        "encoder: {pooling: avg, max_length: '5'}\nhead: {lr: 0, epochs: true}\nray: 5\noutptu: x\n"
    )
    assert sorted(mistakes(path, ["head.seed=x"])) == sorted(
        [
            f"{path}:3: data.tests is not a key of a spec. Did you mean test?",
            f"{path}:4: data.labels.1 must be a string. Got 3 instead.",
            f"{path}:5: encoder.pooling must be one of pooler, cls, mean, max, first or a list of these. "
            'Got "avg" instead.',
            f'{path}:5: encoder.max_length must be a whole number of at least 3. Got "5" instead.',
            f"{path}:6: head.lr must be a number above 0. Got 0 instead.",
            f"{path}:6: head.epochs must be a whole number of at least 1. Got true instead.",
            '--set head.seed must be a whole number of at least 0 and at most 4294967295. Got "x" instead.',
            f"{path}:7: ray must be a mapping. Got 5 instead.",
            f"{path}:8: outptu is not a key of a spec. Did you mean output?",
        ]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {train: {path: a, hub: b}}", "data.train: must give either path or hub, not both."),
        ("data: {labels: [a, b, a]}", "data: labels must be distinct."),
        ("data: {text_pair: b}\nexamples: [x]", "the spec: examples must be left out when data.text_pair is given."),
        ("- a\n- b", "must be a mapping of keys"),
        ("just words", "must be a mapping of keys"),
        ("a: [", "is not YAML"),
        ("a: {{ x }}", "is not YAML"),
        ("head: {seed: 4294967296}", "head.seed must be a whole number of at least 0 and at most 4294967295."),
        ("head: {lr: 1}\nhead: {lr: 2}", "head is given twice."),
        (
            "encoder: {truncation: window, max_length: 60}",
            "bad.yaml:1: encoder: overlap must be less than 58 (max_length without [CLS] and [SEP]).",
        ),
        ("encoder: {overlap: -1}", "encoder.overlap must be a whole number of at least 0."),
        ("head: {lr: .nan}", "head.lr must be a number above 0"),
        (
            "encoder: {pair: siamese}\ndata: {text_pair: b}\nhead: {combine: mean}",
            "head.combine mean and mix cannot be had for siamese pairs",
        ),
        (
            "task: question-answering\ndata: {text_pair: b}\nencoder: {pooling: mean}\n"
            "head: {folds: 3, search: {combine: [concat, mix]}}",
            "head.combine mean and mix cannot be had for question-answering",
        ),
        ("task: translation", "task must be one of text-classification, token-classification, question-answering. Got"),
    ],
)
def test_other_mistakes(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert any(message in line for line in mistakes(path)), mistakes(path)


def test_yaml_scalars_are_what_they_look_like(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("data: {train: a.csv, labels: [no, yes, on]}\nhead: {lr: 1e-3}\nencoder: {revision: 2024-01-01}\n")
    spec = load_spec(path)
    assert spec.data.labels == ("no", "yes", "on")
    assert spec.head.lr == 1e-3
    assert load_spec(path, ["head.epochs=010"]).head.epochs == 10
    assert spec.encoder.revision == "2024-01-01"


def test_overrides_reach_any_key_and_sections_that_are_not_written():
    spec = load_spec(
        {"data": {"train": "a.csv"}},
        ["encoder.pooling=mean", "data.train.limit=5", "data.labels=[x, y]", "data.test=b.csv", "head.lr=1e-4"],
    )
    assert spec.encoder.pooling == "mean"
    assert (spec.data.train.path, spec.data.train.limit, spec.data.test.path) == ("a.csv", 5, "b.csv")
    assert (spec.data.labels, spec.head.lr) == (("x", "y"), 1e-4)


@pytest.mark.parametrize("override", ["pooling", "=x", "encoder..pooling=mean"])
def test_an_override_that_is_none(override):
    assert "--set must be like" in mistakes({}, [override])[0]


def test_a_spec_survives_its_own_yaml(tmp_path):
    spec = load_spec(ROOT / "jobs" / "specs" / "tweets.yaml")
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    assert load_spec(path) == spec == load_spec(spec) == load_spec(json.loads(json.dumps(spec.model_dump())))


def test_output_is_named_after_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {train: a.csv}")
    assert load_spec(tmp_path / "mine.yaml").output == "runs/mine"


def test_a_missing_file_is_one_line(tmp_path):
    assert mistakes(tmp_path / "none.yaml")[0].startswith(f"The spec {tmp_path / 'none.yaml'} cannot be read:")


def test_describe_is_yaml_of_all_defaults_with_a_line_a_key():
    text = describe()
    assert load_spec(yaml.safe_load(text)) == Spec()
    assert all(" # " in line for line in text.splitlines())


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "specs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_specs_are_right(path):
    assert load_spec(path).data.train.given
