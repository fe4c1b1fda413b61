"""Evaluation: a store and a head to predictions and metrics. Streams: no store is held whole."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bertray import labels, metrics
from bertray.heads import LinearHead
from bertray.storage import Location
from bertray.store import Store, vectors_of

_WORST = 20


@dataclass(frozen=True)
class Evaluation:
    """How a head does on one split.

    confusion: [classes, classes], true classes in rows. loss: mean of -log p(true class).
    worst: the wrong answers with the highest loss, as rows of the predictions.
    """

    rows: int
    loss: float
    confusion: NDArray[np.int64]
    worst: list[dict[str, Any]]

    @property
    def summary(self) -> dict[str, float]:
        return {
            "accuracy": metrics.accuracy(self.confusion),
            "macro_f1": metrics.macro_f1(self.confusion),
            "loss": self.loss,
            "rows": self.rows,
        }


def evaluate(
    store: Store, head: LinearHead, classes: Mapping[str, int], names: Sequence[str], predictions: Location
) -> Evaluation:
    """Judge a head by every row of a complete, labelled store, and write what it gave each row.

    Writes: predictions, a Parquet file with id, text (and text_pair), label, predicted, score (the probability
    of what was predicted) and loss.
    """
    matrix = np.zeros((len(names), len(names)), np.int64)
    total, worst = 0.0, list[dict[str, Any]]()
    with predictions.create() as stream, ExitStack() as stack:
        writer = None
        for table in store.tables(["id", "text", *_pair(store), "label", "vector"]):
            true = labels.to_classes(table["label"].to_pylist(), classes)
            answers, given = _answers(table, head, true, names)
            loss = answers["loss"].to_numpy()
            matrix += metrics.confusion(true, given, len(names))
            total += float(loss.sum())
            wrong = np.flatnonzero(given != true)
            worst += answers.take(wrong[np.argsort(-loss[wrong], kind="stable")[:_WORST]]).to_pylist()
            worst = sorted(worst, key=lambda row: -row["loss"])[:_WORST]
            writer = writer or stack.enter_context(pq.ParquetWriter(stream, answers.schema, compression="zstd"))
            writer.write_table(answers)
    rows = int(matrix.sum())
    return Evaluation(rows, total / max(1, rows), matrix, worst)


def _answers(
    table: pa.Table, head: LinearHead, true: NDArray[np.int64], names: Sequence[str]
) -> tuple[pa.Table, NDArray[np.int64]]:
    """What a head gives the rows of a shard, as a table, and as class indices [rows]."""
    probabilities = head.probabilities(vectors_of(table))
    given = probabilities.argmax(1)
    columns = {
        "label": pa.array([names[i] for i in true], pa.string()),
        "predicted": pa.array([names[i] for i in given], pa.string()),
        "score": pa.array(probabilities.max(1)),
        "loss": pa.array(metrics.losses(probabilities, true)),
    }
    answers = table.drop_columns(["vector", "label"])
    for name, column in columns.items():
        answers = answers.append_column(name, column)
    return answers, given


def _pair(store: Store) -> list[str]:
    manifest = store.manifest()
    return ["text_pair"] if manifest and manifest.made_by["columns"]["text_pair"] else []
