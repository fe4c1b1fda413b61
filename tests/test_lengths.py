"""Lengths of a sample against what the encoder does with the same texts."""

import numpy as np
import pyarrow as pa
import pytest

from bertray import pairs as apart
from bertray.encoder import Encoder
from bertray.lengths import inputs, lengths
from bertray.spec import Encoder as EncoderSpec

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "that", "sleeps"]


def table(count=60, pairs=False):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(count)]
    columns = {"id": [str(i) for i in range(count)], "text": texts, "label": ["a"] * count}
    if pairs:
        columns["text_pair"] = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]
    return pa.table(columns)


@pytest.fixture(scope="module")
def checkpoint(tiny):
    from bertray.checkpoints import find

    return find(str(tiny))


@pytest.mark.parametrize("truncation", ["truncate", "window", "error"])
@pytest.mark.parametrize("pairs", [False, True])
def test_tokens_are_those_that_the_encoder_takes(checkpoint, truncation, pairs):
    spec = EncoderSpec(model=checkpoint.name, pooling="mean", max_length=20, overlap=4, truncation=truncation)
    rows = table(pairs=pairs)
    found = lengths(rows, np.zeros(rows.num_rows, int), checkpoint.folder, spec)
    encoded, failed = Encoder(checkpoint, spec).encode_rows(*inputs(rows))
    assert found.rows == rows.num_rows
    assert sorted(found.encoded.tolist()) == sorted(encoded.tokens.tolist())
    assert found.aside == len(failed) == (0 if truncation != "error" else (found.full > 20).sum())
    assert found.each == pytest.approx(encoded.tokens.sum() / (60 - len(failed)))
    whole = spec.model_copy(update={"max_length": 512, "truncation": "truncate"})
    assert sorted(found.full.tolist()) == sorted(Encoder(checkpoint, whole).encode(*inputs(rows)).tokens.tolist())


def test_texts_of_pairs_by_themselves(checkpoint):
    spec = EncoderSpec(model=checkpoint.name, pooling="mean", pair="siamese")
    rows = table(pairs=True)
    found = lengths(rows, np.zeros(rows.num_rows, int), checkpoint.folder, spec, siamese=True)
    both = Encoder(checkpoint, spec).encode(rows["text"].to_pylist() + rows["text_pair"].to_pylist()).tokens
    assert (found.rows, len(found.encoded)) == (60, 120)
    assert found.each == pytest.approx(both.sum() / 60)


def test_a_pair_is_set_aside_where_one_of_its_texts_is_too_long(checkpoint):
    spec = EncoderSpec(model=checkpoint.name, pooling="mean", max_length=20, truncation="error", pair="siamese")
    rows = table(pairs=True)
    found = lengths(rows, np.zeros(rows.num_rows, int), checkpoint.folder, spec, siamese=True)
    _, failed = apart.encode(Encoder(checkpoint, spec), rows["text"].to_pylist(), rows["text_pair"].to_pylist())
    assert found.aside == len(failed) > 5


def test_words(checkpoint):
    spec = EncoderSpec(model=checkpoint.name, pooling="first")
    rows = table()
    found = lengths(rows, np.zeros(rows.num_rows, int), checkpoint.folder, spec, "word")
    assert found.words == pytest.approx(np.mean([len(text.split()) for text in rows["text"].to_pylist()]))


def test_what_a_token_attends_to(checkpoint):
    rows = pa.table({"id": ["a", "b"], "text": ["the", "the " * 98], "label": ["x", "x"]})  # 3 and 100 tokens
    spec = EncoderSpec(model=checkpoint.name, pooling="mean")
    found = lengths(rows, np.zeros(2, int), checkpoint.folder, spec)
    assert found.attended == pytest.approx((3 * 3 + 100 * 100) / 103)
    windows = EncoderSpec(model=checkpoint.name, pooling="mean", max_length=52, overlap=0, truncation="window")
    found = lengths(rows, np.zeros(2, int), checkpoint.folder, windows)
    assert sorted(found.encoded.tolist()) == [3, 102]  # two windows, each with its own [CLS] and [SEP]
    assert found.attended == pytest.approx((3 * 3 + 102 * 51) / 105)


def test_the_error_is_that_of_places(checkpoint):
    """Rows that lie together are alike: what differs are places, and so many rows are worth no more than those."""
    spec = EncoderSpec(model=checkpoint.name, pooling="mean")
    texts = ["the " * (5 + place) for place in range(16) for _ in range(50)]
    rows = pa.table({"id": list(map(str, range(800))), "text": texts, "label": ["a"] * 800})
    found = lengths(rows, np.repeat(np.arange(16), 50), checkpoint.folder, spec)
    means = np.arange(16) + 7
    assert found.within == pytest.approx(1.96 * means.std() / means.mean() / 4)
