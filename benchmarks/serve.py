"""`bertray serve` beside plain services with the same encoder and head, under load from wrk: python -m benchmarks.serve

In each round every service is started anew, asked whether it answers as bertray does in Python, warmed up, put under
four kinds of load and ended. Load and service share this machine's cores. No text is sent twice, so no cache helps.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load, machine, plain, results, services, soak, texts
from benchmarks.contestants import SkippedError
from benchmarks.load import Outcome, Texts
from benchmarks.services import BERTRAY, BERTRAY_VECTORS, INFINITY, RAY, Expected, Running, Setting

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
ONE, MANY, LISTS, PACED = "one", "many", "lists", "paced"
_CONNECTIONS, _LISTERS, _SPARE = 64, 4, 256
_LIST = 32
_PACE = 0.8
_BLOCK = 2048  # texts that the bare engine is given at once
_JUDGED = 12  # texts whose answers are compared
_ROWS = 2000  # that the head is fitted on


@dataclass
class Measured:
    """What one service did. outcomes: kind of load -> an outcome for each round; difference: of its answers."""

    outcomes: dict[str, list[Outcome]] = field(default_factory=lambda: {kind: [] for kind in (ONE, MANY, LISTS, PACED)})
    difference: float = 0.0

    def of(self, kind: str, name: str) -> list[float]:
        return [getattr(outcome, name) for outcome in self.outcomes[kind]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.app:
        print(json.dumps(_APPS[options.app](**json.loads(options.given))))
        return
    if load.missing() and options.rounds:
        raise SystemExit(load.INSTALL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that services end too
    with tempfile.TemporaryDirectory(prefix="bertray-serve-") as scratch:
        sections = _sections(options, Path(scratch))
        for name, markdown in sections:
            print(markdown)
            if options.write:
                results.write(name, markdown)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="of each kind of load")
    parser.add_argument("--rounds", type=int, default=3, help="0: no comparison, for --soak alone")
    parser.add_argument(
        "--only", nargs="+", choices=services.NAMES, default=list(services.NAMES), help="who takes part"
    )
    parser.add_argument("--data", type=Path, help="folder with tweets/train.jsonl; without it the demo's rows are sent")
    parser.add_argument("--bundle", help="head to serve, on the mean over the last layer; fitted if left out")
    parser.add_argument("--infinity", default="", help="virtual environment with infinity-emb[torch,server]")
    parser.add_argument(
        "--soak", type=float, default=0, metavar="MINUTES", help="of mixed load with faults, all checked"
    )
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument("--app", choices=_APPS, help=argparse.SUPPRESS)  # be that, in a process of its own
    parser.add_argument("--given", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _sections(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, str]]:
    source = options.data / "tweets" / "train.jsonl" if options.data else texts.DEMO
    if not source.exists():
        raise SystemExit(
            f"There is no {source}. Give --data the folder that tweets/train.jsonl is in, or leave it out."
        )
    corpus = list(dict.fromkeys(text for text in texts.rows(source) if text.strip()))
    if options.rounds:
        bundle = options.bundle or _fitted(source, scratch / "run")
        yield "serve", _compared(options, bundle, corpus, scratch)
    if options.soak:
        heads = {
            name: _fitted(source, scratch / "heads" / name, soak.PRECISION, **head) for name, head in soak.HEADS.items()
        }
        yield "serve-soak", soak.section(heads, scratch, corpus, options.soak * 60)


def _fitted(source: Path, output: Path, precision: str = "auto", **head: Any) -> str:
    """The folder of a head that is fitted on the first rows of a source, in a process of its own."""
    spec = {
        "data": {"train": {"path": str(source), "limit": _ROWS}, "labels": ["negative", "neutral", "positive"]},
        "encoder": {"model": MODEL, "pooling": "mean", "precision": precision},
        "head": head,
        "ray": {"address": "local"},
        "output": str(output),
    }
    output.mkdir(parents=True)
    file = output / "spec.json"  # JSON is YAML
    file.write_text(json.dumps(spec))
    _say(f"a head is fitted on {source.name}")
    command = [sys.executable, "-m", "bertray.cli", "run", str(file), "--json"]
    done = subprocess.run(command, cwd=services.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return str(json.loads(done.stdout)["bundle"])


def _compared(options: argparse.Namespace, bundle: str, corpus: Sequence[str], scratch: Path) -> str:
    """The section on what all services do under load."""
    expected, encoder = _expected(bundle, corpus)
    precision = _asked("faster", folder=bundle, texts=list(corpus[:256]))
    setting = Setting(bundle, encoder, precision, options.infinity, scratch)
    sent, bare, skipped = Texts(corpus, scratch / "texts.jsonl"), [], {}
    found = {services.NAMES[key]: Measured() for key in options.only}
    for number in range(options.rounds):
        _say(f"round {number + 1} of {options.rounds}: the bare engine")
        bare.append(_asked("bare", folder=bundle, texts=sent.take(_BLOCK), seconds=options.seconds))
        for name in [name for name in found if name not in skipped]:
            _say(f"round {number + 1} of {options.rounds}: {name}")
            try:
                with services.running(name, setting) as service:
                    _measure(service, found[name], sent, expected, options.seconds)
            except (SkippedError, RuntimeError, OSError, KeyError, ValueError) as reason:
                skipped[name] = str(reason) or type(reason).__name__
                _say(f"{name} is left out: {skipped[name]}")
    for name in skipped:
        del found[name]
    return report(options.seconds, found, bare, skipped, precision, len(corpus))


def _expected(bundle: str, corpus: Sequence[str]) -> tuple[Expected, str]:
    """What bertray answers in Python to some texts, and the folder of its encoder."""
    import bertray
    from bertray.predict import checkpoint_of

    judged = list(corpus[:: max(1, len(corpus) // _JUDGED)][:_JUDGED])
    predictor = bertray.load(bundle, "cpu")
    probabilities = predictor.predict(judged).probabilities
    assert probabilities is not None
    scores = [dict(zip(predictor.bundle.labels, row.tolist(), strict=True)) for row in probabilities]
    vectors = predictor.encoder.encode(judged).vectors.astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Expected(judged, scores, vectors), str(checkpoint_of(predictor.bundle.encoder).folder)


def _asked(app: str, **given: Any) -> Any:
    """What a process of its own finds."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # texts are too many for a command line
        json.dump(given.pop("texts"), file)
        file.flush()
        command = [
            sys.executable,
            "-m",
            "benchmarks.serve",
            "--app",
            app,
            "--given",
            json.dumps(given | {"file": file.name}),
        ]
        done = subprocess.run(command, cwd=services.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _bare(folder: str, file: str, seconds: float) -> float:
    """Texts a second that the encoder of a bundle does by itself, in blocks, with its model loaded."""
    from bertray import bundle as bundles
    from bertray.predict import Predictor

    block = json.loads(Path(file).read_text())
    encoder = Predictor(bundles.load(folder), "cpu", machine.cores()).encoder
    encoder.encode(block)
    done, passed, began = 0, 0.0, time.perf_counter()
    while passed < seconds:
        encoder.encode(block)
        done, passed = done + len(block), time.perf_counter() - began
    return done / passed


def _faster(folder: str, file: str) -> str:
    return plain.faster(folder, json.loads(Path(file).read_text()))


_APPS: dict[str, Callable[..., Any]] = {
    "ray": plain.on_ray,
    "fastapi": plain.on_fastapi,
    "bare": _bare,
    "faster": _faster,
}


def _measure(service: Running, measured: Measured, sent: Texts, expected: Expected, seconds: float) -> None:
    """One round of a service under all kinds of load."""
    first = service.difference(expected)

    def outcome(connections: int, seconds: float, count: int = 0, rate: float = 0) -> Outcome:
        found = sent.send(service.target, connections, seconds, count, rate)
        service.settle()
        return found

    outcome(_CONNECTIONS, min(3, seconds))  # a warm-up
    outcome(_LISTERS, min(2, seconds), _LIST)
    found = {
        ONE: outcome(1, seconds),
        MANY: outcome(_CONNECTIONS, seconds),
        LISTS: outcome(_LISTERS, seconds, _LIST),
    }
    if not (found[ONE].rate and found[MANY].rate):
        raise SkippedError(f"it answers nothing in {seconds:g} seconds")
    found[PACED] = outcome(_SPARE, seconds, rate=_PACE * found[MANY].rate)
    last = service.difference(expected)
    measured.difference = max(measured.difference, first, last)
    for kind, one in found.items():
        measured.outcomes[kind].append(one)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(
    seconds: float,
    found: Mapping[str, Measured],
    bare: Sequence[float],
    skipped: Mapping[str, str],
    precision: str,
    rows: int,
) -> str:
    """The section: a table for each kind of load, and what had to be shown."""
    facts = machine.describe() | {"load": "wrk, on the same cores"}
    parts = [
        "## Serving",
        f"{MODEL}, mean, a linear head; {rows:,} texts in turn, each with a number behind it, so that none is sent "
        f"twice. Medians of {len(bare)} rounds of {seconds:g} seconds each, in brackets the least and the most. Every "
        "service is started anew in each round. Ratios are to the plain Ray Serve app, those of vectors (/embeddings "
        f"in OpenAI's form) to infinity. The plain services compute in {precision}, which is faster for them here, and "
        "know no more than what one writes in an afternoon: see plain.py.",
        *(f"{name} is left out: {reason}." for name, reason in skipped.items()),
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
    ]
    if found:
        parts += [
            "### One connection, one text at a time",
            results.table([_times(name, one, ONE, found) for name, one in found.items()]),
            f"### {_CONNECTIONS} connections, one text a request",
            results.table([_rates(name, one, MANY, found) for name, one in found.items()]),
            f"### {_LISTERS} connections, {_LIST} texts a request",
            f"The bare engine, its encoder alone in one process: {_spread(bare, '{:.0f}')} texts/s.",
            results.table([_lists(name, one, bare, found) for name, one in found.items()]),
            f"### {_PACE:.0%} of each one's own highest rate",
            f"Requests are due at random moments (a Poisson process) at {_PACE:.0%} of the rate with {_CONNECTIONS} "
            f"connections in the same round, whether those before are answered or not, over up to {_SPARE} "
            "connections: a slow answer holds no other request back, so none is spared the wait (no coordinated "
            "omission). *Sent late* are those that found no connection free, by over 5 ms.",
            results.table([_paced(name, one) for name, one in found.items()]),
            "### Answers",
            results.table([_answers(name, one) for name, one in found.items()]),
        ]
    shown = list(_shown(found, bare))
    parts += ["### What had to be shown", results.table(shown)] if shown else []
    return "\n\n".join(parts)


def _times(name: str, one: Measured, kind: str, found: Mapping[str, Measured]) -> dict[str, str]:
    return {
        "service": name,
        "median, ms": _spread(one.of(kind, "median"), "{:.1f}"),
        "p99, ms": _spread(one.of(kind, "p99"), "{:.1f}"),
        "ratio of medians": _ratio(name, found, kind, "median"),
    }


def _rates(name: str, one: Measured, kind: str, found: Mapping[str, Measured]) -> dict[str, str]:
    return {
        "service": name,
        "requests/s": _spread(one.of(kind, "rate"), "{:.0f}"),
        "ratio": _ratio(name, found, kind, "rate"),
        "median, ms": _spread(one.of(kind, "median"), "{:.0f}"),
        "p99, ms": _spread(one.of(kind, "p99"), "{:.0f}"),
    }


def _lists(name: str, one: Measured, bare: Sequence[float], found: Mapping[str, Measured]) -> dict[str, str]:
    return {
        "service": name,
        "texts/s": _spread([_LIST * rate for rate in one.of(LISTS, "rate")], "{:.0f}"),
        "ratio": _ratio(name, found, LISTS, "rate"),
        "of the bare engine": f"{_share(one, bare):.0%}",
        "median, ms": _spread(one.of(LISTS, "median"), "{:.0f}"),
        "p99, ms": _spread(one.of(LISTS, "p99"), "{:.0f}"),
    }


def _paced(name: str, one: Measured) -> dict[str, str]:
    return {
        "service": name,
        "due, requests/s": _spread([_PACE * rate for rate in one.of(MANY, "rate")], "{:.0f}"),
        "answered": _spread(one.of(PACED, "rate"), "{:.0f}"),
        "sent late": f"{max(one.of(PACED, 'missed')):.1%}",
        "median, ms": _spread(one.of(PACED, "median"), "{:.1f}"),
        "p99, ms": _spread(one.of(PACED, "p99"), "{:.1f}"),
        "p99 to median": f"{_tail(one):.1f} times",
    }


def _answers(name: str, one: Measured) -> dict[str, str]:
    outcomes = [outcome for kind in one.outcomes.values() for outcome in kind]
    differs = "one less the cosine" if name in (INFINITY, BERTRAY_VECTORS) else "a score"
    return {
        "service": name,
        "answered requests": f"{sum(outcome.requests for outcome in outcomes):,}",
        "of them with an error": f"{sum(outcome.refused for outcome in outcomes):,}",
        "lost": f"{sum(outcome.lost for outcome in outcomes):,}",
        "differs from bertray in Python by": f"{one.difference:.1g} ({differs})",
    }


def _shown(found: Mapping[str, Measured], bare: Sequence[float]) -> Iterator[dict[str, str]]:
    """Lines on what was promised, as far as those it is about took part."""
    if BERTRAY not in found:
        return
    one = found[BERTRAY]
    if RAY in found:
        yield _line(
            "one text at a time: median, of plain Ray Serve's", "at most a third", _ratio(BERTRAY, found, ONE, "median")
        )
        yield _line(
            f"{_CONNECTIONS} connections: requests/s, to plain Ray Serve's",
            "at least 4 times",
            f"{_ratio(BERTRAY, found, MANY, 'rate')} times",
        )
    yield _line(f"requests of {_LIST} texts: share of the bare engine", "at least 70 %", f"{_share(one, bare):.0%}")
    yield _line(f"p99 at {_PACE:.0%} of the highest rate, to the median", "under 5 times", f"{_tail(one):.1f} times")


def _line(what: str, target: str, outcome: str) -> dict[str, str]:
    return {"what": what, "target": target, "measured": outcome}


def _ratio(name: str, found: Mapping[str, Measured], kind: str, figure: str) -> str:
    """Of a figure to that of the service that it is held against: the median over rounds, in which both ran."""
    other = found.get(INFINITY if name in (INFINITY, BERTRAY_VECTORS) else RAY)
    if other is None:
        return "-"
    both = zip(found[name].of(kind, figure), other.of(kind, figure), strict=True)
    return f"{statistics.median(a / b for a, b in both):.2f}"


def _share(one: Measured, bare: Sequence[float]) -> float:
    return statistics.median(
        _LIST * rate / rate_alone for rate, rate_alone in zip(one.of(LISTS, "rate"), bare, strict=True)
    )


def _tail(one: Measured) -> float:
    return statistics.median(outcome.p99 / outcome.median for outcome in one.outcomes[PACED])


def _spread(values: Sequence[float], form: str) -> str:
    middle, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


if __name__ == "__main__":
    main()
