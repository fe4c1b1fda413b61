"""Tokens: texts to flat ids with offsets, and packs of texts that go through the encoder together.

Knows nothing of models beyond their tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertray.errors import CheckpointError, SourceError

Ints = NDArray[np.int64]


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


class Tokenizer:
    """The checkpoint's own fast tokenizer, with a limit on length."""

    def __init__(self, folder: Path, max_length: int, truncation: str = "truncate") -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers raises many kinds: say what it said
            raise CheckpointError(f"{folder} has no usable tokenizer: {' '.join(str(error).split())[:200]}") from error
        if not self._tokenizer.is_fast:
            raise CheckpointError(f"{folder} has no fast tokenizer (tokenizer.json). Save one with transformers.")
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
        ids, types = self._encode(texts, pairs)
        truncated = np.array([len(row) > self.max_length for row in ids])
        if truncated.any():
            self._truncate(texts, pairs, np.flatnonzero(truncated), ids, types)
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum([len(row) for row in ids], out=offsets[1:])
        return Tokens(_flat(ids), _flat(types), offsets, truncated)

    def _encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, **options: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        encoded = self._tokenizer(
            list(texts),
            list(pairs) if pairs is not None else None,
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=True,
            **options,
        )
        return encoded["input_ids"], encoded["token_type_ids"]

    def _truncate(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        rows: Ints,
        ids: list[list[int]],
        types: list[list[int]],
    ) -> None:
        """Encode the rows that are too long again, cut by the tokenizer (the longer text of a pair first)."""
        if self.truncation == "error":
            raise SourceError(
                f"{len(rows)} texts are longer than encoder.max_length ({self.max_length} tokens), such as "
                f"{texts[rows[0]][:60]!r} with {len(ids[rows[0]])}. Raise max_length, or set "
                "encoder.truncation to truncate."
            )
        cut_ids, cut_types = self._encode(
            [texts[i] for i in rows],
            [pairs[i] for i in rows] if pairs is not None else None,
            truncation=True,
            max_length=self.max_length,
        )
        for i, row_ids, row_types in zip(rows, cut_ids, cut_types, strict=True):
            ids[i], types[i] = row_ids, row_types


def packs(lengths: Ints, budget: int) -> list[Ints]:
    """Cut texts into packs of one length each and of at most `budget` tokens (or one text).

    Equal lengths need neither padding nor a mask. Longest first, so that memory peaks at the start.

    Returns:
        For each pack the indices of its texts, rising.
    """
    order = np.argsort(-lengths, kind="stable")
    cut: list[Ints] = []
    for run in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        if len(run):
            size = max(1, budget // max(1, int(lengths[run[0]])))
            cut.extend(run[i : i + size] for i in range(0, len(run), size))
    return cut


def _flat(rows: list[list[int]]) -> Ints:
    return np.fromiter((value for row in rows for value in row), np.int64)
