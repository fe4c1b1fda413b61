import numpy as np
import pytest
from conftest import SHARED

from bertray.errors import SourceError, SpecError
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


@pytest.fixture(scope="module", params=["bert", "roberta"])
def kin(request, minilm, tmp_path_factory):
    """A folder with MiniLM's words and the special tokens of BERT, or as RoBERTa sets them: two between a pair."""
    from tokenizers.processors import RobertaProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if request.param == "bert":
        return minilm.folder
    folder = tmp_path_factory.mktemp("roberta")
    words = AutoTokenizer.from_pretrained(minilm.folder).backend_tokenizer
    words.post_processor = RobertaProcessing(("[SEP]", 102), ("[CLS]", 101))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(folder)
    return folder


def numbers(count, first=0):
    """A text of `count` words of one token each, hardly ever one after itself."""
    words = ["cat", "dog", "sun", "tree", "house", "water", "green", "and", "of", "the", "in", "red", "blue", "man"]
    return " ".join(words[(first + i * i) % len(words)] for i in range(count))


def rows_of(tokens):
    return [tokens.ids[start:stop].tolist() for start, stop in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [11, 12])
def test_what_is_cut_is_what_transformers_cuts(kin, max_length, side):
    from transformers import AutoTokenizer

    ours = Tokenizer(kin, max_length)
    ours._tokenizer.truncation_side = side
    theirs = AutoTokenizer.from_pretrained(kin, truncation_side=side)
    sizes = [0, 1, 3, 4, 5, 6, 9, 10, 40]
    firsts, seconds = zip(*((numbers(a), numbers(b, 5)) for a in sizes for b in sizes), strict=True)
    for texts in ((list(firsts),), (list(firsts), list(seconds))):
        expected = theirs(*texts, truncation=True, max_length=max_length, return_token_type_ids=True)
        tokens = ours(*texts)
        assert rows_of(tokens) == expected["input_ids"]
        assert tokens.types.tolist() == [kind for row in expected["token_type_ids"] for kind in row]
        whole = theirs(*texts)["input_ids"]
        assert tokens.truncated.tolist() == [len(row) > max_length for row in whole]


@pytest.mark.parametrize(("max_length", "overlap"), [(12, 0), (12, 3), (13, 9), (512, 64)])
def test_windows_hold_every_token_and_share_the_overlap(kin, max_length, overlap):
    tokenizer = Tokenizer(kin, max_length, "window", overlap)
    room = max_length - 2
    texts = [numbers(n) for n in (0, 1, room - 1, room, room + 1, 2 * room - overlap, 2 * room - overlap + 1, 5 * room)]
    whole = [row[1:-1] for row in rows_of(Tokenizer(kin, 10_000)(texts))]
    tokens = tokenizer(texts)
    assert tokens.windows.counts[:7].tolist() == [1, 1, 1, 1, 2, 2, 3]
    assert not tokens.truncated.any()
    rows = rows_of(tokens)
    assert max(map(len, rows)) == max_length
    assert tokens.windows.weights.tolist() == [len(row) - 2 for row in rows]
    for text, first, count in zip(whole, tokens.windows.first, tokens.windows.counts, strict=True):
        joined = []
        for row in rows[first : first + count]:
            assert (row[0], row[-1]) == (101, 102)
            shared = overlap if joined else 0
            assert row[1 : 1 + shared] == joined[len(joined) - shared :]
            joined += row[1 + shared : -1]
        assert joined == text


def test_a_word_that_no_window_holds_whole_is_told(minilm):
    """It is lost, and its text counts as truncated; with an overlap of its size it is not."""
    text = "a plain text of some length, in which comes, as if it were nothing, Llanfairpwllgwyngyll, a village"
    short = "a plain text"
    tokenizer = Tokenizer(minilm.folder, 512, "window", 0, "word")
    starts, stops = tokenizer([text]).segments.starts, tokenizer([text]).segments.stops
    longest = int((stops - starts).argmax())
    cut = int(starts[longest]) + 2  # in its middle; the first token is [CLS]
    for overlap, lost in ((0, True), (int((stops - starts).max()), False)):
        tokens = Tokenizer(minilm.folder, cut + 1, "window", overlap, "word")([short, text])
        assert tokens.truncated[tokens.windows.first].tolist() == [False, lost]
        assert len(tokens.segments.words) == len(tokens.words.spans) - lost


def test_windows_of_pairs_keep_the_shorter_text_whole(kin):
    tokenizer = Tokenizer(kin, 20, "window", 3)
    between = 20 - len(rows_of(Tokenizer(kin, 20)([""], [""]))[0])  # room for both texts
    pairs = [(5, 60), (60, 5), (5, 5), (between // 2, 60), (between // 2 + 1, 60), (60, 61)]
    firsts, seconds = [numbers(a) for a, _ in pairs], [numbers(b, 5) for _, b in pairs]
    tokens = tokenizer(firsts, seconds)
    assert tokens.truncated[tokens.windows.first].tolist() == [False, False, False, False, True, True]
    rows = rows_of(tokens)
    assert max(map(len, rows)) <= 20
    single = Tokenizer(kin, 10_000)
    for i, (first, count) in enumerate(zip(tokens.windows.first, tokens.windows.counts, strict=True)):
        a, b = (row[1:-1] for row in rows_of(single([firsts[i], seconds[i]])))
        own = rows[first : first + count]
        frames = len(own[0]) - tokens.windows.weights[first]
        longer, shorter = (a, b) if len(a) > len(b) else (b, a)
        kept = shorter[: between // 2] if len(shorter) > between // 2 else shorter
        seen = []
        for row in own:
            content = row[1:-1]
            part = content[: len(content) - len(kept)] if longer is a else content[len(kept) :]
            gap = frames - 2
            part = part[:-gap] if longer is a else part[gap:]
            assert (content[-len(kept) :] if longer is a else content[: len(kept)]) == kept
            seen += part[3:] if seen else part
        assert seen == longer


def test_an_overlap_has_to_leave_room(kin):
    with pytest.raises(SpecError, match="encoder.overlap must be less than 10 for texts of max_length 12. Got 10"):
        Tokenizer(kin, 12, "window", 10)
    with pytest.raises(SpecError, match=r"encoder.overlap must be less than \d for pairs of max_length 12. Got 9"):
        Tokenizer(kin, 12, "window", 9)(["a"], ["b"])
    with pytest.raises(SpecError, match=r"encoder.max_length must be at least \d for pairs. Got 3"):
        Tokenizer(kin, 3)(["a"], ["b"])


def test_texts_that_are_too_long_can_be_left_out(kin):
    tokens = Tokenizer(kin, 12, "error")([numbers(3), numbers(50), numbers(10), numbers(11)], strict=False)
    assert tokens.lengths.tolist() == [5, 0, 12, 0]
    assert tokens.truncated.tolist() == [False, True, False, True]
    assert rows_of(tokens)[0] == rows_of(Tokenizer(kin, 12)([numbers(3)]))[0]


def test_a_lone_surrogate_is_named(minilm):
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        Tokenizer(minilm.folder, 12)(["fine", "\ud800"])


def test_threads_that_cut_do_not_cut_for_others(minilm):
    from concurrent.futures import ThreadPoolExecutor

    tokenizer = Tokenizer(minilm.folder, 60)
    tokenizer._fast = None
    texts = [[numbers(40 + 40 * (i % 2))] * 20 for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        for i, tokens in enumerate(pool.map(tokenizer, texts)):
            assert tokens.truncated.all() == (i % 2 == 1)
            assert set(tokens.lengths) == {60 if i % 2 else 42}
