"""A job on 1, 2 and 4 nodes beside the bare engine, and what it costs when a node dies: python -m benchmarks.nodes

All nodes are Ray's own on this machine, each of one CPU and one encoder process of one thread; more nodes than the
machine has cores share them. What is measured is the step `embed` from when the first encoder process is ready, files
read and vectors written. In each round all are measured once, one after another.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import machine, results, texts
from benchmarks.job import MODEL, bare

POOLING = "mean"
_NODES = (1, 2, 4)
_UNIT = 500
_LIMIT = 600.0  # seconds of one job


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.bare:
        print(json.dumps(bare(options.bare, options.threads, POOLING)))
        return
    alone: dict[int, list[float]] = {n: [] for n in options.nodes}
    rates: dict[int, list[float]] = {n: [] for n in options.nodes}
    jobs: dict[str, list[dict[str, Any]]] = {"undisturbed": [], "a node killed, another added": []}
    with tempfile.TemporaryDirectory(prefix="bertray-nodes-") as folder:
        rows = Path(folder) / "rows.jsonl"
        lines = [
            json.dumps({"id": str(i), "text": text, "label": "no"}) for i, text in enumerate(texts.tweets(options.rows))
        ]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for nodes in options.nodes:
                alone[nodes].append(options.rows / _asked(rows, min(nodes, machine.cores())))
                rates[nodes].append(options.rows / _job(rows, Path(folder) / "run", nodes)["embed"])
            for name, found in jobs.items():
                found.append(_job(rows, Path(folder) / "run", 2, disturbed=name != "undisturbed"))
    markdown = report(alone, rates, jobs, options)
    print(markdown)
    if options.write:
        results.write("nodes", markdown)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="tweets")
    parser.add_argument("--nodes", type=int, nargs="+", default=_NODES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument("--bare", help=argparse.SUPPRESS)  # one measurement of these rows, in its own process
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _asked(rows: Path, threads: int) -> float:
    command = [sys.executable, "-m", "benchmarks.nodes", "--bare", str(rows), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _job(rows: Path, run: Path, nodes: int, disturbed: bool = False) -> dict[str, Any]:
    """One job on a cluster of its own.

    Returns:
        embed: seconds of the step; wall: of the process; again: units that were begun again.
    """
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        added = [cluster.add_node(num_cpus=1) for _ in range(nodes)]
        cluster.wait_for_nodes()
        spec = run.with_suffix(".json")
        sizes = {"address": cluster.address, "workers": nodes, "cpus_per_worker": 1, "patience": 30}
        data = {"train": str(rows), "id": "id", "unit_rows": _UNIT}
        encoder = {"model": MODEL, "pooling": POOLING}
        spec.write_text(json.dumps({"data": data, "encoder": encoder, "output": str(run), "ray": sizes}))
        command = [sys.executable, "-m", "bertray.cli", "embed", str(spec), "--json"]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if disturbed:
            _half_done(run, process)
            _kill(cluster, added[0], run)
            cluster.add_node(num_cpus=1)
        output, _ = process.communicate(timeout=_LIMIT)
        wall = time.perf_counter() - started
        assert process.returncode == 0, output
        summary = json.loads(output)
        return {
            "embed": summary["seconds"]["embed"],
            "wall": wall,
            "again": summary["faults"]["units_begun_again"],
        }
    finally:
        cluster.shutdown()
        shutil.rmtree(run, ignore_errors=True)


def _half_done(run: Path, process: subprocess.Popen[str]) -> None:
    units = len(run.with_name("rows.jsonl").read_bytes().splitlines()) // _UNIT
    while len(list(run.rglob("shards/*.parquet"))) < units // 2:
        assert process.poll() is None, "the job ended before a node was killed"
        time.sleep(0.05)


def _kill(cluster: Any, node: Any, run: Path) -> None:
    """End a node as a machine ends that loses power, its encoder process too."""
    notes = [json.loads(note.read_bytes()) for note in run.rglob("running/*.json")]
    cluster.remove_node(node, allow_graceful=False)
    for pid in {note["pid"] for note in notes if note["node"] == node.node_id}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def report(
    alone: dict[int, list[float]],
    rates: dict[int, list[float]],
    jobs: dict[str, list[dict[str, Any]]],
    options: argparse.Namespace,
) -> str:
    """The section."""
    lines = [
        {
            "nodes": str(nodes),
            "rows/s": _spread(rates[nodes]),
            "the bare engine on as many cores": _spread(alone[nodes]),
            "efficiency": f"{100 * statistics.median(rates[nodes]) / statistics.median(alone[nodes]):.0f} %",
        }
        for nodes in rates
    ]
    calm = statistics.median(job["wall"] for job in jobs["undisturbed"])
    lost = [
        {
            "job on 2 nodes": name,
            "seconds": _spread([job["wall"] for job in found]),
            "lost": f"{statistics.median(job['wall'] for job in found) - calm:.1f} s",
            "units begun again": str(max(job["again"] for job in found)),
        }
        for name, found in jobs.items()
    ]
    return "\n".join(
        [
            "## Nodes",
            "",
            f"{options.rows:,} tweets in units of {_UNIT}, {MODEL}, {POOLING}. Each node has one CPU and one encoder "
            f"process of one thread; all are on one machine of {machine.cores()} cores. Medians of {options.rounds} "
            "round(s), in brackets the least and the most.",
            "",
            results.table(lines),
            "",
            "The whole command, with a node that is killed with its processes when half of the units are done, and "
            "another that joins at once:",
            "",
            results.table(lost),
            "",
            *(f"- {name}: {fact}" for name, fact in machine.describe().items()),
        ]
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    main()
