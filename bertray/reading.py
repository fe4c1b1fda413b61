"""Reading: a text as tokens, with all that can be told about them. Knows nothing of weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bertray.tokens import stripped

_MASK = "[MASK]"
_SPACES = ("\u0120", "\u2581")  # of byte-level and SentencePiece tokenizers

Found = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """A text or a pair as T tokens.

    ids, types: [T] as the model is given them.
    masked: places of masked tokens.
    found: as `tokens` in `explorer.explore`.
    notes: what was read otherwise than it was written, or not at all.
    """

    ids: list[int]
    types: list[int]
    masked: list[int]
    found: Found
    notes: list[str]


def read(tokenizer: Any, texts: Sequence[str], limit: int, typed: bool, first: int) -> Reading:
    """Read a text, or two as a pair.

    Args:
        limit: tokens that are read at most; of a pair its longer text is cut first.
        typed: whether the model tells the texts of a pair apart.
        first: the position of the first token.
    """
    notes = []
    if (mask := tokenizer.mask_token) and mask != _MASK and any(_MASK in text for text in texts):
        notes.append(f"{_MASK} is written {mask} for this model, and was read so.")
        texts = [text.replace(_MASK, mask) for text in texts]
    whole = tokenizer(*texts, verbose=False)
    cut = len(whole.input_ids) > limit
    encoded = tokenizer(*texts, truncation=True, max_length=limit, verbose=False) if cut else whole
    if cut:
        notes.append(f"Of {len(whole.input_ids):,} tokens {limit:,} are read: the rest is not looked at.")
    if not typed:
        notes.append("This model has no token types: separators alone tell the texts of a pair apart.")
    encoding, ids = encoded.encodings[0], list(encoded.input_ids)
    types = list(encoding.type_ids) if typed else [0] * len(ids)
    if sign := next((sign for sign in _SPACES if any(sign in token for token in encoding.tokens)), ""):
        notes.append(f"In tokens {sign} stands for the space before a word.")
    tokens = [
        {
            "place": place,
            "token": encoding.tokens[place],
            "id": ids[place],
            "type": types[place],
            "mask": 1,
            "position": first + place,
            "text": encoding.sequence_ids[place],
            "start": start,
            "stop": stop,
            "special": bool(encoding.special_tokens_mask[place]),
            "unknown": ids[place] == tokenizer.unk_token_id and not encoding.special_tokens_mask[place],
        }
        for place, (start, stop) in enumerate(_spans(encoding, texts))
    ]
    words = list(_words(tokenizer, encoding, texts, tokens))
    found = {
        "tokens": tokens,
        "words": words,
        "changed": [word for word in words if not word["unknown"] and word["read_as"] != word["text"]],
        "unknown": [word for word in words if word["unknown"]],
        "dropped": _dropped(texts, tokens, cut),
        "count": len(whole.input_ids),
        "kept": len(ids),
        "limit": limit,
    }
    masked = [place for place, number in enumerate(ids) if number == tokenizer.mask_token_id]
    return Reading(ids, types, masked, found, notes)


def _spans(encoding: Any, texts: Sequence[str]) -> Iterator[tuple[int | None, int | None]]:
    """Where each token begins and ends in its text, in characters; None for [CLS] and its like."""
    for text, (start, stop) in zip(encoding.sequence_ids, encoding.offsets, strict=True):
        yield (None, None) if text is None else stripped(texts[text], start, stop)


def _words(tokenizer: Any, encoding: Any, texts: Sequence[str], tokens: Sequence[Found]) -> Iterator[Found]:
    """Word pieces joined."""
    runs: dict[tuple[int, int], list[int]] = {}
    for place, (text, word) in enumerate(zip(encoding.sequence_ids, encoding.word_ids, strict=True)):
        if text is not None and word is not None:
            runs.setdefault((text, word), []).append(place)
    for (text, _), places in runs.items():
        start, stop = tokens[places[0]]["start"], tokens[places[-1]]["stop"]
        ids = [tokens[place]["id"] for place in places]
        yield {
            "text": texts[text][start:stop],
            "of": text,
            "start": start,
            "stop": stop,
            "places": places,
            "pieces": [tokens[place]["token"] for place in places],
            "read_as": tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip(),
            "unknown": any(tokens[place]["unknown"] for place in places),
        }


def _dropped(texts: Sequence[str], tokens: Sequence[Found], cut: bool) -> list[Found]:
    """Runs of characters, but for white space, that no token stands for."""
    found = []
    for of, text in enumerate(texts):
        left = np.array([not char.isspace() for char in text], bool)
        end = 0
        for token in tokens:
            if token["text"] == of:
                left[token["start"] : token["stop"]] = False
                end = max(end, token["stop"])
        if cut:
            left[end:] = False
        edges = np.flatnonzero(np.diff(left.astype(np.int8), prepend=0, append=0)).tolist()
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            found.append({"text": text[start:stop], "of": of, "start": start, "stop": stop})
    return found
