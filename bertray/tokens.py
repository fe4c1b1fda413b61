"""Tokens: texts to flat ids with offsets, and packs of them that go through the encoder together.

Knows nothing of models beyond their tokenizer.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertray.errors import CheckpointError, SourceError, SpecError
from bertray.progress import log

Ints = NDArray[np.int64]

_SAMPLE = 256  # texts that two tokenizers are compared on
_REMEMBERED = 1 << 16  # words that nanotoken remembers in each thread, in some 20 MB; by itself, a million


@dataclass(frozen=True)
class Windows:
    """How the rows of Tokens are windows of n texts, those of a text one after another.

    counts: [n] how many windows each text has; 1 for a text that fits.
    weights: [rows] tokens in each window without the special ones.
    """

    counts: Ints
    weights: Ints

    @property
    def first(self) -> Ints:
        """[n] the row of each text's first window."""
        return np.cumsum(self.counts) - self.counts


@dataclass(frozen=True)
class Segments:
    """Ranges of tokens that become a vector each, such as the words of texts.

    starts, stops: [m] places in Tokens.ids; a range may be empty.
    edges: [n + 1] row i of Tokens has the segments edges[i] to edges[i + 1].
    words: [m] which of Words each is: of a text in several windows every word is in one of them.
    """

    starts: Ints
    stops: Ints
    edges: Ints
    words: Ints


@dataclass(frozen=True)
class Words:
    """The words of n texts: what becomes a vector each.

    spans: [words, 2] where each begins and ends in its text, in characters.
    edges: [n + 1] text i has the words edges[i] to edges[i + 1].
    """

    spans: Ints
    edges: Ints


@dataclass(frozen=True)
class Tokens:
    """Token ids of n texts, one after another without padding.

    ids: [tokens] with [CLS] and [SEP] in place.
    types: [tokens] which text of a pair a token belongs to (0, 1); all 0 for tokenizers that do not tell.
    offsets: [n + 1] text i is ids[offsets[i]:offsets[i + 1]].
    truncated: [n] whether a text was longer than allowed and lost its tail.
    windows: which rows are windows of one text; None where every row is a text of its own.
    segments: what becomes a vector; None where that is each text whole.
    words: what the segments are of; None where those are None.
    """

    ids: Ints
    types: Ints
    offsets: Ints
    truncated: NDArray[np.bool_]
    windows: Windows | None = None
    segments: Segments | None = None
    words: Words | None = None

    @property
    def edges(self) -> Ints:
        """[n + 1] which of the vectors are text i's: edges[i] to edges[i + 1]."""
        return np.arange(len(self.offsets)) if self.segments is None else self.segments.edges

    @property
    def lengths(self) -> Ints:
        """[n] tokens of each text."""
        return np.diff(self.offsets)

    def take(self, rows: Ints) -> "Tokens":
        """The texts of those indices, in that order."""
        places, offsets = gathered(self.offsets, rows)
        segments = None
        if self.segments is not None:
            own, edges = gathered(self.segments.edges, rows)
            moved = np.repeat(offsets[:-1] - self.offsets[rows], np.diff(edges))
            old = self.segments
            segments = Segments(old.starts[own] + moved, old.stops[own] + moved, edges, old.words[own])
        return Tokens(self.ids[places], self.types[places], offsets, self.truncated[rows], segments=segments)

    def pack_end(self, start: int, budget: int, equal: bool = False) -> int:
        """The text behind the last of a pack that begins with text `start`: as many as `budget` tokens hold, but
        one at least.

        Args:
            equal: whether the texts of a pack must all have one length; texts of one length must lie together.
        """
        end = int(np.searchsorted(self.offsets, self.offsets[start] + budget, side="right")) - 1
        if equal:
            lengths = np.diff(self.offsets[start : max(start, end) + 1])
            other = np.flatnonzero(lengths != lengths[:1])
            end = start + int(other[0]) if len(other) else end
        return max(start + 1, end)

    def packs(self, budget: int, equal: bool = False) -> Iterator[tuple[int, int]]:
        """All packs one after another: the first text of each and the one behind its last."""
        start = 0
        while start < len(self.truncated):
            end = self.pack_end(start, budget, equal)
            yield start, end
            start = end


def _with_windows(tokens: Tokens, rows: Ints, windows: list[list[Ints]], lost: NDArray[np.bool_]) -> Tokens:
    """Tokens with some texts cut to windows.

    Args:
        rows: which texts, rising.
        windows: of each, the places in tokens.ids of each window.
        lost: whether each loses something.
    """
    counts = np.ones(len(tokens.truncated), np.int64)
    counts[rows] = list(map(len, windows))
    cut = _replaced(tokens, rows, counts[rows], list(itertools.chain(*windows)), np.repeat(lost, counts[rows]))
    if tokens.segments is None:
        return cut
    first = np.cumsum(counts) - counts
    segments, gone = _in_windows(tokens, dict(zip(rows.tolist(), windows, strict=True)), cut.offsets, first)
    cut.truncated[first[gone]] = True
    return replace(cut, segments=segments, words=tokens.words)


def _in_windows(tokens: Tokens, cut: dict[int, list[Ints]], offsets: Ints, first: Ints) -> tuple[Segments, Ints]:
    """Where segments lie once long texts are cut: each in the window in which it has most tokens around it, since there
    its states know most. One that no window holds whole is gone; also the texts of those.

    Args:
        tokens: before.
        cut: for each text that was cut, the places in tokens.ids of each of its windows.
        offsets: [rows + 1] of the rows afterwards.
        first: [n] the row of each text's first window.
    """
    before = tokens.segments
    assert before is not None
    starts = before.starts + np.repeat(offsets[first] - tokens.offsets[:-1], np.diff(before.edges))
    rows = np.repeat(first, np.diff(before.edges))
    lengths, kept = before.stops - before.starts, np.ones(len(starts), bool)
    for text, windows in cut.items():
        for segment in range(before.edges[text], before.edges[text + 1]):
            start, length = before.starts[segment], max(1, lengths[segment])
            around = [_around(window, start, length) for window in windows]
            best = int(np.argmax([least for least, _ in around]))
            kept[segment] = around[best][0] >= 0
            rows[segment] = first[text] + best
            starts[segment] = offsets[rows[segment]] + around[best][1]
    order = np.flatnonzero(kept)[np.argsort(rows[kept], kind="stable")]
    edges = np.searchsorted(rows[order], np.arange(len(offsets)))
    gone = np.searchsorted(before.edges, np.flatnonzero(~kept), side="right") - 1
    return Segments(starts[order], (starts + lengths)[order], edges, before.words[order]), gone


def _around(window: Ints, start: int, length: int) -> tuple[int, int]:
    """How many tokens a window has at least on either side of those from `start` on, -1 where it lacks any of them; and
    where in it they begin."""
    place = int(np.searchsorted(window, start))
    held = place + length <= len(window) and window[place] == start and window[place + length - 1] == start + length - 1
    return (min(place, len(window) - place - length), place) if held else (-1, 0)


def gathered(edges: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Where the items of some texts lie, and the edges of those among themselves.

    Args:
        edges: [n + 1] text i has the items edges[i] to edges[i + 1].
        rows: of texts, in the order wanted.
    """
    counts = np.diff(edges)[rows]
    new = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(counts, out=new[1:])
    return np.arange(new[-1]) + np.repeat(edges[rows] - new[:-1], counts), new


class Tokenizer:
    """The checkpoint's own fast tokenizer, with a limit on length.

    Where the package nanotoken is installed, it tokenizes single texts in place of Hugging Face's library, as long as
    it gives the same ids for a sample of the texts it meets first.
    """

    def __init__(
        self, folder: Path, max_length: int, truncation: str = "truncate", overlap: int = 0, part: str = "text"
    ) -> None:
        """Load the tokenizer of a checkpoint's folder.

        Args:
            truncation: `truncate`, `error`, or `window`, where neighbouring windows share `overlap` tokens.
            part: what becomes a vector: each `text` or pair; each `word` of the texts; or, of pairs, the first text
                whole, [CLS], and each `token` of the second text.

        Raises:
            CheckpointError: the folder has no fast tokenizer.
            SpecError: the overlap leaves a window no room to move on.
        """
        self._tokenizer: Any = load(folder)
        self.part = part
        self._fast = _nanotoken(self._tokenizer) if part == "text" else None
        self._compared = False
        self.max_length, self.truncation, self.overlap = max_length, truncation, overlap
        self._frames: dict[bool, list[int]] = {}
        if truncation == "window":
            self._frame(False)

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        strict: bool = True,
        words: Sequence[Ints] | None = None,
    ) -> Tokens:
        """Tokenize texts, or pairs as `[CLS] a [SEP] b [SEP]`.

        Args:
            strict: without it, texts that are too long where that is an error come back truncated to no token at all.
            words: for the part `word`, [words, 2] characters where each begins and ends, of each text; without them the
                tokenizer's own words are taken.

        Raises:
            SourceError: a text is longer than max_length and truncation is `error`.
            SpecError: max_length leaves no room beside the special tokens and the overlap.
        """
        if not texts:
            empty = np.zeros(0, np.int64)
            return Tokens(empty, empty, np.zeros(1, np.int64), np.zeros(0, bool))
        if self.truncation == "window":
            self._frame(pairs is not None)
        tokens = self._whole(texts, pairs, words)
        long = np.flatnonzero(tokens.lengths > self.max_length)
        if not len(long):
            return tokens
        if self.truncation != "error":
            return self._cut(tokens, texts, pairs, long)
        if strict:
            raise SourceError(
                f"{len(long)} texts are longer than encoder.max_length ({self.max_length} tokens), such as "
                f"{texts[long[0]][:60]!r} with {tokens.lengths[long[0]]}. Raise max_length, or set "
                "encoder.truncation to truncate or window."
            )
        nothing = [[tokens.ids[:0]]] * len(long)
        return _with_windows(tokens, long, nothing, np.ones(len(long), bool))

    def _whole(self, texts: Sequence[str], pairs: Sequence[str] | None, words: Sequence[Ints] | None) -> Tokens:
        """Tokens of texts or pairs, however many."""
        if self.part != "text":
            return self._encode_words(texts, pairs, words)
        if self._fast is not None and not self._compared:
            self._fast = self._fast if self._agrees(texts) else None
            self._compared = True
        tokens = self._encode_fast(texts) if pairs is None else None
        return tokens or self._encode(texts, pairs)

    def _encode_words(self, texts: Sequence[str], pairs: Sequence[str] | None, words: Sequence[Ints] | None) -> Tokens:
        """Tokens with the words or tokens among them that become vectors."""
        encoded = self._call(texts, pairs)
        tokens = _tokens(encoded)
        owners = pairs if self.part == "token" and pairs is not None else texts
        found = [
            _words_of(encoded.encodings[i], owner, self.part, None if words is None else words[i])
            for i, owner in enumerate(owners)
        ]
        edges = np.zeros(len(found) + 1, np.int64)
        np.cumsum([len(spans) for spans, _ in found], out=edges[1:])
        shifts = np.repeat(tokens.offsets[:-1], np.diff(edges))
        places = np.concatenate([places for _, places in found]) + shifts[:, None]
        segments = Segments(places[:, 0], places[:, 1], edges, np.arange(edges[-1]))
        return replace(tokens, segments=segments, words=Words(np.concatenate([spans for spans, _ in found]), edges))

    def _encode(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Tokens:
        return _tokens(self._call(texts, pairs))

    def _call(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Any:
        try:
            return self._tokenizer(
                list(texts),
                list(pairs) if pairs is not None else None,
                verbose=False,
                return_attention_mask=False,
                return_token_type_ids=True,
            )
        except TypeError:  # what it says of lone surrogates does not name them
            for text in (*texts, *(pairs or ())):
                text.encode()
            raise

    def _encode_fast(self, texts: Sequence[str]) -> Tokens | None:
        """What nanotoken makes of texts; None where it is not there or cannot."""
        if self._fast is None:
            return None
        try:
            found = self._fast.encode_batch(texts)
        except (ValueError, TypeError):  # lone surrogates: for Hugging Face's to judge
            return None
        ids = found.ids.astype(np.int64)
        return Tokens(ids, np.zeros_like(ids), found.offsets.astype(np.int64), np.zeros(len(texts), bool))

    def _agrees(self, texts: Sequence[str]) -> bool:
        """Whether nanotoken and Hugging Face's tokenizer give the same for a sample of the texts."""
        sample = texts[:: max(1, len(texts) // _SAMPLE)]
        fast, slow = self._encode_fast(sample), self._encode(sample, None)
        equal = fast is not None and all(
            np.array_equal(getattr(fast, name), getattr(slow, name)) for name in ("ids", "types", "offsets")
        )
        if not equal:
            log.warning("nanotoken gives other ids than the checkpoint's tokenizer for these texts: it is not used")
        return equal

    def _cut(self, tokens: Tokens, texts: Sequence[str], pairs: Sequence[str] | None, rows: Ints) -> Tokens:
        """The same with the rows that are too long cut to windows, or to the first one. What is cut are the ids that
        are there: the tokenizer's own truncation is a setting that threads would share."""
        single, frame = self._frame(False), self._frame(pairs is not None)
        heads = tokens.lengths[rows] - sum(frame)  # tokens of the first texts
        if pairs is not None:
            heads = self._encode([texts[row] for row in rows], None).lengths - sum(single)
        found = [
            self._windows(np.arange(tokens.offsets[row], tokens.offsets[row + 1]), frame, head)
            for row, head in zip(rows, heads, strict=True)
        ]
        cut = _with_windows(tokens, rows, [windows for windows, _ in found], np.array([lost for _, lost in found]))
        if self.truncation != "window":
            return cut
        counts = np.ones(len(texts), np.int64)
        counts[rows] = [len(windows) for windows, _ in found]
        return replace(cut, windows=Windows(counts, cut.lengths - sum(frame)))

    def _windows(self, places: Ints, frame: list[int], head: int) -> tuple[list[Ints], bool]:
        """The windows of a row that is too long, as places of ids, and whether something is in none of them.

        The shorter text of a pair is in every window, as much of it as half the room holds; windows go over the longer
        one. So the first window is what Hugging Face's truncation (longest first) leaves.

        Args:
            places: [tokens] of the whole row.
            frame: as of `_frame`.
            head: tokens of the first text.
        """
        room = self.max_length - sum(frame)
        edges = np.cumsum([frame[0], head, frame[1], len(places) - sum(frame) - head][: 2 * len(frame) - 2])
        pieces = np.split(places, edges)  # special tokens and texts in turn
        longer = 1 if len(pieces) == 3 or len(pieces[1]) > len(pieces[3]) else 3
        cut = False
        if len(pieces) > 3:
            shorter = 4 - longer
            cut = len(pieces[shorter]) > room // 2
            pieces[shorter] = self._kept(pieces[shorter], room // 2)
            room -= len(pieces[shorter])
        whole = pieces[longer]
        if self.truncation == "window":
            starts = range(0, max(1, len(whole) - self.overlap), room - self.overlap)
            parts = [whole[start : start + room] for start in starts]
        else:
            parts, cut = [self._kept(whole, room)], True
        return [np.concatenate([*pieces[:longer], part, *pieces[longer + 1 :]]) for part in parts], cut

    def _kept(self, places: Ints, count: int) -> Ints:
        """What truncation leaves of a text."""
        left = getattr(self._tokenizer, "truncation_side", "right") == "left"
        return places[max(0, len(places) - count) :] if left else places[:count]

    def _frame(self, paired: bool) -> list[int]:
        """How many special tokens stand before, between and behind the texts of a row.

        Raises:
            SpecError: max_length leaves no room for more.
        """
        if paired not in self._frames:
            owners = self._tokenizer(*["a"] * (1 + paired)).sequence_ids(0)
            ends = [(owners.index(text), len(owners) - owners[::-1].index(text)) for text in range(1 + paired)]
            edges = [0, *itertools.chain.from_iterable(ends), len(owners)]
            frame = [stop - start for start, stop in zip(edges[::2], edges[1::2], strict=True)]
            self._check_room(self.max_length - sum(frame), paired)
            self._frames[paired] = frame
        return self._frames[paired]

    def _check_room(self, room: int, paired: bool) -> None:
        kind = "pairs" if paired else "texts"
        if room < 1:
            least = self.max_length - room + 1
            raise SpecError(f"encoder.max_length must be at least {least} for {kind}. Got {self.max_length} instead.")
        limit = room - room // 2 if paired else room  # the longer text of a pair has half the room at least
        if self.truncation == "window" and self.overlap >= limit:
            raise SpecError(
                f"encoder.overlap must be less than {limit} for {kind} of max_length {self.max_length}. "
                f"Got {self.overlap} instead."
            )


def load(folder: Path) -> Any:
    """The tokenizer of a checkpoint's folder, as transformers gives it.

    Raises:
        CheckpointError: the folder has no fast tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds: say what it said
        raise CheckpointError(f"{folder} has no usable tokenizer: {' '.join(str(error).split())[:200]}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder} has no fast tokenizer (tokenizer.json). Save one with transformers.")
    return tokenizer


def _replaced(tokens: Tokens, rows: Ints, counts: Ints, places: list[Ints], truncated: NDArray[np.bool_]) -> Tokens:
    """Tokens with some rows replaced.

    Args:
        rows: which, rising.
        counts: [rows] how many new rows come in place of each.
        places: [new rows] where in tokens.ids the ids of each lie.
        truncated: [new rows]
    """
    flat = np.concatenate(places)
    ends = tokens.offsets[-1] + np.cumsum([len(part) for part in places])
    # The new ones go behind all others, and each then to its text's place.
    both = Tokens(
        np.concatenate([tokens.ids, tokens.ids[flat]]),
        np.concatenate([tokens.types, tokens.types[flat]]),
        np.concatenate([tokens.offsets, ends]),
        np.concatenate([tokens.truncated, truncated]),
    )
    texts = len(tokens.truncated)
    repeats = np.ones(texts, np.int64)
    repeats[rows] = counts
    order = np.repeat(np.arange(texts), repeats)
    order[np.isin(order, rows)] = texts + np.arange(len(places))
    return both.take(order)


def _tokens(encoded: Any) -> Tokens:
    """What Hugging Face's tokenizer gives, flat."""
    rows = encoded["input_ids"]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    ids, types = (_flat(encoded[name], int(offsets[-1])) for name in ("input_ids", "token_type_ids"))
    return Tokens(ids, types, offsets, np.zeros(len(rows), bool))


def _words_of(encoding: Any, text: str, part: str, given: Ints | None) -> tuple[Ints, Ints]:
    """The words of a text [words, 2] in characters, and in tokens [words, 2] of its row.

    Args:
        part: `word`, or `token` for the first text whole, [CLS], and each token of the second text.
        given: where the words are, if that is known.
    """
    owner = 1 if part == "token" else 0
    own = np.array([i for i, sequence in enumerate(encoding.sequence_ids) if sequence == owner], np.int64)
    spans = np.array([stripped(text, *encoding.offsets[i]) for i in own.tolist()], np.int64).reshape(-1, 2)
    if part == "token":
        question = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence == 0] or [0]
        before = [[question[0], question[-1] + 1], [0, 1]]
        return np.vstack([np.zeros((2, 2), np.int64), spans]), np.vstack([before, np.stack([own, own + 1], 1)])
    if given is None:
        numbers = np.array([encoding.word_ids[i] for i in own.tolist()], np.int64)
        kept = spans[:, 0] < spans[:, 1]
    else:
        numbers = np.searchsorted(given[:, 0], spans[:, 0], side="right") - 1
        kept = spans[:, 0] < np.append(given[:, 1], 0)[numbers]  # -1, before the first word, takes the 0
    own, spans, numbers = own[kept], spans[kept], numbers[kept]
    if not len(own):
        return (spans, spans) if given is None else (given, np.zeros_like(given))
    found, first = np.unique(numbers, return_index=True)
    last = np.append(first[1:], len(numbers)) - 1
    if given is None:
        return np.stack([spans[first, 0], spans[last, 1]], 1), np.stack([own[first], own[last] + 1], 1)
    places = np.zeros_like(given)  # a word that the tokenizer makes nothing of has no tokens
    places[found] = np.stack([own[first], own[last] + 1], 1)
    return given, places


def stripped(text: str, start: int, stop: int) -> tuple[int, int]:
    """A range of characters without the white space at its ends, which some tokenizers count in."""
    piece = text[start:stop]
    return start + len(piece) - len(piece.lstrip()), stop - (len(piece) - len(piece.rstrip()) if piece.strip() else 0)


def _nanotoken(tokenizer: Any) -> Any:
    """The same tokenizer by nanotoken; None where that is not installed or does not know its kind."""
    try:
        import nanotoken
    except ImportError:
        return None
    try:
        nanotoken.set_cache_entries(_REMEMBERED)
        return nanotoken.Tokenizer(tokenizer)
    except Exception:  # whatever a tokenizer of another kind makes it raise
        return None


def _flat(rows: list[list[int]], total: int) -> Ints:
    return np.fromiter(itertools.chain.from_iterable(rows), np.int64, total)
