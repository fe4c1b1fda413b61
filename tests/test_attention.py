"""Attention within short texts: what torch gives for each text alone. Interpreted where there is no GPU."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from bertray import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed(lengths, heads, depth, dtype):
    """Random queries, keys and values of texts one after another, and for each token where its text starts and ends."""
    torch.manual_seed(0)
    edges = np.cumsum([0, *lengths])
    parts = torch.randn(edges[-1], 3, heads, depth, device=DEVICE).to(dtype).unbind(1)  # not side by side in memory
    bounds = [
        torch.from_numpy(np.repeat(each, lengths).astype(np.int32)).to(DEVICE) for each in (edges[:-1], edges[1:])
    ]
    return parts, bounds, edges.tolist()


def text_by_text(parts, edges, scale):
    texts = [[part[a:b].float().transpose(0, 1) for part in parts] for a, b in pairwise(edges)]
    found = (F.scaled_dot_product_attention(*text, scale=scale).transpose(0, 1) for text in texts)
    return torch.cat(list(found))


@pytest.mark.parametrize("depth", [8, 24, 32, 64, 128])
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [64],
        [1] * 200,
        [64, 64, 64, 64],
        [33, 33, 33, 20, 20, 20, 20, 7, 1],
        [63, 62, 40, 17, 17, 17, 16, 15, 2, 1, 1],
        [300, 9, 9, 130, 9, 9],
        [21] * 61,
    ],
    ids=lambda lengths: f"{len(lengths)} up to {lengths[0]}",
)
def test_each_text_attends_to_itself(lengths, depth):
    parts, bounds, edges = packed(lengths, 3, depth, torch.float16)
    found = attention.within_texts(*parts, *bounds, 0.3)
    torch.testing.assert_close(found.float(), text_by_text(parts, edges, 0.3), atol=4e-3, rtol=4e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter cannot multiply bfloat16")
def test_bfloat16():
    parts, bounds, edges = packed([33, 33, 33, 20, 20, 20, 20, 7, 1], 3, 64, torch.bfloat16)
    found = attention.within_texts(*parts, *bounds, 0.125)
    torch.testing.assert_close(found.float(), text_by_text(parts, edges, 0.125), atol=2e-2, rtol=2e-2)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter: infinity times zero
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_is_no_number_stays_in_its_text(part, wrong):
    lengths = [20, 9, 9, 5]
    parts, bounds, edges = packed(lengths, 2, 16, torch.float16)
    whole = attention.within_texts(*parts, *bounds, 0.25)
    parts[part][edges[1] + 4, 0, 3] = wrong  # the second text's fifth token, in the first head
    found = attention.within_texts(*parts, *bounds, 0.25)
    second = slice(edges[1], edges[2])
    bad = ~text_by_text(parts, edges, 0.25).isfinite()
    assert bad.any() and not found[bad].isfinite().any()
    found[second], whole[second] = 0, 0
    torch.testing.assert_close(found, whole, atol=0, rtol=0)
