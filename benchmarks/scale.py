"""How time and the driver's memory grow with rows, and time with workers: python -m benchmarks.scale

Short made-up rows, a tiny random encoder, vectors stored. Every size runs in a process of its own, whose peak memory
is the driver's: it plans units and takes receipts, and should hold nothing that grows with the rows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import machine, results

MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # whose tokenizer the tiny encoder has
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
WORKERS = (1, 2, 4)
_FILE_ROWS = 1_000_000
_WORDS = ("the", "a", "good", "bad", "day", "night", "new", "old", "time", "work", "home", "happy", "sad", "late")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.source:
        print(json.dumps(_embed(options)))
        return
    with tempfile.TemporaryDirectory(prefix="bertray-scale-") as folder:
        encoder = _encoder(Path(folder) / "encoder")
        sizes, workers = [], []
        for rows in options.sizes:
            source = _rows(rows, Path(folder) / f"rows-{rows}")
            sizes.append(_measured(rows, source, encoder, "auto"))
            if rows == options.of:
                workers = [_measured(rows, source, encoder, str(count)) for count in options.workers]
    markdown = report(sizes, workers, options.of)
    print(markdown)
    if options.write:
        results.write("scale", markdown)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="rows")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="numbers of encoder processes")
    parser.add_argument("--of", type=int, default=1_000_000, help="of which size to try numbers of processes")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument("--source", help=argparse.SUPPRESS)  # one measurement, in its own process
    parser.add_argument("--encoder", help=argparse.SUPPRESS)
    parser.add_argument("--count", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _encoder(folder: Path) -> str:
    """A random BERT of one layer, 32 wide, in a folder."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from bertray.checkpoints import find

    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(find(MODEL).folder).save_pretrained(folder)
    return str(folder)


def _rows(count: int, folder: Path, seed: int = 0) -> str:
    """So many rows of six words and a label as Parquet files."""
    rng = np.random.default_rng(seed)
    words = np.array(_WORDS)
    folder.mkdir()
    for number, start in enumerate(range(0, count, _FILE_ROWS)):
        n = min(_FILE_ROWS, count - start)
        columns = [pa.array(words[rng.integers(0, len(words), n)]) for _ in range(6)]
        joined = pa.compute.binary_join_element_wise(*columns, " ")
        labels = pa.array(np.array(["no", "yes"])[rng.integers(0, 2, n)])
        pq.write_table(pa.table({"text": joined, "label": labels}), folder / f"part-{number:03d}.parquet")
    return str(folder)


def _measured(rows: int, source: str, encoder: str, count: str) -> dict[str, float | str]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale"]
    command += ["--source", source, "--encoder", encoder, "--count", count]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float | str] = {"rows": rows, "workers": count, **json.loads(done.stdout.splitlines()[-1])}
    print(found, file=sys.stderr)
    return found


def _embed(options: argparse.Namespace) -> dict[str, float]:
    import bertray

    sizes: dict[str, object] = {"address": "local"}
    if options.count != "auto":
        import ray

        # The table is to show more processes than processors too: Ray is told that there are enough.
        cpus = max(machine.cores(), int(options.count))
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        sizes = {"workers": int(options.count), "cpus_per_worker": 1}
    with tempfile.TemporaryDirectory(prefix="bertray-scale-") as output:
        started = time.perf_counter()
        summary = bertray.run(
            {
                "data": {"train": options.source},
                "encoder": {"model": options.encoder, "pooling": "mean"},
                "ray": sizes,
                "output": output,
            },
            until="embed",
        )
        seconds = time.perf_counter() - started
        assert summary["rows"]["train"]["rows"] > 0
    return {"seconds": seconds, "embedding": summary["seconds"]["embed"], "memory": machine.peak_memory("cpu")}


def report(sizes: Sequence[dict[str, float | str]], workers: Sequence[dict[str, float | str]], of: int) -> str:
    """The section: a line a size, and a line a number of workers."""
    least = next((float(one["memory"]) for one in sizes if one["rows"] == 100_000), float(sizes[0]["memory"]))
    by_size = [{"rows": f"{one['rows']:,}", **_cells(one), **_memory(one, least)} for one in sizes]
    lines = [
        "## Scale",
        "",
        "Rows of six words in Parquet files, a random encoder of one layer, 32 wide: what is measured is all that is "
        "not the encoder. *Growth* is against 100,000 rows.",
        "",
        results.table(by_size),
    ]
    if workers:
        lines += ["", f"{of:,} rows on several encoder processes of one thread each:", ""]
        lines.append(results.table([{"workers": str(one["workers"]), **_cells(one)} for one in workers]))
    return "\n".join([*lines, "", *(f"- {name}: {fact}" for name, fact in machine.describe().items())])


def _cells(one: dict[str, float | str]) -> dict[str, str]:
    rate = float(one["rows"]) / float(one["embedding"])
    return {"seconds in all": f"{float(one['seconds']):.1f}", "rows/s once started": f"{rate:,.0f}"}


def _memory(one: dict[str, float | str], least: float) -> dict[str, str]:
    memory = float(one["memory"])
    return {"driver's memory, MB": f"{memory / 1e6:.0f}", "growth, MB": f"{(memory - least) / 1e6:+.0f}"}


if __name__ == "__main__":
    main()
