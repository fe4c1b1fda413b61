"""Stores and bundles made by hand, for tests of what reads them."""

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
