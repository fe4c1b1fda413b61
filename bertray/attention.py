"""Attention within short texts that lie one after another on a GPU, in Triton.

torch.nn.attention.varlen gives each text tiles of its own, of 128 tokens: a tweet of 20 fills a sixth of one. Here a
tile takes as many texts as lie in it, and a mask keeps them apart. All else is FlashAttention (Dao et al. 2022), with
the softmax in one pass of Milakov and Gimelshein 2018. Knows nothing of models.
"""

import triton
import triton.language as tl
from torch import Tensor, empty_like

_QUERIES = _KEYS = 64  # tokens of a tile
_LOG2_E = 1.4426950408889634


def within_texts(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, stops: Tensor, scale: float) -> Tensor:
    """Attention of each token to those of its own text.

    Args:
        query, key, value: [tokens, heads, depth] of float16 or bfloat16, the numbers of a head side by side in memory.
        starts, stops: [tokens] int32 each, for each token where its text starts and where it ends.
        scale: what products of queries and keys are multiplied with.

    Returns:
        [tokens, heads, depth]
    """
    tokens, heads, depth = query.shape
    out = empty_like(query)
    strides = [number for part in (query, key, value, out) for number in part.stride()[:2]]
    grid = (triton.cdiv(tokens, _QUERIES), heads)
    padded = max(16, triton.next_power_of_2(depth))  # the least that tensor cores multiply
    sizes = (tokens, scale * _LOG2_E, depth, padded, _QUERIES, _KEYS)
    # A tile meets two or three blocks of keys: no more than two need to be on their way at once.
    _kernel[grid](query, key, value, out, *strides, starts, stops, *sizes, num_stages=2)
    return out


@triton.jit(do_not_specialize=["tokens"])  # or it would be compiled again for some numbers
def _kernel(
    query,
    key,
    value,
    out,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    out_token,
    out_head,
    starts,
    stops,
    tokens,
    scale,  # to powers of two, which are faster than those of e
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(1)
    depth = tl.arange(0, PADDED)[None, :]
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    there = (row < tokens)[:, None] & (depth < DEPTH)
    own = tl.load(starts + row, row < tokens, -1)  # a text is told by where it starts
    place = row.to(tl.int64)[:, None]
    q = tl.load(query + place * query_token + head * query_head + depth, there, 0.0)
    first = tl.load(starts + tl.program_id(0) * QUERIES)
    last = tl.minimum(tl.program_id(0) * QUERIES + QUERIES, tokens) - 1
    stop = tl.load(stops + last)
    highest = tl.full([QUERIES], -1e30, tl.float32)  # finite, so that a block without keys of a text changes nothing
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, PADDED], tl.float32)
    for begin in range(first, stop, KEYS):
        column = begin + tl.arange(0, KEYS)
        given = (column < stop)[:, None] & (depth < DEPTH)
        of = tl.load(starts + column, column < stop, -2)
        place = column.to(tl.int64)[:, None]
        k = tl.load(key + place * key_token + head * key_head + depth, given, 0.0)
        v = tl.load(value + place * value_token + head * value_head + depth, given, 0.0)
        # What is no number would reach other texts as 0 * NaN: it is taken out, and the scores of its own become NaN.
        taint = tl.sum(v.to(tl.float32) * 0.0, 1)
        v = tl.where((taint == 0.0)[:, None], v, 0.0).to(v.dtype)
        scores = tl.dot(q, tl.trans(k)) * scale + taint[None, :]
        scores = tl.where(own[:, None] == of[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        total = total * shrunk + tl.sum(weights, 1)
        mixed = mixed * shrunk[:, None] + tl.dot(weights.to(v.dtype), v)
        highest = higher
    mixed = mixed / tl.where(own < 0, 1.0, total)[:, None]
    place = row.to(tl.int64)[:, None]
    tl.store(out + place * out_token + head * out_head + depth, mixed.to(q.dtype), there)
