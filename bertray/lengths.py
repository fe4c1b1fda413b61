"""How long texts are in tokens, by a sample of them: before any limit, and as they go through an encoder.

Knows nothing of where the texts are from.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bertray.annotations import words_of
from bertray.spec import Encoder as EncoderSpec
from bertray.tokens import Ints, Tokenizer, Tokens

_CHUNK, _CHARACTERS = 200, 1 << 20  # rows, or fewer long ones, that are tokenized between looks at the clock
_SECONDS = 3.0
_NO_LIMIT = 1 << 30
_FEW = 4  # places tell nothing of how places differ


@dataclass(frozen=True)
class Lengths:
    """What was tokenized.

    full: [texts] tokens of each, before any limit; encoded: [texts] that go through the encoder, with all windows.
    rows: that the texts are of; aside: how many of those are too long, where that is an error.
    words: what gets a vector, a row. within: the relative error of the tokens a row (95 %).
    speed: tokens/s of this process. limit: tokens that go through the encoder at once, at most.
    """

    full: Ints
    encoded: Ints
    rows: int
    aside: int
    words: float
    within: float
    speed: float
    limit: int

    @property
    def each(self) -> float:
        """Tokens of a row that is encoded."""
        return float(self.encoded.sum()) / max(1, self.rows - self.aside)

    @property
    def whole(self) -> float:
        """Tokens that are tokenized for each that goes through the encoder."""
        return float(self.full.sum()) / max(1.0, float(self.encoded.sum()))

    @property
    def attended(self) -> float:
        """Tokens that a token attends to, in the mean: those of its text, or of its window."""
        parts = np.maximum(1, -(-self.encoded // self.limit))
        return float((self.encoded**2 / parts).sum()) / max(1.0, float(self.encoded.sum()))


def lengths(
    rows: pa.Table, places: Ints, folder: Path, spec: EncoderSpec, part: str = "text", siamese: bool = False
) -> Lengths:
    """Tokenize rows in a random order, as many as some seconds allow.

    Args:
        rows: as `sources.normalize` gives them; places: [rows] where each is from.
        folder: of the checkpoint whose tokenizer it is. part: what becomes a vector.
        siamese: whether the texts of a pair are encoded by themselves.
    """
    free = Tokenizer(folder, _NO_LIMIT, part=part)
    bound = Tokenizer(folder, spec.max_length, spec.truncation, spec.overlap, part)
    order = np.random.default_rng(0).permutation(rows.num_rows)
    step = max(1, min(_CHUNK, _CHARACTERS * rows.num_rows // max(1, rows.nbytes)))
    chunks = [order[start : start + step] for start in range(0, len(order), step)]
    free(["what is loaded at the first call"], ["of pairs"] if "text_pair" in rows.column_names else None)
    full, encoded, spent, words, ends, done = [], [], 0.0, 0, time.monotonic() + _SECONDS, 0
    for chunk in chunks:
        texts = inputs(rows.take(chunk), siamese)
        begun = time.perf_counter()
        tokens = free(texts[0], texts[1], words=texts[2])
        spent += time.perf_counter() - begun
        full.append(tokens.lengths)
        encoded.append(_limited(bound, texts, tokens))
        words += len(tokens.words.spans) if tokens.words else len(chunk)
        done += 1
        if time.monotonic() > ends:
            break
    taken = np.concatenate(chunks[:done])
    each = [of_chunk.reshape(-1, len(chunk)) for of_chunk, chunk in zip(encoded, chunks, strict=False)]
    by_row, flat = np.concatenate([of_chunk.sum(0) for of_chunk in each]), np.concatenate(full)
    within = _within(by_row, places[taken])
    aside = sum(int((of_chunk == 0).any(0).sum()) for of_chunk in each)  # of a pair both texts have to be encoded
    speed = float(flat.sum()) / max(spent, 1e-9)
    return Lengths(flat, np.concatenate(encoded), len(taken), aside, words / len(taken), within, speed, spec.max_length)


def inputs(rows: pa.Table, siamese: bool = False) -> tuple[list[str], list[str] | None, list[Any] | None]:
    """The texts of rows, their pairs, and where their words are, as an encoder takes them."""
    texts = rows["text"].to_pylist()
    pairs = rows["text_pair"].to_pylist() if "text_pair" in rows.column_names else None
    if siamese and pairs is not None:
        return texts + pairs, None, None
    if "words" not in rows.column_names:
        return texts, pairs, None
    return texts, pairs, [None if each is None else words_of(each) for each in rows["words"].to_pylist()]


def _limited(tokenizer: Tokenizer, texts: Sequence[Any], tokens: Tokens) -> Ints:
    """Tokens of each text that go through the encoder; 0 of one that is too long where that is an error."""
    found = tokens.lengths.copy()
    if len(long := np.flatnonzero(found > tokenizer.max_length)):
        chosen = [part and [part[row] for row in long] for part in texts]
        cut = tokenizer(chosen[0], chosen[1], False, chosen[2])
        found[long] = cut.lengths if cut.windows is None else np.add.reduceat(cut.lengths, cut.windows.first)
    return found


def _within(tokens: Ints, places: Ints) -> float:
    """The relative error (95 %) of a mean over rows that lie together at places: it is places that differ."""
    means = np.array([tokens[places == place].mean() for place in np.unique(places)])
    if len(means) < _FEW:
        means = tokens
    return 1.96 * float(means.std()) / max(1e-9, float(means.mean()) * math.sqrt(len(means)))
