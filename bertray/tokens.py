"""Tokens: texts to flat ids with offsets, and packs of them that go through the encoder together.

Knows nothing of models beyond their tokenizer.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertray.errors import CheckpointError, SourceError
from bertray.progress import log

Ints = NDArray[np.int64]

_SAMPLE = 256  # texts that two tokenizers are compared on


@dataclass(frozen=True)
class Tokens:
    """Token ids of n texts, one after another without padding.

    ids: [tokens] with [CLS] and [SEP] in place.
    types: [tokens] which text of a pair a token belongs to (0, 1); all 0 for tokenizers that do not tell.
    offsets: [n + 1] text i is ids[offsets[i]:offsets[i + 1]].
    truncated: [n] whether a text was longer than allowed and lost its tail.
    """

    ids: Ints
    types: Ints
    offsets: Ints
    truncated: NDArray[np.bool_]

    @property
    def lengths(self) -> Ints:
        """[n] tokens of each text."""
        return np.diff(self.offsets)

    def take(self, rows: Ints) -> "Tokens":
        """The texts of those indices, in that order."""
        lengths = self.lengths[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Tokens(self.ids[places], self.types[places], offsets, self.truncated[rows])

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


class Tokenizer:
    """The checkpoint's own fast tokenizer, with a limit on length.

    Where the package nanotoken is installed, it tokenizes single texts in place of Hugging Face's library, as long as
    it gives the same ids for a sample of the texts it meets first.
    """

    def __init__(self, folder: Path, max_length: int, truncation: str = "truncate") -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers raises many kinds: say what it said
            raise CheckpointError(f"{folder} has no usable tokenizer: {' '.join(str(error).split())[:200]}") from error
        if not self._tokenizer.is_fast:
            raise CheckpointError(f"{folder} has no fast tokenizer (tokenizer.json). Save one with transformers.")
        self._fast = _nanotoken(self._tokenizer)
        self._compared = False
        self.max_length = max_length
        self.truncation = truncation

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tokens:
        """Tokenize texts, or pairs as `[CLS] a [SEP] b [SEP]`.

        Raises:
            SourceError: a text is longer than max_length and truncation is `error`.
        """
        if not texts:
            empty = np.zeros(0, np.int64)
            return Tokens(empty, empty, np.zeros(1, np.int64), np.zeros(0, bool))
        if self._fast is not None and not self._compared:
            self._compared = True
            self._fast = self._fast if self._agrees(texts) else None
        tokens = self._encode_fast(texts) if pairs is None else None
        tokens = tokens or self._encode(texts, pairs)
        long = np.flatnonzero(tokens.lengths > self.max_length)
        return self._truncate(tokens, texts, pairs, long) if len(long) else tokens

    def _encode(self, texts: Sequence[str], pairs: Sequence[str] | None, **options: Any) -> Tokens:
        encoded = self._tokenizer(
            list(texts),
            list(pairs) if pairs is not None else None,
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=True,
            **options,
        )
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(row) for row in encoded["input_ids"]], out=offsets[1:])
        ids, types = (_flat(encoded[name], int(offsets[-1])) for name in ("input_ids", "token_type_ids"))
        return Tokens(ids, types, offsets, np.zeros(len(texts), bool))

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

    def _truncate(self, tokens: Tokens, texts: Sequence[str], pairs: Sequence[str] | None, rows: Ints) -> Tokens:
        """Encode the rows that are too long again, cut by the tokenizer (the longer text of a pair first)."""
        if self.truncation == "error":
            raise SourceError(
                f"{len(rows)} texts are longer than encoder.max_length ({self.max_length} tokens), such as "
                f"{texts[rows[0]][:60]!r} with {tokens.lengths[rows[0]]}. Raise max_length, or set "
                "encoder.truncation to truncate."
            )
        cut = self._encode(
            [texts[i] for i in rows],
            [pairs[i] for i in rows] if pairs is not None else None,
            truncation=True,
            max_length=self.max_length,
        )
        # The cut ones go behind all others, and each then to its text's place.
        both = Tokens(
            np.concatenate([tokens.ids, cut.ids]),
            np.concatenate([tokens.types, cut.types]),
            np.concatenate([tokens.offsets, tokens.offsets[-1] + cut.offsets[1:]]),
            np.concatenate([tokens.truncated, np.ones(len(rows), bool)]),
        )
        places = np.arange(len(texts))
        places[rows] = len(texts) + np.arange(len(rows))
        return both.take(places)


def _nanotoken(tokenizer: Any) -> Any:
    """The same tokenizer by nanotoken; None where that is not installed or does not know its kind."""
    try:
        import nanotoken
    except ImportError:
        return None
    try:
        return nanotoken.Tokenizer(tokenizer)
    except Exception:  # whatever a tokenizer of another kind makes it raise
        return None


def _flat(rows: list[list[int]], total: int) -> Ints:
    return np.fromiter(itertools.chain.from_iterable(rows), np.int64, total)
