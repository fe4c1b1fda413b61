"""Attention within texts on a GPU, bertray's tiles beside torch's varlen: python -m benchmarks.attention

For each length of texts, in turn, on the same queries, keys and values in the shape of BERT-base. Where the tiles stop
to be faster is where backends.py should stop to use them. Needs neither Ray nor transformers.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

from benchmarks import machine, results

_TOKENS, _HEADS, _DEPTH = 65_536, 12, 64
_LENGTHS = (4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50, help="times that each is timed")
    parser.add_argument("--write", action="store_true", help="put the outcome into RESULTS.md")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks.attention: there is no GPU here. Run it where torch.cuda.is_available().")
    rows = [_row(length, options.rounds) for length in _LENGTHS]
    chip = machine.chip("cuda")
    facts = "\n".join(f"- {name}: {fact}" for name, fact in machine.describe().items())
    told = (
        f"{_TOKENS:,} tokens in texts of one length, {_HEADS} heads of {_DEPTH} numbers in bf16, one layer. Medians of "
        f"{options.rounds} rounds in turn, in brackets the least and the most."
    )
    markdown = "\n\n".join([f"## Attention on {chip}", told, results.table(rows), facts])
    print(markdown)
    if options.write:
        results.write("-".join(["attention", *chip.lower().split()]), markdown)


def _row(length: int, rounds: int) -> dict[str, str]:
    import torch
    from torch.nn.attention.varlen import varlen_attn

    from bertray import attention

    texts = _TOKENS // length
    parts = [torch.randn(texts * length, _HEADS, _DEPTH, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    edges = torch.arange(0, texts * length + 1, length, dtype=torch.int32, device="cuda")
    bounds, scale = [each.repeat_interleave(length) for each in (edges[:-1], edges[1:])], _DEPTH**-0.5

    def tiles() -> torch.Tensor:
        return attention.within_texts(*parts, *bounds, scale)

    def varlen() -> torch.Tensor:
        return varlen_attn(*parts, edges, edges, length, length, scale=scale)

    torch.testing.assert_close(tiles(), varlen(), atol=2e-2, rtol=2e-2)
    pairs = [(_milliseconds(tiles), _milliseconds(varlen)) for _ in range(rounds)]
    ours, theirs = zip(*pairs, strict=True)
    return {
        "tokens a text": str(length),
        "tiles, ms": _spread(ours),
        "varlen, ms": _spread(theirs),
        "times as fast": f"{statistics.median(theirs) / statistics.median(ours):.2f}",
    }


def _milliseconds(run: Callable[[], object]) -> float:
    import torch

    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    run()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended))


def _spread(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})"


if __name__ == "__main__":
    main()
