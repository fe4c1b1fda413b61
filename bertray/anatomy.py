"""Anatomy: what a checkpoint consists of, as the lines of a tree, by the names and shapes of its weights alone."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_FIRST = (  # parts of a model, about as a text passes them
    *("embeddings", "word_embeddings", "tok_embeddings", "position_embeddings", "token_type_embeddings"),
    *("embeddings_project", "encoder", "transformer", "layer", "layers", "attn_norm", "attention", "attn", "self"),
    *("query", "q_lin", "key", "k_lin", "value", "v_lin", "Wqkv", "out_lin", "Wo", "dense", "sa_layer_norm"),
    *("intermediate", "ffn", "mlp_norm", "mlp", "lin1", "Wi", "lin2", "output", "output_layer_norm", "final_norm"),
    *("LayerNorm", "norm", "pooler", "weight", "bias"),
)


def tree(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """Weights as the lines of a tree, a line a part of the model. Layers that are alike stand there once, with how many
    times they come."""
    root: dict[str, Any] = {}
    for name in sorted(shapes, key=_order):
        node = root
        *path, last = name.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = shapes[name]
    return list(_lines(root, 0))


def _order(name: str) -> list[tuple[int, int, str]]:
    """Where a weight stands: about as a text passes it."""
    parts = name.split(".")
    return [
        (_FIRST.index(part) if part in _FIRST else len(_FIRST), int(part) if part.isdigit() else 0, part)
        for part in parts
    ]


def _lines(node: Mapping[str, Any], depth: int) -> Iterator[dict[str, Any]]:
    names = list(node)
    start = 0
    while start < len(names):
        name, below = names[start], node[names[start]]
        stop = start + 1
        while name.isdigit() and stop < len(names) and node[names[stop]] == below:
            stop += 1
        times = stop - start
        shown = name if times == 1 else f"{name} to {names[stop - 1]}, each"
        while isinstance(below, dict) and len(below) == 1 and isinstance(only := next(iter(below.values())), dict):
            shown, below = f"{shown}.{next(iter(below))}", only
        whole = {"": below} if isinstance(below, tuple) else below
        leaf = all(isinstance(part, tuple) for part in whole.values())
        yield {
            "name": shown,
            "depth": depth,
            "shapes": {name: list(part) for name, part in whole.items()} if leaf else {},
            "parameters": _count(below),
            "times": times,
        }
        if not leaf:
            yield from _lines(below, depth + 1)
        start = stop


def _count(node: Any) -> int:
    return int(np.prod(node)) if isinstance(node, tuple) else sum(map(_count, node.values()))
