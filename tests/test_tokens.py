import numpy as np
import pytest
from conftest import SHARED

from bertray.errors import SourceError
from bertray.tokens import Tokenizer, Tokens

NOTEBOOK_IDS = [101, 1045, 2001, 24907, 999, 102, 1045, 10749, 2300, 1024, 1040, 102]


@pytest.fixture(params=["all-MiniLM-L6-v2", "bert-base-uncased"])
def folder(request, minilm):
    if request.param == "all-MiniLM-L6-v2":  # has bert-base-uncased's vocabulary
        return minilm.folder
    path = SHARED / "bert-base-uncased-tokenizer"
    return path if path.is_dir() else pytest.skip(f"{path} is not there")


def test_the_notebooks_pair(folder):
    tokens = Tokenizer(folder, 512)(["I was thirsty!"], ["I drank water :D"])
    assert tokens.ids.tolist() == NOTEBOOK_IDS
    assert tokens.types.tolist() == [0] * 6 + [1] * 6
    assert tokens.offsets.tolist() == [0, 12]
    assert not tokens.truncated.any()


def test_ragged_texts_lie_flat_one_after_another(minilm):
    tokenizer = Tokenizer(minilm.folder, 512)
    texts = ["", " ", "one", "one two three", "\x00", "naïve café 😀"]
    tokens = tokenizer(texts)
    for i, text in enumerate(texts):
        alone = tokenizer([text])
        assert tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() == alone.ids.tolist()
    assert tokens.lengths[:2].tolist() == [2, 2]  # empty texts are [CLS] [SEP]
    assert tokenizer([]).lengths.tolist() == []


def test_long_texts_lose_their_tail_and_are_counted(minilm):
    tokenizer = Tokenizer(minilm.folder, 8)
    tokens = tokenizer(["cat " * 6, "cat " * 7, "dog " * 900])
    assert tokens.truncated.tolist() == [False, True, True]
    assert tokens.lengths.tolist() == [8, 8, 8]
    assert tokens.ids[tokens.offsets[1:] - 1].tolist() == [102, 102, 102]  # [SEP] stays


def test_the_longer_text_of_a_pair_is_cut_first(minilm):
    tokens = Tokenizer(minilm.folder, 10)(["cat"], ["dog " * 50])
    assert tokens.ids[:3].tolist()[0] == 101
    assert (tokens.types == 0).sum() == 3
    assert (tokens.types == 1).sum() == 7


def test_truncation_can_be_an_error(minilm):
    with pytest.raises(SourceError, match="1 texts are longer than encoder.max_length"):
        Tokenizer(minilm.folder, 8, "error")(["cat", "dog " * 50])


def of_lengths(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1])
    return Tokens(ids, ids % 2, offsets, np.arange(len(lengths)) % 2 == 0)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_packs_hold_every_text_once_within_the_budget(seed, equal):
    lengths, budget = np.sort(np.random.default_rng(seed).integers(1, 60, 500))[::-1], 100
    packs = list(of_lengths(lengths).packs(budget, equal))
    assert [row for start, stop in packs for row in range(start, stop)] == list(range(500))
    for start, stop in packs:
        assert stop - start == 1 or lengths[start:stop].sum() <= budget
        assert not equal or len(set(lengths[start:stop])) == 1
    # No pack could have taken the next text too.
    for start, stop in packs[:-1]:
        more = lengths[start : stop + 1]
        assert more.sum() > budget or (equal and len(set(more)) > 1)
    assert list(of_lengths([]).packs(budget, equal)) == []
    assert list(of_lengths([500, 7]).packs(budget, equal)) == [(0, 1), (1, 2)]


def test_texts_are_taken_in_any_order():
    tokens = of_lengths([3, 1, 4, 2])
    taken = tokens.take(np.array([2, 0, 2]))
    assert taken.ids.tolist() == [4, 5, 6, 7, 0, 1, 2, 4, 5, 6, 7]
    assert taken.offsets.tolist() == [0, 4, 7, 11]
    assert taken.truncated.tolist() == [True, True, True]
    assert tokens.take(np.array([], np.int64)).ids.tolist() == []


@pytest.fixture
def plain(minilm):
    """The checkpoint's tokenizer without nanotoken."""
    tokenizer = Tokenizer(minilm.folder, 12)
    tokenizer._fast = None
    return tokenizer


TEXTS = [
    "",
    " ",
    "one two",
    "naïve café 😀",
    "x" * 300,
    "\x00\x85\u2028",
    "中文 字",
    "[CLS] [MASK] tokens",
    "cat " * 40,
]


def test_nanotoken_gives_the_same(minilm, plain):
    pytest.importorskip("nanotoken")
    tokenizer = Tokenizer(minilm.folder, 12)
    fast, slow = tokenizer(TEXTS), plain(TEXTS)
    assert tokenizer._fast is not None
    for name in ("ids", "types", "offsets", "truncated"):
        assert np.array_equal(getattr(fast, name), getattr(slow, name)), name


def test_nanotoken_is_left_where_it_differs(minilm, plain, caplog):
    pytest.importorskip("nanotoken")
    tokenizer = Tokenizer(minilm.folder, 12)
    tokenizer._fast = type(tokenizer._fast).from_vocab(minilm.folder / "vocab.txt", lowercase=False)
    texts = ["Upper Case"] * 3
    assert np.array_equal(tokenizer(texts).ids, plain(texts).ids)
    assert tokenizer._fast is None
    assert "nanotoken gives other ids" in caplog.text
