"""bertray's engine and what a user could pick instead, side by side: python -m benchmarks.engine --device cpu

All are measured in one run, in turn (A B C A B C ...), on the same texts. Needs neither Ray nor the peers' packages:
what is not there is left out with a reason.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import contestants, exports, machine, results, texts
from benchmarks.contestants import Contestant, Job, SkippedError
from bertray.checkpoints import find

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_SAMPLE = 1000  # texts that vectors are compared on
_FIDELITY = 0.999


@dataclass
class Measured:
    """What one contestant did with one set of texts. cosines: [sampled texts] to fp32, one text at a time."""

    name: str
    first: dict[str, Any]
    cosines: np.ndarray
    seconds: list[float] = field(default_factory=list)

    @property
    def is_peer(self) -> bool:
        return not self.name.startswith("bertray-")


@dataclass(frozen=True)
class Work:
    """What there is to do in one set of texts: how many they are, their tokens, and operations of the encoder's
    matrix products (a multiplication and an addition count as two)."""

    texts: int
    tokens: int
    operations: float


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.contestant:
        contestants.serve(options.contestant, Job(**json.loads(sys.stdin.readline())))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contestants, stopped as they are, end too
    model, folder = _checkpoint(options)
    corpora = {name: texts.corpus(name, options.texts, folder) for name in options.corpora}
    job = Job(str(folder), options.device, options.threads, corpora)
    size = 1024 if options.quick else 0
    before = machine.matmul_rates(options.device, size)
    measured = measure(options.only, job, options.rounds)
    after = machine.matmul_rates(options.device, size)
    rates = {precision: max(before[precision], after[precision]) for precision in before}
    work = {name: _work(folder, corpora[name]) for name in corpora}
    markdown = report(options, model, measured, work, rates)
    print(markdown)
    if options.write:
        section = "-".join(["engine", *machine.chip(options.device).lower().split()])  # those of others stay
        image = results.RESULTS.with_name(f"{section}.png")
        plot(measured, work, model, image)
        results.write(section, f"{markdown}\n\n![texts a second]({image.name})")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="CPU threads of each contestant")
    parser.add_argument("--quick", action="store_true", help="few texts, to see that all works")
    parser.add_argument("--texts", type=int, help="tweets to encode, and eight times as many as longer texts")
    parser.add_argument("--rounds", type=int, help="times that each contestant is timed")
    parser.add_argument("--corpora", type=_listed(texts.NAMES), default=texts.NAMES, help="texts, such as tweets,long")
    parser.add_argument("--only", type=_listed(contestants.names()), default=contestants.names(), help="who takes part")
    parser.add_argument("--model", default=MODEL, help="folder or name of a checkpoint")
    parser.add_argument("--shape", choices=("bert-base",), help="random weights of that shape instead of a model")
    parser.add_argument("--write", action="store_true", help="put the outcome into RESULTS.md, with a plot")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    usual = {"cpu": 2000, "cuda": 40_000}[options.device]
    options.texts = options.texts or (256 if options.quick else usual)
    options.rounds = options.rounds or (2 if options.quick else 5)
    return options


def _listed(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        wrong = [name for name in text.split(",") if name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
        return text.split(",")

    return parse


def _checkpoint(options: argparse.Namespace) -> tuple[str, Path]:
    """The name to show and the folder of the encoder."""
    folder = find(options.model).folder
    return (
        (f"random weights in the shape of {options.shape}", _random(folder))
        if options.shape
        else (options.model, folder)
    )


def _random(tokenizer: Path) -> Path:
    """A BERT of the base shape with random weights and that tokenizer: for speed alone."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = exports.FOLDER / "bert-base"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        BertModel(BertConfig()).save_pretrained(folder)
    return folder


def measure(names: Sequence[str], job: Job, rounds: int) -> dict[str, list[Measured]]:
    """Time every contestant in turn on each set of texts of a job."""
    step = {name: -(-len(found) // _SAMPLE) for name, found in job.texts.items()}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        expected = _reference(job, step, Path(scratch, "vectors.npy"))
        running = list(_started(names, job, stack))
        return {
            name: _timed(running, name, rounds, step[name], expected[name], Path(scratch, "vectors.npy"))
            for name in job.texts
        }


def _reference(job: Job, step: Mapping[str, int], file: Path) -> dict[str, np.ndarray]:
    """Vectors of every step-th text in fp32, one text at a time."""
    sampled = Job(job.folder, job.device, job.threads, {name: job.texts[name][:: step[name]] for name in job.texts})
    reference = Contestant(contestants.REFERENCE, sampled)
    vectors = {}
    for name in sampled.texts:
        reference.encode(name, save=str(file))
        vectors[name] = np.load(file)
    reference.close()
    return vectors


def _started(names: Sequence[str], job: Job, stack: ExitStack) -> Iterator[Contestant]:
    for name in names:
        try:
            contestant = Contestant(name, job)
        except SkippedError as reason:
            _say(f"{name} is left out: {reason}")
            continue
        stack.callback(contestant.close)
        yield contestant


def _timed(
    running: list[Contestant], name: str, rounds: int, step: int, expected: np.ndarray, file: Path
) -> list[Measured]:
    found = {}
    for contestant in list(running):
        try:
            first = contestant.encode(name, step, str(file))  # a warm-up, whose vectors are judged
        except SkippedError as reason:
            _say(f"{contestant.name} is left out from {name} on: {reason}")
            running.remove(contestant)
            continue
        found[contestant] = Measured(contestant.name, first, _cosines(np.load(file), expected))
    for number in range(rounds):
        _say(f"{name}: round {number + 1} of {rounds}")
        for contestant, measured in found.items():
            measured.seconds.append(contestant.encode(name)["seconds"])
    return list(found.values())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def _work(folder: Path, corpus: Sequence[str]) -> Work:
    from bertray.tokens import Tokenizer

    config = json.loads((folder / "config.json").read_text())
    width, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    lengths = Tokenizer(folder, 512)(list(corpus)).lengths.astype(float)
    weights = 4 * width * width + 2 * width * inner  # query, key, value, output; up and down
    operations = layers * (2 * weights * lengths.sum() + 4 * width * (lengths**2).sum())
    return Work(len(corpus), int(lengths.sum()), float(operations))


def report(
    options: argparse.Namespace,
    model: str,
    measured: Mapping[str, list[Measured]],
    work: Mapping[str, Work],
    rates: Mapping[str, float],
) -> str:
    """All of it in Markdown: the machine, a table for each set of texts, and what had to be shown."""
    facts = machine.describe() | {"matrix products by torch, 10^12 operations/s": _rates(rates)}
    parts = [
        f"## Engine on {machine.chip(options.device)}",
        f"{model}; mean pooling; at most 512 tokens a text; {options.threads} CPU threads; medians of {options.rounds} "
        "rounds in turn, with the slowest and the fastest in brackets. A share is that of the rate at which torch "
        "multiplies matrices in the same precision here. Cosines are to fp32, one text at a time.",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
    ]
    for name, found in measured.items():
        parts.append(f"### {name}: {work[name].texts:,} texts of {work[name].tokens / work[name].texts:.0f} tokens")
        parts.append(results.table([_row(one, work[name], rates) for one in found]))
    shown = list(_shown(options.device, measured, work, rates))
    parts += ["### What had to be shown", results.table(shown)] if shown else []
    return "\n\n".join(parts)


def _rates(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{precision} {rate / 1e12:.3g}" for precision, rate in rates.items())


def _row(one: Measured, work: Work, rates: Mapping[str, float]) -> dict[str, str]:
    speeds = [work.texts / seconds for seconds in one.seconds]
    seconds = work.texts / statistics.median(speeds)
    precision = one.first["precision"]
    rate = rates.get(precision)
    return {
        "contestant": one.name,
        "texts/s": f"{statistics.median(speeds):,.4g} ({min(speeds):,.4g} to {max(speeds):,.4g})",
        "tokens/s": f"{work.tokens / seconds:,.0f}",
        "padding": f"{1 - work.tokens / one.first['fed']:.1%}",
        "cosine, least": f"{one.cosines.min():.5f}",
        "mean": f"{one.cosines.mean():.5f}",
        "computes in": precision,
        "share": f"{work.operations / seconds / rate:.0%}" if rate else "-",
        "peak MB": f"{one.first['memory'] / 1e6:,.0f}",
        "set-up": one.first["setup"],
    }


def _shown(
    device: str, measured: Mapping[str, list[Measured]], work: Mapping[str, Work], rates: Mapping[str, float]
) -> Iterator[dict[str, str]]:
    """Lines on what was promised, as far as those it is about took part."""
    found = {one.name: one for one in measured.get("tweets", [])}
    auto = found.get("bertray-auto")
    if auto and device == "cuda":
        yield from _against(found, "sentence-transformers-fp16", auto, "3 times")
        rate = work["tweets"].tokens / statistics.median(auto.seconds)
        yield _line("auto, tokens/s on tweets", "2.0 million (H200, BERT-base)", f"{rate / 1e6:.2f} million")
    elif auto:
        yield from _against(found, "sentence-transformers", auto, "4 times")
        yield from _against_fastest(found, auto, float(auto.cosines.min()), "of equal or better fidelity")
        yield from _against_fastest(found, auto, _FIDELITY, f"with a cosine of {_FIDELITY}")
        if "bertray-int8" in found:
            yield from _against(found, "onnxruntime-int8", found["bertray-int8"], "1.1 times, at no lower cosine")
    long = {one.name: one for one in measured.get("long", [])}
    for name in ("bertray-auto", "bertray-bf16"):
        if name in long and "bf16" in rates:
            yield _share(device, long[name], work["long"], rates)


def _share(device: str, one: Measured, work: Work, rates: Mapping[str, float]) -> dict[str, str]:
    """Of the bf16 rate, and beside it of the fastest in floating point: bf16 is not that on every CPU."""
    speed = work.operations / statistics.median(one.seconds)
    fastest = max((name for name in rates if name != "int8"), key=lambda name: rates[name])
    name = one.name.removeprefix("bertray-")
    return _line(
        f"{name}, 128 to 512 tokens: share of torch's bf16 rate",
        {"cpu": "60 %", "cuda": "50 % (H200, BERT-base)"}[device],
        f"{speed / rates['bf16']:.0%} (runs in {one.first['precision']}; {speed / rates[fastest]:.0%} of {fastest})",
    )


def _against(found: Mapping[str, Measured], peer: str, one: Measured, least: str) -> Iterator[dict[str, str]]:
    if peer in found:
        outcome = f"{_times(one, found[peer]):.2f} times; cosine {_fidelity(one)} to {_fidelity(found[peer])}"
        yield _line(f"{one.name.removeprefix('bertray-')} against {peer}, tweets", least, outcome)


def _against_fastest(
    found: Mapping[str, Measured], auto: Measured, cosine: float, words: str
) -> Iterator[dict[str, str]]:
    fit = [one for one in found.values() if one.is_peer and one.cosines.min() >= cosine]
    if fit:
        fastest = min(fit, key=lambda one: statistics.median(one.seconds))
        outcome = f"{_times(auto, fastest):.2f} times ({fastest.name})"
        yield _line(f"auto against the fastest peer {words}, tweets", "1.3 times", outcome)


def _line(what: str, least: str, outcome: str) -> dict[str, str]:
    return {"what": what, "at least": least, "measured": outcome}


def _times(one: Measured, other: Measured) -> float:
    """How many times faster one is: the median over rounds, in which both ran one after the other."""
    return statistics.median(b / a for a, b in zip(one.seconds, other.seconds, strict=True))


def _fidelity(one: Measured) -> str:
    return f"{one.cosines.min():.5f}"


def plot(measured: Mapping[str, list[Measured]], work: Mapping[str, Work], model: str, image: Path) -> None:
    """Bars of texts a second with their spread, a panel for each set of texts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(map(len, measured.values()))
    shape = (4.6 * len(measured) + 1.6, 0.34 * most + 1.3)
    figure, axes = pyplot.subplots(1, len(measured), figsize=shape, sharey=True, squeeze=False, layout="constrained")
    for axis, (name, found) in zip(axes[0], measured.items(), strict=True):
        _bars(axis, found, work[name])
        axis.set_title(f"{name}, {work[name].tokens / work[name].texts:.0f} tokens a text", fontsize=10)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"texts a second, {model}; cosine to fp32 (least) beside each bar", fontsize=11)
    figure.savefig(image, dpi=110)
    pyplot.close(figure)


def _bars(axis: Any, found: Sequence[Measured], work: Work) -> None:
    speeds = [[work.texts / seconds for seconds in one.seconds] for one in found]
    middle = np.array([statistics.median(row) for row in speeds])
    spread = [middle - [min(row) for row in speeds], [max(row) for row in speeds] - middle]
    colors = ["#9aa5b1" if one.is_peer else "#d9622b" for one in found]
    axis.barh([one.name for one in found], middle, xerr=spread, color=colors, error_kw={"lw": 1, "ecolor": "#333333"})
    for place, (one, row) in enumerate(zip(found, speeds, strict=True)):
        label = f"{statistics.median(row):,.4g}  ({_fidelity(one)})"
        axis.text(max(row) + 0.01 * middle.max(), place, label, va="center", fontsize=8)
    axis.set_xlim(0, 1.35 * max(map(max, speeds)))
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


if __name__ == "__main__":
    main()
