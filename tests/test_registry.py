"""Heads that come and go: versions, what is served at a moment, and how texts are read for all of it."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from handmade import bundle

from bertray.errors import BertrayError, BundleError
from bertray.heads import LinearHead
from bertray.registry import Head, Registry, Shelf

_ENCODER = {
    "model": "a/model",
    "identity": {"weights": "w", "config": "c", "tokenizer": "t"},
    "precision": "fp32",
    "max_length": 512,
    "truncation": "truncate",
    "overlap": 64,
    "pair": "cross",
}


def made(seed=0, encoder=None, **fields):
    """A bundle with a head of its own."""
    head = LinearHead(np.full((3, 4), seed, np.float32), np.zeros(3, np.float32))
    return bundle(head=head, encoder={**_ENCODER, **(encoder or {})}, fingerprint=f"f{seed}", **fields)


@pytest.fixture
def registry():
    return Registry(_ENCODER)


def put(registry, name, seed=0, url=None, **fields):
    head = registry.next(name, made(seed, **fields), url or f"/bundles/{name}-{seed}")
    registry.put(head)
    return head


def served(registry):
    return {name: (head.version, head.bundle.fingerprint) for name, head in registry.shelf.heads.items()}


# --- versions ---------------------------------------------------------------------------------------------


def test_nothing_is_served_at_first(registry):
    assert registry.shelf.head() is registry.shelf.head("a") is None
    assert registry.previous("a") is None


def test_versions_of_a_name_count_from_one(registry):
    assert [put(registry, "a", seed).version for seed in range(3)] == [1, 2, 3]
    assert put(registry, "b").version == 1
    assert served(registry) == {"a": (3, "f2"), "b": (1, "f0")}
    assert registry.previous("a").version == 2
    assert registry.previous("b") is None


def test_the_first_is_the_default_and_stays_so(registry):
    for name in ("a", "b", "c"):
        put(registry, name)
    put(registry, "a", 1)
    assert registry.shelf.head().name == "a"
    assert list(registry.shelf.heads) == ["a", "b", "c"]
    registry.remove("a")
    assert registry.shelf.head().name == "b"
    put(registry, "a", 2)
    assert list(registry.shelf.heads) == ["b", "c", "a"]


def test_what_is_served_already_is_no_new_version(registry):
    first = put(registry, "a", url="/x")
    assert registry.next("a", made(0), "/x") is first
    put(registry, "a", url="/x")
    assert served(registry) == {"a": (1, "f0")}
    assert registry.previous("a") is None


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "other"},
        {"labels": ("x", "b", "c")},
        {"threshold": 0.5},
        {"temperature": 2.0},
        {"lengths": (1.0,)},
        {"features": ("mean_5",)},
        {"head": LinearHead(np.ones((3, 4), np.float32), np.zeros(3, np.float32))},
        {"head": LinearHead(np.zeros((3, 4), np.float32), np.ones(3, np.float32))},
        {"head": LinearHead(np.zeros((3, 5), np.float32), np.zeros(3, np.float32))},
    ],
)
def test_what_answers_otherwise_is_a_new_version(registry, change):
    put(registry, "a", url="/x")
    assert registry.next("a", replace(made(0), **change), "/x").version == 2
    assert registry.next("a", made(0), "/elsewhere").version == 2


def test_a_version_is_never_another_bundle(registry):
    put(registry, "a", 0)
    put(registry, "a", 1)
    registry.roll_back("a")
    assert put(registry, "a", 2).version == 3
    put(registry, "b")
    registry.remove("a")
    assert put(registry, "a", 3).version == 4
    assert registry.previous("a") is None  # what was removed does not come back


def test_next_serves_nothing(registry):
    put(registry, "a")
    before = registry.shelf
    registry.next("a", made(1), "/x")
    registry.next("b", made(1), "/x")
    assert registry.shelf is before
    assert registry.next("b", made(1), "/x").version == 1


# --- back, and away ---------------------------------------------------------------------------------------


def test_back_by_a_version_at_a_time(registry):
    for seed in range(3):
        put(registry, "a", seed)
    put(registry, "b")
    assert registry.roll_back("a").version == 2
    assert registry.roll_back("a").version == 1
    assert served(registry) == {"a": (1, "f0"), "b": (1, "f0")}
    with pytest.raises(BertrayError, match="a has no version before the one that is served"):
        registry.roll_back("a")
    assert served(registry)["a"] == (1, "f0")
    assert registry.shelf.head().name == "a"


def test_back_is_what_was_served_before(registry):
    for seed in range(2):
        put(registry, "a", seed)
    registry.roll_back("a")
    assert put(registry, "a", 2).version == 3
    assert registry.previous("a").version == 1
    assert registry.roll_back("a").version == 1


def test_back_of_what_is_not_served(registry):
    with pytest.raises(BertrayError, match="no version before"):
        registry.roll_back("nobody")


def test_eight_versions_are_kept(registry):
    for seed in range(20):
        put(registry, "a", seed)
    versions = [20]
    while registry.previous("a"):
        versions.append(registry.roll_back("a").version)
    assert versions == list(range(20, 12, -1))


def test_others_that_are_put_do_not_make_it_forget(registry):
    put(registry, "a", 0)
    put(registry, "a", 1)
    for seed in range(20):
        put(registry, "b", seed)
    assert registry.roll_back("a").version == 1


def test_the_last_head_is_not_removed(registry):
    put(registry, "a")
    put(registry, "b")
    registry.remove("a")
    with pytest.raises(BertrayError, match="b is the only head that is served"):
        registry.remove("b")
    assert list(registry.shelf.heads) == ["b"]


def test_all_at_once(registry):
    put(registry, "a", 0)
    put(registry, "b", 0)
    heads = {name: registry.next(name, made(seed), f"/{name}") for name, seed in (("c", 5), ("a", 6))}
    registry.replace(heads)
    assert served(registry) == {"c": (1, "f5"), "a": (2, "f6")}
    assert registry.shelf.head().name == "c"
    assert registry.previous("a").version == 1


# --- a shelf ----------------------------------------------------------------------------------------------


def test_a_shelf_never_changes(registry):
    put(registry, "a", 0)
    put(registry, "b", 0)
    before = registry.shelf
    put(registry, "a", 1)
    put(registry, "c", 1)
    registry.remove("b")
    registry.roll_back("a")
    assert {name: head.version for name, head in before.heads.items()} == {"a": 1, "b": 1}
    with pytest.raises(FrozenInstanceError):
        before.heads = {}
    with pytest.raises(FrozenInstanceError):
        before.head("a").version = 5


def test_what_would_be_served(registry):
    put(registry, "a", 0)
    other, new = registry.next("a", made(1), "/x"), registry.next("b", made(2), "/x")
    shelf = registry.with_heads({"a": other, "b": new})
    assert [head.version for head in shelf.heads.values()] == [2, 1]
    assert served(registry) == {"a": (1, "f0")}


# --- readings ---------------------------------------------------------------------------------------------


def test_a_reading_has_the_features_of_all_heads_that_read_alike(registry):
    a = put(registry, "a", features=("mean_6",))
    assert registry.shelf.reading(a) == (512, "truncate", 64, "text", ("mean_6",))
    b = put(registry, "b", features=("cls_2", "mean_4"))
    c = put(registry, "c", features=("max_4", "mean_10"))
    expected = ("cls_2", "max_4", "mean_4", "mean_6", "mean_10")  # by layer, as a number, and not by name
    for head in (a, b, c):
        assert registry.shelf.reading(head).features == expected
    assert len({registry.shelf.reading(head) for head in (a, b, c)}) == 1
    registry.remove("c")
    assert registry.shelf.reading(a).features == ("cls_2", "mean_4", "mean_6")


@pytest.mark.parametrize("encoder", [{"max_length": 128}, {"truncation": "window"}, {"overlap": 32}])
def test_other_ways_of_reading_are_apart(registry, encoder):
    a, b = put(registry, "a", features=("mean_6",)), put(registry, "b", features=("mean_2",), encoder=encoder)
    assert registry.shelf.reading(a).features == ("mean_6",)
    assert registry.shelf.reading(b).features == ("mean_2",)
    assert registry.shelf.reading(a) != registry.shelf.reading(b)


def test_heads_that_see_words_read_by_themselves(registry):
    whole = put(registry, "whole", features=("mean_6",))
    words = put(registry, "words", task="token-classification", features=("first_4",))
    answers = put(registry, "answers", task="question-answering", features=("mean_2",), pair="context")
    parts = [registry.shelf.reading(head) for head in (whole, words, answers)]
    assert [reading.part for reading in parts] == ["text", "word", "token"]
    assert [reading.features for reading in parts] == [("mean_6",), ("first_4",), ("mean_2",)]


def test_pairs_read_as_single_texts_do(registry):
    """Whether two texts come together is not a matter of how they are read."""
    single, pair = put(registry, "single"), put(registry, "pair", pair="b", encoder={"pair": "siamese"})
    assert registry.shelf.reading(single) == registry.shelf.reading(pair)


def test_a_reading_of_a_head_that_is_not_served_yet(registry):
    put(registry, "a", features=("mean_6",))
    new = registry.next("b", made(1, features=("cls_1",)), "/x")
    assert registry.with_heads({"b": new}).reading(new).features == ("cls_1", "mean_6")
    assert Shelf({"b": new}).reading(new).features == ("cls_1",)


# --- encoders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "part"),
    [
        ({"identity": {**_ENCODER["identity"], "weights": "x"}}, "weights"),
        ({"identity": {**_ENCODER["identity"], "tokenizer": "x"}}, "tokenizer"),
        ({"identity": {"weights": "w", "config": "c"}}, "tokenizer"),
        ({"identity": {**_ENCODER["identity"], "more": "x"}}, "identity"),
        ({"identity": None}, "weights"),
        ({"precision": "bf16"}, "precision"),
        ({"precision": None}, "precision"),
    ],
)
def test_heads_of_another_encoder_are_refused(registry, encoder, part):
    put(registry, "a")
    with pytest.raises(BundleError, match=rf"/x was fitted on another encoder .*\(a/model\): its {part} differs"):
        registry.next("a", made(1, encoder=encoder), "/x")
    assert served(registry) == {"a": (1, "f0")}


def test_the_encoder_is_told_by_what_it_is_and_not_by_its_name(registry):
    assert isinstance(put(registry, "a", encoder={"model": "/a/copy", "revision": "other"}), Head)
