"""Stores and bundles made by hand, for tests of what reads them."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from bertray.bundle import Bundle
from bertray.heads import LinearHead
from bertray.store import Manifest, Receipt, Store
from bertray.vectors import with_vectors

NOTHING = pa.table({"id": pa.array([], pa.string()), "reason": [], "preview": []})


def store_of(folder, rows, vectors, features=("mean_6",), spans=None, shards=(), columns=None):
    """A complete store.

    Args:
        rows: columns, of strings or numbers. vectors: [n, width], or n arrays [words, width] with their spans.
        shards: where it is cut.
    """
    store, receipts = Store(str(folder)), []
    table = pa.table(rows)
    if "id" not in table.column_names:
        table = table.add_column(0, "id", pa.array([f"r{i}" for i in range(table.num_rows)], pa.string()))
    edges = [0, *shards, table.num_rows]
    for number, (start, stop) in enumerate(pairwise(edges)):
        part = table.slice(start, stop - start)
        if features:
            encoded = SimpleNamespace(vectors=vectors[start:stop], spans=None if spans is None else spans[start:stop])
            part = with_vectors(part, encoded, features)
        receipt = Receipt(f"u{number}", stop - start, 0, 0, 0, 0, 0.0)
        receipts.append(store.write_shard(receipt, part, NOTHING))
    made = {"features": list(features), "columns": columns or {"text_pair": ""}}
    store.finish(Manifest(f"print-{folder}", made, tuple(receipts)))
    return store


def ragged(parts):
    """Arrays of different lengths as an array of objects."""
    found = np.empty(len(parts), object)
    for i, part in enumerate(parts):
        found[i] = part
    return found


def words_of(counts, width, seed=0, dtype=np.float32):
    """Random vectors of texts of so many words, and where these would be."""
    rng = np.random.default_rng(seed)
    vectors = ragged([rng.normal(size=(count, width)).astype(dtype) for count in counts])
    spans = ragged([np.stack([np.arange(n) * 2, np.arange(n) * 2 + 1], 1).astype(np.int64) for n in counts])
    return vectors, spans


def bundle(task="text-classification", problem="single_label", labels=("a", "b", "c"), **fields):
    """A bundle with a head of zeros, where no other is given."""
    pair = fields.pop("pair", "")
    made = {
        "features": ("mean_6",),
        "encoder": {"pair": "cross"},
        "columns": {"text_pair": pair},
        "head_spec": {},
        "losses": (),
        "seconds": 0.0,
        "fingerprint": "",
        "versions": {},
        "head": LinearHead(np.zeros((len(labels), 4), np.float32), np.zeros(len(labels), np.float32)),
        "metrics": {},
    }
    return Bundle(task, problem, tuple(labels), **made | fields)


LABELS = ("negative", "neutral", "positive")


def heads_of_every_kind(folder, rows):
    """Bundles of every kind of head on one encoder, in full precision so that all processes give the same numbers, as
    NAME/head below a folder: their names. `mood` knows sense, since it is fitted (by least squares) on rows with text
    and label; all others are random.
    """
    from conftest import MINILM

    from bertray import bundle as bundles
    from bertray.checkpoints import find
    from bertray.encoder import Encoder
    from bertray.predict import encoder_spec

    checkpoint = find(MINILM)
    encoder = {"model": MINILM, "revision": "main", "pooling": "mean", "layers": "last", "pair": "cross"} | {
        "max_length": 512,
        "truncation": "truncate",
        "overlap": 64,
        "states": "store",
        "precision": "fp32",
        "identity": checkpoint.identity,
    }
    vectors = Encoder(checkpoint, encoder_spec(encoder)).encode([row["text"] for row in rows]).vectors
    wide = np.concatenate([vectors.astype(np.float64), np.ones((len(rows), 1))], 1)
    wanted = 4.0 * np.array([[row["label"] == label for label in LABELS] for row in rows]) - 2.0
    fitted = np.linalg.solve(wide.T @ wide + np.eye(wide.shape[1]), wide.T @ wanted).T.astype(np.float32)
    mood = LinearHead(np.ascontiguousarray(fitted[:, :-1]), fitted[:, -1].copy())

    def random(outputs, width, seed, size=0.3):
        rng = np.random.default_rng(seed)
        weight, bias = size * rng.standard_normal((outputs, width)), 0.1 * rng.standard_normal(outputs)
        return LinearHead(weight.astype(np.float32), bias.astype(np.float32))

    width = vectors.shape[1]
    siamese = {**encoder, "pair": "siamese"}
    tags = ("O", "B-person", "I-person", "B-place", "I-place")
    lengths = tuple(-0.5 * n for n in range(1, 9))
    made = {
        "mood": bundle(labels=LABELS, head=mood),
        "topics": bundle("text-classification", "multi_label", ("family", "travel", "work"), head=random(3, width, 1)),
        "stars": bundle("text-classification", "regression", ("stars",), head=random(1, width, 2)),
        "same": bundle(labels=("no", "yes"), pair="b", encoder=siamese, head=random(2, 4 * width, 3, 0.1)),
        "follows": bundle(labels=("no", "yes"), pair="b", head=random(2, width, 4)),
        "entities": bundle("token-classification", labels=tags, features=("first_4",), head=random(5, width, 5, 0.2)),
        "questions": bundle(
            "question-answering",
            labels=("start", "end"),
            features=("mean_2", "mean_4"),
            pair="context",
            lengths=lengths,
            head=random(2, 6 * width, 6, 0.05),
        ),
    }
    for name, one in made.items():
        own = {**encoder, **one.encoder}
        columns = {"text": "text", "label": "label", "id": "", **one.columns}
        bundles.save(replace(one, encoder=own, columns=columns), str(folder / name / "head"))
    return list(made)
