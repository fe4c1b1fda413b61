"""Evaluation: stores and a bundle to predictions and metrics. Streams: no store is held whole, only what the metrics
need of each row."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bertray import answers, calibration, labels, metrics
from bertray.annotations import Ints, answers_of
from bertray.bundle import Bundle
from bertray.features import related
from bertray.heads import probabilities
from bertray.states import tables
from bertray.storage import Location
from bertray.store import Store
from bertray.vectors import vectors_of

_WORST = 20
_HELD = 50_000_000  # probabilities that are held for metrics over all rows
_SCATTER = 2_000


@dataclass(frozen=True)
class Evaluation:
    """How a bundle does on one split.

    metrics: by name; None where one is not defined. intervals: the 95 % intervals of some (bootstrap over rows).
    details: what the report shows besides: confusion, per_class, reliability, worst, scatter.
    """

    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    details: dict[str, Any]


def evaluate(
    store: Store,
    bundle: Bundle,
    classes: Mapping[str, int],
    predictions: Location,
    texts: Store | None = None,
    encoder: Any = None,
) -> Evaluation:
    """Judge a bundle by every row of a complete, labelled store, and write what it answers to each row.

    Args:
        texts: the store of the distinct texts, where pairs are encoded apart.
        encoder: what makes the vectors again, where they are not stored.

    Writes: predictions, a Parquet file with id, text (and text_pair), label, what `answers.columns` tells, and loss.
    """
    seen = _Seen(bundle, classes)
    apart = _vectors(texts, bundle) if texts else None
    with predictions.create() as stream, ExitStack() as stack:
        writer = None
        for table in tables(store, _columns(store, bundle), encoder):
            table = seen.add(table, apart)
            writer = writer or stack.enter_context(pq.ParquetWriter(stream, table.schema, compression="zstd"))
            writer.write_table(table)
    return seen.evaluation()


def _columns(store: Store, bundle: Bundle) -> list[str]:
    pair = ["text_pair"] if bundle.pairs else []
    words = ["starts", "stops"] if bundle.task != "text-classification" else []
    apart = not store.complete().features
    return ["id", "text", *pair, "label", *words, *(("first", "second") if apart else bundle.features)]


def _vectors(texts: Store, bundle: Bundle) -> NDArray[Any]:
    return np.concatenate([vectors_of(table, bundle.features) for table in texts.tables(list(bundle.features))])


def pair_vectors(table: pa.Table, apart: NDArray[Any], size: int = 8_192) -> Iterator[NDArray[np.float32]]:
    """What a head sees of pairs whose texts' vectors lie apart, some rows at a time."""
    first, second = (table[name].to_numpy() for name in ("first", "second"))
    for start in range(0, max(1, len(first)), size):
        u, v = (apart[rows[start : start + size]].astype(np.float32) for rows in (first, second))
        yield related(u, v)


@dataclass
class _Seen:
    """What metrics need of the rows so far."""

    bundle: Bundle
    classes: Mapping[str, int]
    rows: int = 0
    outliers: int = 0
    held: int = 0
    worst: list[dict[str, Any]] = field(default_factory=list)
    losses: list[NDArray[np.float64]] = field(default_factory=list)
    targets: list[NDArray[Any]] = field(default_factory=list)
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)
    true: list[Any] = field(default_factory=list)

    def add(self, table: pa.Table, apart: NDArray[Any] | None) -> pa.Table:
        """Answer the rows of a shard; returns the predictions."""
        bundle, pairs = self.bundle, None
        if apart is not None:
            parts = (self._looked_at(part) for part in pair_vectors(table, apart))
            logits = np.concatenate([bundle.head.logits(part) for part in parts])
            edges = spans = None
        else:
            vectors, edges, spans = answers.states_of(table, bundle.features)
            logits, edges, spans = answers.logits(bundle, self._looked_at(vectors), edges, spans)
        texts, true = table["text"].to_pylist(), table["label"].to_pylist()
        if bundle.pairs:
            pairs = table["text_pair"].to_pylist()
        targets = labels.targets(bundle.form, true, self.classes, len(bundle.labels), edges, spans)
        losses = answers.losses(bundle, logits, targets, edges)
        found = answers.columns(bundle, logits, texts, pairs, edges, spans)
        kept = [name for name in ("id", "text", "text_pair") if name in table.column_names]
        result = table.select(kept).append_column("label", self._labels(true, targets))
        for name, column in {**found, "loss": pa.array(losses)}.items():
            result = result.append_column(name, column)
        self._note(result, true, logits, targets, losses, edges)
        return result

    def _looked_at(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """The vectors; those unlike the training rows are counted."""
        if self.bundle.ood:
            self.outliers += int(self.bundle.ood.outliers(vectors).sum())
        return vectors

    def _labels(self, true: list[str], targets: NDArray[Any]) -> pa.Array:
        form = self.bundle.form
        if form == "name":
            return pa.array([self.bundle.labels[i] for i in targets], pa.string())
        if form == "number":
            return pa.array(targets[:, 0])
        if form == "names":
            named = [[self.bundle.labels[i] for i in np.flatnonzero(row)] for row in targets]
            return pa.array(named, pa.list_(pa.string()))
        if form == "tokens":  # numbers may stand for tags
            true = [labels.named(label, self.bundle.labels, self.classes) for label in true]
        return pa.array(true, pa.string())

    def _note(
        self,
        result: pa.Table,
        true: list[str],
        logits: NDArray[np.float32],
        targets: NDArray[Any],
        losses: NDArray[np.float64],
        edges: Ints | None,
    ) -> None:
        form = self.bundle.form
        self.rows += result.num_rows
        self.losses.append(losses)
        self.held += logits.size
        if form in ("name", "names", "number") and self.held <= _HELD:
            self.logits.append(logits)
        if form == "tokens":
            assert edges is not None
            names = [self.bundle.labels[i] for i in targets]
            self.true += [names[i:j] for i, j in pairwise(edges.tolist())]
            self.given += result["tags"].to_pylist()
        elif form == "answers":
            self.true += [[text for _, text in answers_of(label)] for label in true]
            self.given += result["predicted"].to_pylist()
        else:
            self.targets.append(targets)
            self.given.append(logits.argmax(1) if form == "name" else logits[:, 0] if form == "number" else logits > 0)
        self.worst += [_told(row, form) for row in _worst(result, form)]
        self.worst = sorted(self.worst, key=lambda row: -row["loss"])[:_WORST]

    def evaluation(self) -> Evaluation:
        """The metrics of all rows."""
        found = {
            "name": self._classes,
            "names": self._several,
            "number": self._numbers,
            "tokens": self._entities,
            "answers": self._answers,
        }[self.bundle.form]()
        loss = float(np.concatenate(self.losses).mean()) if self.losses else 0.0
        figures = {**found.metrics, "loss": loss}
        if self.bundle.ood:
            figures["outliers"] = self.outliers / max(1, self.rows)
        defined = {
            name: float(value) if math.isfinite(value) else None for name, value in figures.items() if value is not None
        }
        defined["rows"] = self.rows
        return Evaluation(defined, found.intervals, {**found.details, "worst": self.worst})

    def _classes(self) -> Evaluation:
        count = len(self.bundle.labels)
        true, given = np.concatenate(self.targets), np.concatenate(self.given)
        matrix = metrics.confusion(true, given, count)

        def statistic(rows: Ints) -> dict[str, float]:
            of = metrics.confusion(true[rows], given[rows], count)
            return {"accuracy": metrics.accuracy(of), "macro_f1": metrics.macro_f1(of)}

        found: dict[str, Any] = {
            "accuracy": metrics.accuracy(matrix),
            "macro_f1": metrics.macro_f1(matrix),
            "micro_f1": metrics.micro_f1(matrix),
        }
        details: dict[str, Any] = {
            "confusion": matrix.tolist(),
            "per_class": _per_class(metrics.per_class(matrix), self.bundle),
        }
        if self.held <= _HELD:
            logits = np.concatenate(self.logits)
            p, unscaled = (probabilities("softmax", logits * np.float32(heat)) for heat in (1, self.bundle.temperature))
            details["reliability_before"] = _reliability(unscaled.max(1), unscaled.argmax(1) == true)
            found |= {"auroc": metrics.macro_auroc(p, true)} | _sure(p, true, self.bundle, details)
        return Evaluation(found, metrics.bootstrap(statistic, len(true)), details)

    def _several(self) -> Evaluation:
        true, given = np.concatenate(self.targets) > 0, np.concatenate(self.given)
        counts = metrics.label_counts(true, given)

        def statistic(rows: Ints) -> dict[str, float]:
            of = metrics.label_counts(true[rows], given[rows])
            return {"micro_f1": metrics.micro(of)["f1"], "macro_f1": metrics.macro(of)["f1"]}

        found: dict[str, Any] = {
            "exact": metrics.exact_share(true, given),
            "micro_f1": metrics.micro(counts)["f1"],
            "macro_f1": metrics.macro(counts)["f1"],
        }
        if self.held <= _HELD:
            logits = np.concatenate(self.logits)
            areas = [metrics.auroc(logits[:, i], true[:, i]) for i in range(true.shape[1])]
            found["auroc"] = float(np.nanmean(areas)) if np.isfinite(areas).any() else math.nan
        return Evaluation(
            found,
            metrics.bootstrap(statistic, len(true)),
            {"per_class": _per_class(metrics.per_label(counts), self.bundle)},
        )

    def _numbers(self) -> Evaluation:
        true, given = np.concatenate(self.targets)[:, 0], np.concatenate(self.given)
        step = max(1, len(true) // _SCATTER)
        scatter = {"true": true[::step].tolist(), "given": given[::step].tolist()}
        return Evaluation(
            {**metrics.regression(true, given)},
            metrics.bootstrap(lambda rows: metrics.regression(true[rows], given[rows]), len(true)),
            {"scatter": scatter},
        )

    def _entities(self) -> Evaluation:
        each = [metrics.entity_counts([true], [given]) for true, given in zip(self.true, self.given, strict=True)]
        scores = metrics.entity_scores(metrics.sum_counts(each))
        sums = np.array([np.sum([*counts.values(), (0, 0, 0)], 0) for counts in each])

        def statistic(rows: Ints) -> dict[str, float]:
            hits, support, given = sums[rows].sum(0)
            return {"f1": float(2 * hits / max(1, support + given))}

        words = [
            a == b for true, given in zip(self.true, self.given, strict=True) for a, b in zip(true, given, strict=True)
        ]
        found = {
            **scores["micro"],
            "macro_f1": scores["macro"]["f1"],
            "accuracy": float(np.mean(words)) if words else 0.0,
        }
        per_class = [{"label": kind, **row} for kind, row in sorted(scores["types"].items())]
        return Evaluation(found, metrics.bootstrap(statistic, len(each)), {"per_class": per_class})

    def _answers(self) -> Evaluation:
        pairs = list(zip(self.given, self.true, strict=True))
        scores = np.array([[metrics.exact_match(given, true), metrics.span_f1(given, true)] for given, true in pairs])
        scores = scores.reshape(-1, 2)

        def statistic(rows: Ints) -> dict[str, float]:
            exact, f1 = scores[rows].mean(0)
            return {"exact": float(exact), "f1": float(f1)}

        found = statistic(np.arange(len(scores)))
        answered = np.array([bool(true) for _, true in pairs])
        if not answered.all():
            found["no_answer_f1"] = float(scores[~answered, 1].mean())
            if answered.any():
                found["has_answer_f1"] = float(scores[answered, 1].mean())
        return Evaluation(dict(found), metrics.bootstrap(statistic, len(scores)), {})


def _sure(p: NDArray[np.float32], true: Ints, bundle: Bundle, details: dict[str, Any]) -> dict[str, float]:
    """Metrics of how far probabilities can be trusted; what the report shows of it goes to `details`."""
    sure, right = p.max(1), p.argmax(1) == true
    details["reliability"] = _reliability(sure, right)
    curve = calibration.abstention(sure, right)
    details["abstention"] = {name: getattr(curve, name).tolist() for name in ("threshold", "coverage", "accuracy")} | {
        "chosen": bundle.threshold
    }
    found = {"ece": details["reliability"]["ece"]}
    if bundle.threshold:
        answered = sure >= bundle.threshold
        found["coverage"] = float(answered.mean())
        found["accuracy_answered"] = float(right[answered].mean()) if answered.any() else math.nan
    return found


def _reliability(sure: NDArray[np.float32], right: NDArray[np.bool_]) -> dict[str, Any]:
    found = calibration.reliability(sure, right)
    return {name: getattr(found, name).tolist() for name in ("confidence", "accuracy", "count")} | {"ece": found.ece}


def _per_class(found: Mapping[str, NDArray[np.float64]], bundle: Bundle) -> list[dict[str, Any]]:
    return [
        {"label": label, **{name: float(values[i]) for name, values in found.items()}}
        for i, label in enumerate(bundle.labels)
    ]


def _worst(result: pa.Table, form: str) -> list[dict[str, Any]]:
    """The wrong answers of a table with the highest loss."""
    order = np.argsort(-result["loss"].to_numpy(), kind="stable")
    if form == "number":
        return result.take(order[:_WORST]).to_pylist()
    found: list[dict[str, Any]] = []
    for start in range(0, len(order), 4 * _WORST):
        rows = result.take(order[start : start + 4 * _WORST]).to_pylist()
        found += [row for row in rows if not answers.is_right(form, row)]
        if len(found) >= _WORST:
            break
    return found[:_WORST]


def _told(row: dict[str, Any], form: str) -> dict[str, Any]:
    """A row of the predictions as people read it."""
    label = answers.told(row["label"]) if form in ("name", "names", "number") else row["label"]
    if form in ("tokens", "answers"):
        label = answers.shown(form, label, row["text"])
    kept = {name: row[name] for name in ("id", "text", "text_pair", "loss", "score") if row.get(name) is not None}
    return {**kept, "label": label, "predicted": answers.told(row["predicted"])}
