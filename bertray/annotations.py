"""Annotations: labels that are more than a name, as data sets write them, and as bertray keeps them: one line of JSON.

form      what is to be predicted          in files                                        kept as
name      a class                          "sad" or 0                                      sad
names     any number of labels             ["a", "b"], or a|b in CSV                       ["a", "b"]
number    a number                         4.5                                             4.5
tokens    a tag for each word              ["O", "B-city"] for a list of words, or         ["O", "B-city"] or
                                           [{"start", "end", "label"}] for a plain text    [[0, 4, "city"]]
answers   where the answers stand          SQuAD's lists of text and answer_start          [[17, "the answer"]]

Pure functions; knows nothing of files or of how labels become classes.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NESTED = ("names", "number", "tokens", "answers")  # forms whose cells are read as JSON
OUTSIDE = "O"
_LARGEST = float(np.finfo(np.float32).max)  # number that a head is fitted to


def form_of(task: str, problem: str) -> str:
    """What the labels of a task are."""
    if task != "text-classification":
        return "tokens" if task == "token-classification" else "answers"
    return {"single_label": "name", "multi_label": "names", "regression": "number"}[problem]


def part_of(form: str) -> str:
    """What of the texts becomes a vector: each text (or pair), each word, or each token of the second text."""
    return {"tokens": "word", "answers": "token"}.get(form, "text")


class Wrong(ValueError):
    """What is wrong with a cell, as the end of a sentence such as `label is no list`."""


def text_of(cell: Any) -> tuple[str, list[int] | None]:
    """The text of a cell, and where that is a list of words, joined with spaces, the lengths of those.

    Raises:
        Wrong: it is neither.
    """
    if isinstance(cell, str):
        return _encodable(cell), None
    if isinstance(cell, list) and all(isinstance(word, str) for word in cell):
        return _encodable(" ".join(cell)), list(map(len, cell))
    raise Wrong(f"is {_kind(cell)}" if not isinstance(cell, list) else "is a list of other things than words")


def words_of(lengths: Sequence[int]) -> Ints:
    """[words, 2] where words of those lengths begin and end, joined with spaces."""
    stops = np.cumsum(np.asarray(lengths, np.int64) + 1) - 1
    return np.stack([stops - lengths, stops], 1) if len(lengths) else np.zeros((0, 2), np.int64)


def label_of(form: str, cell: Any, text: str, words: Sequence[int] | None, pair: str = "") -> str:
    """A label as it is kept.

    Args:
        cell: what the file holds.
        text, words: the row's text, and the lengths of its words where it came as such.
        pair: the second text, which answers are in.

    Raises:
        Wrong: it is not of that form, or does not fit the text.
    """
    if isinstance(cell, str) and form in ("tokens", "answers", "names"):
        cell = _parsed(cell, form)
    return {"names": _names, "number": _number, "tokens": _tokens, "answers": _answers}[form](cell, text, words, pair)


def names_in(form: str, label: str) -> Iterable[str]:
    """The names of classes that a kept label holds."""
    if form == "name":
        return (label,)
    return json.loads(label) if form in ("names", "tokens") else ()


def tags_of(label: str, spans: Ints) -> list[str]:
    """A tag (B-, I- or O) for each word of a plain text, from a kept label of ranges of characters: a word belongs to
    the first range that it overlaps.

    Args:
        spans: [words, 2] where the words begin and end.
    """
    tags = [OUTSIDE] * len(spans)
    for start, stop, name in sorted(json.loads(label)):
        own = np.flatnonzero((spans[:, 0] < stop) & (spans[:, 1] > start))
        begun = False
        for word in own.tolist():
            if tags[word] == OUTSIDE:
                tags[word], begun = f"{'I' if begun else 'B'}-{name}", True
    return tags


def answers_of(label: str) -> list[tuple[int, str]]:
    """(first character, text) of each answer of a kept label; none where the question has no answer."""
    return [(start, text) for start, text in json.loads(label)]


def _names(cell: Any, *_: Any) -> str:
    if not isinstance(cell, list) or not all(isinstance(name, str) or type(name) is int for name in cell):
        raise Wrong("is no list of labels")
    return _kept(sorted(dict.fromkeys(map(str, cell))))


def _number(cell: Any, *_: Any) -> str:
    try:
        number = float(cell) if isinstance(cell, str | int | float) and not isinstance(cell, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST or (isinstance(cell, str) and "_" in cell):  # Python reads 1_000
        raise Wrong("is no number")
    return repr(number)


def _tokens(cell: Any, text: str, words: Sequence[int] | None, _: str) -> str:
    if words is not None:
        if not isinstance(cell, list) or not all(isinstance(tag, str | int) for tag in cell):
            raise Wrong("is no list of tags")
        if len(cell) != len(words):
            raise Wrong(f"has {len(cell)} tags for {len(words)} words")
        return _kept(list(map(str, cell)))
    if not isinstance(cell, list):
        raise Wrong("is no list of ranges")
    return _kept(sorted(_range(part, text) for part in cell))


def _range(part: Any, text: str) -> list[Any]:
    names = ("label", "type", "entity", "entity_group")
    if not isinstance(part, dict) or not (name := next((part[key] for key in names if part.get(key)), None)):
        raise Wrong("is no list of objects with start, end and label")
    start, stop = part.get("start"), part.get("end")
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop <= len(text)):
        raise Wrong(f"has a range from {start!r} to {stop!r} in a text of {len(text)} characters")
    return [start, stop, str(name)]


def _answers(cell: Any, text: str, words: Any, pair: str) -> str:
    found = sorted(dict.fromkeys(_pairs(cell)))
    for start, answer in found:
        if pair[start : start + len(answer)] != answer or not answer:
            raise Wrong("has an answer that is not where answer_start says")
    return _kept([list(answer) for answer in found])


def _pairs(cell: Any) -> Iterator[tuple[int, str]]:
    """(start, text) of answers written as a list of objects, or as an object of lists."""
    if isinstance(cell, dict) and isinstance(cell.get("text"), list):
        starts = cell.get("answer_start")
        if not isinstance(starts, list) or len(starts) != len(cell["text"]):
            raise Wrong("has not as many answer_start as text")
        cell = [{"text": text, "answer_start": start} for text, start in zip(cell["text"], starts, strict=True)]
    for answer in cell if isinstance(cell, list) else [cell]:
        text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(start, int) or start < 0:
            raise Wrong("is no list of objects with text and answer_start")
        yield start, text


def _parsed(cell: str, form: str) -> Any:
    """What a cell of a CSV file stands for."""
    try:
        found = json.loads(cell)
        if form == "answers" or isinstance(found, list | dict):
            return found
    except (ValueError, RecursionError):
        if form == "answers":
            raise Wrong("is no list of objects with text and answer_start") from None
    return [part for part in (cell.split("|") if form == "names" else cell.split()) if part]


def _kept(value: Any) -> str:
    return _encodable(json.dumps(value, ensure_ascii=False))


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Wrong("holds half a character (a lone surrogate)") from None
    return text


def _kind(cell: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
    return kinds.get(type(cell), type(cell).__name__)
