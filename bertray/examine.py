"""A closer look at a finished run, for its report: a map of the vectors, labels that are probably wrong, rows that
contradict each other or lie in two splits, and samples of what was cut or set aside."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bertray import answers, doubts, labels
from bertray.bundle import Bundle
from bertray.search import Choice
from bertray.splits import Split
from bertray.store import Manifest, Store
from bertray.vectors import vectors_of

_POINTS = 2_000  # of a map
_COMPARED = 30_000  # rows of a split that are compared with others
_SHOWN = 20
_TEXT = 300  # characters of a text


def details(
    splits: Mapping[str, Split],
    manifests: Mapping[str, Manifest],
    bundle: Bundle,
    choice: Choice,
    classes: Mapping[str, int],
    predictions: pa.Table,
    judged: str,
) -> dict[str, Any]:
    """What can be said of a run beyond its metrics; what does not apply is left out.

    Args:
        splits, manifests: train, and where they are there dev and test, with complete stores.
        predictions: of the split that is judged: id, text, label, predicted.
    """
    found: dict[str, Any] = {"rejected": _rejected(splits, manifests)}
    rows = {name: _rows(splits[name].store, bundle) for name in ("train", "test") if name in splits}
    train = rows["train"]
    if bundle.form == "name":
        texts, names = train["text"].to_pylist(), _names(train, bundle, classes)
        found["conflicts"] = doubts.conflicts(texts, names)[:_SHOWN] if not bundle.pairs else []
        found["doubts"] = _doubts(splits["dev" if "dev" in splits else "train"].store, bundle, choice, classes)
    if "test" in rows and not bundle.pairs:
        found["overlap"] = _overlap(train, rows["test"], bundle, classes)
    if bundle.part == "text" and not bundle.siamese:
        found["map"] = _map(splits[judged].store, bundle, predictions)
        if "test" in rows:
            found["near"] = _near(rows, bundle, classes)
    return found


def _rows(store: Store, bundle: Bundle) -> pa.Table:
    """Up to so many rows of a store: from its beginning, since they are to be compared with all others of their
    kind."""
    vectors = [bundle.features[-1]] if bundle.part == "text" and not bundle.siamese else []
    tables, count = [], 0
    for table in store.tables(["id", "text", "label", *vectors]):
        tables.append(table.slice(0, _COMPARED - count))
        count += tables[-1].num_rows
        if count >= _COMPARED:
            break
    return pa.concat_tables(tables)


def _name(label: str, text: str, bundle: Bundle, classes: Mapping[str, int]) -> str:
    """A kept label as people read it."""
    if bundle.form == "name":
        return bundle.labels[classes[label]]
    if bundle.form in ("names", "tokens"):
        label = labels.named(label, bundle.labels, classes)
    return answers.shown(bundle.form, label, text)[:_TEXT]


def _names(rows: pa.Table, bundle: Bundle, classes: Mapping[str, int]) -> list[str]:
    pairs = zip(rows["label"].to_pylist(), rows["text"].to_pylist(), strict=True)
    return [_name(label, text, bundle, classes) for label, text in pairs]


def _shown(row: Mapping[str, Any], bundle: Bundle, classes: Mapping[str, int]) -> dict[str, Any]:
    return {"id": row["id"], "text": row["text"][:_TEXT], "label": _name(row["label"], row["text"], bundle, classes)}


def _doubts(store: Store, bundle: Bundle, choice: Choice, classes: Mapping[str, int]) -> list[dict[str, Any]]:
    """The labels of rows that were left out which are most probably wrong."""
    p = choice.probabilities
    if p is None or choice.targets is None or not len(p):
        return []
    rows, suggested = doubts.label_doubts(p, choice.targets)
    wanted = {int(row): int(other) for row, other in zip(rows[:_SHOWN], suggested[:_SHOWN], strict=True)}
    found = {}
    for number, row in _picked(store, sorted(wanted)):
        other = wanted[number]
        shown = _shown(row, bundle, classes)
        p_label, p_suggested = float(p[number, choice.targets[number]]), float(p[number, other])
        found[number] = {**shown, "suggested": bundle.labels[other], "p_label": p_label, "p_suggested": p_suggested}
    return [found[int(row)] for row in rows[:_SHOWN]]


def _picked(store: Store, numbers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a store by their numbers, which rise."""
    left, begun = list(numbers), 0
    for table in store.tables(["id", "text", "label"]):
        if not left:
            return
        own = [number for number in left if number < begun + table.num_rows]
        places = pa.array([number - begun for number in own], pa.int64())
        yield from zip(own, table.take(places).to_pylist(), strict=True)
        left, begun = left[len(own) :], begun + table.num_rows


def _overlap(train: pa.Table, test: pa.Table, bundle: Bundle, classes: Mapping[str, int]) -> dict[str, Any]:
    old, new = (_names(table, bundle, classes) for table in (train, test))
    found = doubts.overlap(train["text"].to_pylist(), test["text"].to_pylist(), old, new, examples=_SHOWN)
    return {"rows": found.rows, "differing": found.differing, "examples": found.examples}


def _map(store: Store, bundle: Bundle, predictions: pa.Table) -> dict[str, Any]:
    """The first two principal components of some rows' vectors."""
    step = max(1, predictions.num_rows // _POINTS)
    kept = predictions.take(np.arange(0, predictions.num_rows, step)[:_POINTS])
    vectors, begun = [], 0
    for table in store.tables(list(bundle.features)):
        mine = np.arange((-begun) % step, table.num_rows, step)
        vectors.append(vectors_of(table, bundle.features)[mine])
        begun += table.num_rows
    x = np.concatenate(vectors)[: kept.num_rows].astype(np.float64)
    x -= x.mean(0)
    _, axes = np.linalg.eigh(x.T @ x if x.shape[1] < len(x) else x @ x.T)
    places: NDArray[np.float64] = x @ axes[:, :-3:-1] if x.shape[1] < len(x) else axes[:, :-3:-1]
    return {
        "x": places[:, 0].tolist(),
        "y": places[:, -1].tolist(),
        **{name: list(map(answers.told, kept[name].to_pylist())) for name in ("label", "predicted", "id")},
        "text": [text[:_TEXT] for text in kept["text"].to_pylist()],
    }


def _near(rows: Mapping[str, pa.Table], bundle: Bundle, classes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of both splits whose vectors are almost the same."""
    old, new = (vectors_of(rows[name], bundle.features[-1:]).astype(np.float32) for name in ("train", "test"))
    found = doubts.near_duplicates(old, new, most_pairs=_SHOWN)
    shown = []
    for one, other, cosine in zip(*(part.tolist() for part in found), strict=True):
        pair = {"train": rows["train"].slice(one, 1), "test": rows["test"].slice(other, 1)}
        both = {name: _shown(row.to_pylist()[0], bundle, classes) for name, row in pair.items()}
        shown.append({"cosine": cosine, **both})
    return shown


def _rejected(splits: Mapping[str, Split], manifests: Mapping[str, Manifest]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for name, split in splits.items():
        for receipt in manifests[name].units if name in manifests else ():
            if receipt.rejected and len(found) < _SHOWN:
                found += split.store.rejects(receipt.unit)
    return found[:_SHOWN]
