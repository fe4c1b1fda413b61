"""Reading: a text as tokens, with all that can be told about them. Knows nothing of weights."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bertray.tokens import stripped

_MASK = "[MASK]"
_SPACES = {  # in byte-level and SentencePiece tokenizers
    "\u0120": ", and letters with signs for the bytes of characters beyond ASCII",
    "\u2581": "",
}

Found = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """A text or a pair as T tokens.

    ids, types: [T] as the model is given them.
    masked: places of masked tokens.
    cut: whether there are more tokens, which are not read.
    found: as `tokens` in `explorer.explore`.
    notes: what was read otherwise than it was written, or not at all.
    """

    ids: list[int]
    types: list[int]
    masked: list[int]
    cut: bool
    found: Found
    notes: list[str]


def read(
    tokenizer: Any, texts: Sequence[str], limit: int, typed: bool, positions: Callable[[Sequence[int]], list[int]]
) -> Reading:
    """Read a text, or two as a pair.

    Args:
        limit: tokens that are read at most; of a pair its longer text is cut first.
        typed: whether the model tells the texts of a pair apart.
        positions: what gives tokens their positions, by their ids.
    """
    notes = []
    if (mask := tokenizer.mask_token) and mask != _MASK and any(_MASK in text for text in texts):
        notes.append(f"{_MASK} is written {mask} for this model, and was read so.")
        texts = [text.replace(_MASK, mask) for text in texts]
    whole = tokenizer(*texts, verbose=False)
    cut = len(whole.input_ids) > limit
    encoded = tokenizer(*texts, truncation=True, max_length=limit, verbose=False) if cut else whole
    if cut:
        notes.append(f"Of {len(whole.input_ids):,} tokens the first {limit:,} are looked at.")
    if not typed:
        notes.append("This model has no token types: separators alone tell the texts of a pair apart.")
    encoding, ids = encoded.encodings[0], list(encoded.input_ids)
    types = list(encoding.type_ids) if typed else [0] * len(ids)
    names = [named(tokenizer, number) for number in ids]
    for sign, more in _SPACES.items():
        if any(sign in name for name in names):
            notes.append(f"In tokens {sign} stands for the space before a word{more}.")
    tokens = [
        {
            "place": place,
            "token": names[place],
            "id": ids[place],
            "type": types[place],
            "mask": 1,
            "position": position,
            "of": encoding.sequence_ids[place],
            "start": start,
            "stop": stop,
            "special": bool(encoding.special_tokens_mask[place]),
            "unknown": ids[place] == tokenizer.unk_token_id and not encoding.special_tokens_mask[place],
        }
        for place, (position, (start, stop)) in enumerate(zip(positions(ids), _spans(encoding, texts), strict=True))
    ]
    words = list(_words(tokenizer, encoding, texts, tokens))
    found = {
        "tokens": tokens,
        "words": words,
        "changed": [word for word in words if not word["unknown"] and word["read_as"] != word["text"]],
        "unknown": [word for word in words if word["unknown"]],
        "dropped": _dropped(texts, tokens, words, cut),
        "count": len(whole.input_ids),
        "kept": len(ids),
        "limit": limit,
    }
    masked = [place for place, number in enumerate(ids) if number == tokenizer.mask_token_id]
    return Reading(ids, types, masked, cut, found, notes)


def named(tokenizer: Any, number: int) -> str:
    """The token of an id; tables may have more rows than the tokenizer has tokens."""
    return str(tokenizer.convert_ids_to_tokens(number) or f"[id {number}]")


def _spans(encoding: Any, texts: Sequence[str]) -> Iterator[tuple[int | None, int | None]]:
    """Where each token begins and ends in its text, in characters; None for [CLS] and its like."""
    for text, (start, stop) in zip(encoding.sequence_ids, encoding.offsets, strict=True):
        yield (None, None) if text is None else stripped(texts[text], start, stop)


def _words(tokenizer: Any, encoding: Any, texts: Sequence[str], tokens: Sequence[Found]) -> Iterator[Found]:
    """Word pieces joined; special tokens that stand in a text are no words."""
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    runs: dict[tuple[int, int], list[int]] = {}
    for place, (text, word) in enumerate(zip(encoding.sequence_ids, encoding.word_ids, strict=True)):
        if text is not None and word is not None and tokens[place]["id"] not in special:
            runs.setdefault((text, word), []).append(place)
    for (text, _), places in runs.items():
        start, stop = tokens[places[0]]["start"], tokens[places[-1]]["stop"]
        ids = [tokens[place]["id"] for place in places]
        if start == stop:  # a space of its own
            continue
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


def _dropped(texts: Sequence[str], tokens: Sequence[Found], words: Sequence[Found], cut: bool) -> list[Found]:
    """Runs of characters, but for white space, that no token stands for. An accent is not dropped that its letter has
    taken up."""
    ends = {(word["of"], word["stop"]): unicodedata.normalize("NFD", word["read_as"]) for word in words}
    found = []
    for of, text in enumerate(texts):
        left = np.array([not char.isspace() for char in text], bool)
        end = 0
        for token in tokens:
            if token["of"] == of:
                left[token["start"] : token["stop"]] = False
                end = max(end, token["stop"])
        if cut:
            left[end:] = False
        edges = np.flatnonzero(np.diff(left.astype(np.int8), prepend=0, append=0)).tolist()
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            if all(unicodedata.combining(char) and char in ends.get((of, start), "") for char in text[start:stop]):
                continue
            found.append({"text": text[start:stop], "of": of, "start": start, "stop": stop})
    return found
