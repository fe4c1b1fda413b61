import numpy as np
import pytest
from conftest import SHARED

from bertray.errors import SourceError
from bertray.tokens import Tokenizer, packs

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


@pytest.mark.parametrize("seed", range(4))
def test_packs_hold_every_text_once_at_one_length_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    lengths, budget = rng.integers(1, 60, 500), 100
    cut = packs(lengths, budget)
    assert sorted(np.concatenate(cut).tolist()) == list(range(500))
    for rows in cut:
        assert len(set(lengths[rows])) == 1
        assert len(rows) == 1 or lengths[rows].sum() <= budget
    assert packs(np.zeros(0, np.int64), budget) == []
