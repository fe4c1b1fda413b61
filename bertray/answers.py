"""Answers: a head's logits to labels, numbers, entities or spans of text. Knows nothing of files or of encoders."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bertray import metrics
from bertray.annotations import Ints, answers_of
from bertray.bundle import Bundle
from bertray.features import related, with_surroundings
from bertray.heads import Floats, probabilities
from bertray.samples import KINDS
from bertray.spans import best_span
from bertray.vectors import edges_of, spans_of, vectors_of

_TOKENS = 16_384  # that are answered at once


def states_of(table: pa.Table, features: Sequence[str]) -> tuple[NDArray[Any], Ints | None, Ints | None]:
    """Vectors of a store's rows, and where words have them the edges and spans of those."""
    if "starts" in table.column_names:
        return vectors_of(table, features), edges_of(table), spans_of(table)
    return vectors_of(table, features), None, None


def logits(
    bundle: Bundle, vectors: NDArray[Any], edges: Ints | None, spans: Ints | None
) -> tuple[Floats, Ints | None, Ints | None]:
    """What a bundle's head gives vectors [n or words, width], with the edges and spans of what it gives something for:
    of a question's vectors the first is that of the question itself."""
    if bundle.task != "question-answering":
        return bundle.head.logits(vectors), edges, spans
    assert edges is not None and spans is not None
    tokens = np.delete(np.arange(len(vectors)), edges[:-1])
    questions = np.repeat(edges[:-1], np.diff(edges) - 1)
    shape = len(vectors), len(bundle.features), vectors.shape[1] // len(bundle.features)
    states = with_surroundings(vectors.reshape(shape), edges).reshape(len(vectors), 2, vectors.shape[1])
    found = np.zeros((len(tokens), 2), np.float32)
    for start in range(0, len(tokens), _TOKENS):
        part = slice(start, start + _TOKENS)
        u, around = (states[tokens[part], place].astype(np.float32) for place in (0, 1))
        found[part] = bundle.head.logits(related(u, states[questions[part], 0].astype(np.float32), around))
    found[~vectors[tokens].any(1)] = -np.inf  # what was cut off
    return found, edges - np.arange(len(edges)), spans[tokens]


def columns(
    bundle: Bundle,
    given: Floats,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    edges: Ints | None = None,
    spans: Ints | None = None,
) -> dict[str, pa.Array]:
    """The answers to rows, as columns of a table:

    single_label            predicted (null where it is less sure than bundle.threshold), score, probabilities
    multi_label             predicted (a list), probabilities
    regression              predicted (a number)
    token-classification    predicted (a list of label, start, stop, text, score), tags (one a word)
    question-answering      predicted (a text, empty for no answer), start, stop, score
    """
    if bundle.task == "token-classification":
        assert edges is not None and spans is not None
        return _entities(bundle, given, texts, edges, spans)
    if bundle.task == "question-answering":
        assert edges is not None and spans is not None and pairs is not None
        return _spans(bundle, given, pairs, edges, spans)
    if bundle.problem == "regression":
        return {"predicted": pa.array(given[:, 0])}
    p = scores(bundle, given)
    every = pa.FixedSizeListArray.from_arrays(pa.array(p.reshape(-1)), len(bundle.labels))
    if bundle.problem == "multi_label":
        return {"predicted": pa.array(chosen(bundle, p), pa.list_(pa.string())), "probabilities": every}
    return {"predicted": pa.array(chosen(bundle, p), pa.string()), "score": pa.array(p.max(1)), "probabilities": every}


def scores(bundle: Bundle, given: Floats) -> Floats:
    """Logits [n, labels] of whole texts as probabilities, or as numbers."""
    return probabilities(KINDS[bundle.form], given)


def chosen(bundle: Bundle, scored: Floats) -> list[Any]:
    """The label of each text [n, labels], None where none is sure enough; or those that it has, of several."""
    if bundle.problem == "multi_label":
        return [[bundle.labels[i] for i in np.flatnonzero(row > 0.5)] for row in scored]
    sure = scored.max(1) >= bundle.threshold
    return [bundle.labels[i] if known else None for i, known in zip(scored.argmax(1), sure, strict=True)]


_ENTITY = pa.struct(
    [
        ("label", pa.string()),
        ("start", pa.int32()),
        ("stop", pa.int32()),
        ("text", pa.string()),
        ("score", pa.float32()),
    ]
)


def _entities(bundle: Bundle, given: Floats, texts: Sequence[str], edges: Ints, spans: Ints) -> dict[str, pa.Array]:
    p = probabilities("softmax", given)
    best, score = p.argmax(1), p.max(1)
    tags = [bundle.labels[i] for i in best]
    rows, words = [], []
    for text, (start, stop) in zip(texts, pairwise(edges.tolist()), strict=True):
        own = tags[start:stop]
        words.append(own)
        rows.append(
            [
                {
                    "label": kind,
                    "start": int(spans[start + i, 0]),
                    "stop": int(spans[start + j - 1, 1]),
                    "text": text[spans[start + i, 0] : spans[start + j - 1, 1]],
                    "score": float(score[start + i : start + j].mean()),
                }
                for i, j, kind in sorted(metrics.entities(own))
            ]
        )
    return {"predicted": pa.array(rows, pa.list_(_ENTITY)), "tags": pa.array(words, pa.list_(pa.string()))}


def _spans(bundle: Bundle, given: Floats, contexts: Sequence[str], edges: Ints, spans: Ints) -> dict[str, pa.Array]:
    found = []
    for context, (start, stop) in zip(contexts, pairwise(edges.tolist()), strict=True):
        first, last, score = best_span(given[start:stop], bundle.lengths, bundle.threshold)
        places = (0, 0) if last == 0 else (int(spans[start + first, 0]), int(spans[start + last, 1]))
        found.append({"predicted": context[slice(*places)], "start": places[0], "stop": places[1], "score": score})
    kinds = {"predicted": pa.string(), "start": pa.int32(), "stop": pa.int32(), "score": pa.float32()}
    return {name: pa.array([row[name] for row in found], kind) for name, kind in kinds.items()}


def is_right(form: str, row: Mapping[str, Any]) -> bool:
    """Whether a row of the predictions that `evaluate` writes is answered rightly: with its label, all its labels or
    tags, or one of its answers."""
    if form == "tokens":
        return bool(json.loads(row["label"]) == row["tags"])
    if form == "answers":
        return bool(metrics.exact_match(row["predicted"], [text for _, text in answers_of(row["label"])]))
    if form == "names":
        return sorted(row["label"]) == sorted(row["predicted"])
    return bool(row["label"] == row["predicted"])


def losses(bundle: Bundle, given: Floats, targets: NDArray[Any], edges: Ints | None) -> NDArray[np.float64]:
    """[rows] the loss of each row's answer; of a text's words their mean."""
    if bundle.problem == "regression":
        return 0.5 * np.square(given - targets).sum(1, dtype=np.float64)
    if bundle.problem == "multi_label":
        z = given.astype(np.float64)
        return (np.logaddexp(0, z) - targets * z).sum(1)
    if bundle.task == "text-classification":
        return metrics.losses(probabilities("softmax", given), targets)
    assert edges is not None
    if bundle.task == "token-classification":
        each = metrics.losses(probabilities("softmax", given), targets)
    else:
        each = _of_tokens(given, targets, edges)
    rows = [
        float(each[i:j].sum() if targets.ndim == 2 else each[i:j].mean()) if i < j else 0.0 for i, j in pairwise(edges)
    ]
    return np.array(rows)


def _of_tokens(given: Floats, targets: NDArray[Any], edges: Ints) -> NDArray[np.float64]:
    """[tokens] what each adds to the loss of its question."""
    found = np.zeros(len(given))
    for start, stop in pairwise(edges.tolist()):
        z = given[start:stop].astype(np.float64)
        log_p = z - np.logaddexp.reduce(z, 0)
        true = targets[start:stop]
        found[start:stop] = -np.where(true > 0, true * np.where(np.isfinite(log_p), log_p, -100.0), 0).sum(1) / 2
    return found


def shown(form: str, label: str, text: str) -> str:
    """A label as people read it."""
    if form == "tokens":
        words = text.split(" ")
        tags = json.loads(label)
        if len(words) == len(tags):
            return (
                ", ".join(f"{' '.join(words[i:j])} ({kind})" for i, j, kind in sorted(metrics.entities(tags))) or "none"
            )
        return ", ".join(kind for *_, kind in sorted(metrics.entities(tags))) or "none"
    if form == "answers":
        return " / ".join(dict.fromkeys(answer for _, answer in json.loads(label))) or "no answer"
    return ", ".join(json.loads(label)) if form == "names" else label


def told(predicted: Any) -> str:
    """An answer as people read it."""
    if isinstance(predicted, list):
        parts = (part if isinstance(part, str) else f"{part['text']} ({part['label']})" for part in predicted)
        return ", ".join(parts) or "none"
    if isinstance(predicted, float):
        return f"{predicted:.4g}"
    return "no answer" if predicted in (None, "") else str(predicted)
