"""A whole job beside the loop of the notebook that bertray grew from, and what Ray costs: python -m benchmarks.job

The loop encodes every batch of 32 again in each of ten epochs: fp32, padded to the longest, in the order of the rows,
Adam at 0.01 on a linear head over the pooler. In each round all contestants run once, one after another.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, results, texts

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_BATCH, _EPOCHS, _LR = 32, 10, 0.01
LOOP, PROCESS, CONNECTED = "the notebook's loop", "bertray run, as a process", "the same without start-up"
BARE, THROUGH_RAY = "the engine alone, in one process", "through Ray Data, store written"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.measure:
        print(json.dumps(_MEASURED[options.measure](options)))
        return
    with tempfile.TemporaryDirectory(prefix="bertray-bench-") as folder:
        rows = _written(options.rows, Path(folder) / "rows.jsonl")
        many = _written(options.many, Path(folder) / "many.jsonl")
        jobs = {LOOP: [], PROCESS: [], CONNECTED: []}
        rates = {BARE: [], THROUGH_RAY: []}
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            jobs[LOOP].append(_ask("loop", rows, folder, full=options.full)["seconds"])
            jobs[PROCESS].append(_process(rows, folder))
            jobs[CONNECTED].append(_ask("connected", rows, folder)["seconds"])
            for name, measure in ((BARE, "bare"), (THROUGH_RAY, "stored")):
                rates[name].append(options.many / _ask(measure, many, folder)["seconds"])
    markdown = report(jobs, rates, options)
    print(markdown)
    if options.write:
        results.write("job", markdown)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000, help="tweets of the job")
    parser.add_argument("--many", type=int, default=82_443, help="tweets to compare rates on, repeated if need be")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="run all ten epochs of the loop, not one of them")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument("--measure", choices=_MEASURED, help=argparse.SUPPRESS)  # one measurement, in its own process
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _written(count: int, file: Path) -> str:
    """So many tweets as JSON Lines, with made-up labels: none of what is measured depends on them."""
    labels = ("negative", "neutral", "positive")
    rows = ({"id": str(i), "text": text, "label": labels[i % 3]} for i, text in enumerate(texts.tweets(count)))
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def _spec(source: str, output: str) -> dict[str, Any]:
    return {
        "data": {"train": source, "id": "id"},
        "encoder": {"model": MODEL, "pooling": "pooler"},
        "ray": {"address": "local"},
        "output": output,
    }


def _ask(measure: str, source: str, folder: str, full: bool = False) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.job", "--measure", measure, "--source", source, "--folder", folder]
    done = subprocess.run([*command, *(["--full"] if full else [])], stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _process(source: str, folder: str) -> float:
    """Seconds from the start of `bertray run` to its end, the report written."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        spec = Path(output) / "spec.json"  # JSON is YAML
        spec.write_text(json.dumps(_spec(source, f"{output}/run")))
        started = time.perf_counter()
        command = [sys.executable, "-m", "bertray.cli", "run", str(spec), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        assert (Path(output) / "run" / "report.html").exists()
    return seconds


def _connected(options: argparse.Namespace) -> dict[str, float]:
    """A job in a process that has done another and is connected to Ray, less the start of its encoder process."""
    import bertray
    from bertray.cluster import connected
    from bertray.spec import RaySizes

    few = _written(64, Path(options.folder) / "few.jsonl")
    with tempfile.TemporaryDirectory(dir=options.folder) as output, connected(RaySizes(address="local"), alone=True):
        bertray.run(_spec(few, f"{output}/few"))
        started = time.perf_counter()
        summary = bertray.run(_spec(options.source, f"{output}/run"))
        return {"seconds": time.perf_counter() - started - summary["seconds"]["start"]}


def _loop(options: argparse.Namespace) -> dict[str, float]:
    """The notebook's ten epochs; unless all are asked for, one of them ten times over."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from bertray.checkpoints import find

    rows = [json.loads(line) for line in Path(options.source).read_text(encoding="utf-8").split("\n") if line]
    names = sorted({row["label"] for row in rows})
    folder = find(MODEL).folder
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    head = torch.nn.Linear(model.config.hidden_size, len(names))
    optimizer = torch.optim.Adam(head.parameters(), lr=_LR)
    epochs = _EPOCHS if options.full else 1
    started = time.perf_counter()
    for _ in range(epochs):
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            encoded = tokenizer([row["text"] for row in batch], padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                vectors = model(**encoded).pooler_output
            classes = torch.tensor([names.index(row["label"]) for row in batch])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(vectors), classes).backward()
            optimizer.step()
    return {"seconds": (time.perf_counter() - started) * _EPOCHS / epochs}


def bare(source: str, threads: int, pooling: str = "pooler") -> float:
    """Seconds of the engine over all texts at once; its model is loaded."""
    from bertray.checkpoints import find
    from bertray.encoder import Encoder
    from bertray.spec import Encoder as EncoderSpec

    lines = Path(source).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line)["text"] for line in lines if line]
    encoder = Encoder(find(MODEL), EncoderSpec(model=MODEL, pooling=pooling), threads=threads)
    started = time.perf_counter()
    encoder.encode(rows)
    return time.perf_counter() - started


def _bare(options: argparse.Namespace) -> dict[str, float]:
    return {"seconds": bare(options.source, machine.cores())}


def _stored(options: argparse.Namespace) -> dict[str, float]:
    """The step `embed`: files read, vectors written, from when the first encoder process is ready."""
    import bertray

    with tempfile.TemporaryDirectory(dir=options.folder) as output:
        spec = {**_spec(options.source, output), "ray": {"address": "local", "workers": 1}}
        spec["ray"]["cpus_per_worker"] = machine.cores()
        return {"seconds": bertray.run(spec, until="embed")["seconds"]["embed"]}


_MEASURED: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "loop": _loop,
    "connected": _connected,
    "bare": _bare,
    "stored": _stored,
}


def report(jobs: dict[str, list[float]], rates: dict[str, list[float]], options: argparse.Namespace) -> str:
    """The section: seconds of the job, and rates in the long run."""
    loop = statistics.median(jobs[LOOP])
    counted = "all ten epochs" if options.full else "ten times one epoch"
    lines = [
        {
            "contestant": name if name != LOOP else f"{LOOP}, {counted}",
            "seconds": _spread(seconds, "{:.1f}"),
            "against the loop": f"{loop / statistics.median(seconds):.1f} times",
        }
        for name, seconds in jobs.items()
    ]
    bare = statistics.median(rates[BARE])
    long = [
        {
            "contestant": name,
            "rows/s": _spread(found, "{:.0f}"),
            "share": f"{100 * statistics.median(found) / bare:.0f} %",
        }
        for name, found in rates.items()
    ]
    return "\n".join(
        [
            "## A whole job",
            "",
            f"{options.rows:,} tweets, {MODEL}, pooler, Adam for ten epochs, report written. Medians of "
            f"{options.rounds} rounds, in brackets the least and the most. *Without start-up*: a second job in a "
            "process that is connected to Ray, without the time until its encoder process is ready.",
            "",
            results.table(lines),
            "",
            f"In the long run, on {options.many:,} tweets, once the model is loaded:",
            "",
            results.table(long),
            "",
            *(f"- {name}: {fact}" for name, fact in machine.describe().items()),
        ]
    )


def _spread(values: Sequence[float], form: str) -> str:
    middle, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


if __name__ == "__main__":
    main()
