"""A grid of heads fitted together, against scikit-learn fitting them one by one: python -m benchmarks.heads

Twenty penalties by five folds on the vectors of 27,481 tweets. scikit-learn's LogisticRegression (lbfgs, its own
tolerance, as many iterations as it needs) gets all cores and whichever is fastest for it on a few of the heads: float32
or float64, all cores for each fit or a core for each of several fits. bertray's tolerance is ten times finer.
"""

import argparse
import hashlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, results, texts
from bertray.spec import Head

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
FOLDS, L2S = 5, np.logspace(-6, 0, 20)
TRIALS = [(float(l2), fold) for l2 in L2S for fold in range(FOLDS)]
_SPEC = Head(optimizer="lbfgs")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    x, y = _vectors(Path(options.data) / "train.jsonl")
    folds = np.random.default_rng(0).permutation(len(x)) % FOLDS
    alone = _Alone(x, y, folds)
    fitted, _ = _together(x[:1_000], y[:1_000], folds[:1_000])  # starts torch's threads
    seconds: dict[str, list[float]] = {"together": [], "alone": []}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for name, fit in (("together", lambda: _together(x, y, folds)), ("alone", alone.fit)):
            started = time.perf_counter()
            fitted = fit()
            seconds[name].append(time.perf_counter() - started)
            if name == "together":
                ours = fitted[1]()
            else:
                theirs = _judged(fitted, x, folds)
    markdown = report(seconds, alone.name, *(_accuracy(logits, y) for logits in (ours, theirs)), len(x))
    print(markdown)
    if options.write:
        results.write("heads", markdown)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(texts.ROOT.parent / "shared/data/tweets"), help="folder of train.jsonl")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    return parser.parse_args(arguments)


def _vectors(file: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[n, width] and [n] classes; encoded once, then kept in the folder for temporary files."""
    content = file.read_bytes()
    kept = Path(tempfile.gettempdir()) / f"bertray-heads-{hashlib.sha256(content).hexdigest()[:16]}.npz"
    rows = [json.loads(line) for line in content.decode().split("\n") if line]
    if not kept.exists():
        from bertray.checkpoints import find
        from bertray.encoder import Encoder
        from bertray.spec import Encoder as EncoderSpec

        encoder = Encoder(find(MODEL), EncoderSpec(model=MODEL, pooling="mean"), threads=machine.cores())
        np.savez(kept, vectors=encoder.encode([row["text"] for row in rows]).vectors)
    return np.load(kept)["vectors"], np.array([row["label"] for row in rows])


@dataclass
class _Vectors:
    """Samples in memory, as solvers take them."""

    vectors: Any
    targets: Any
    folds: Any
    weights: Any
    outputs: int
    kind: str = "softmax"
    edges: Any = None
    blocks: int = 1
    spare: int = 1 << 31

    def __post_init__(self) -> None:
        self.count, self.width, self.device = *self.vectors.shape, self.vectors.device

    def take(self, rows: Any, dtype: Any) -> Any:
        return self.vectors[rows].to(dtype)


def _together(x: Any, y: Any, folds: Any) -> tuple[Any, Callable[[], Any]]:
    """The heads, and a function that gives the logits of rows held out [settings, n, classes]."""
    import torch

    from bertray.samples import Share
    from bertray.solvers import held_out, solve
    from bertray.trials import Trial

    samples: Any = _Vectors(*map(torch.from_numpy, (x, y, folds)), torch.ones(len(x)), int(y.max()) + 1)
    trials, spec = [Trial(*trial) for trial in TRIALS], _SPEC
    heads = solve(samples, trials, spec, Share(0, 1), lambda loss: None, torch.float32)
    return heads, lambda: held_out(samples, heads, trials)


class _Alone:
    """scikit-learn, in the way that is fastest here."""

    def __init__(self, x: Any, y: Any, folds: Any) -> None:
        self._y, self._folds = y, folds
        ways: dict[float, tuple[str, Any, int]] = {}
        few = TRIALS[FOLDS :: len(TRIALS) // (2 * machine.cores())]
        for dtype, jobs in itertools.product((np.float32, np.float64), sorted({1, machine.cores()})):
            self._x, self._jobs = x.astype(dtype), jobs
            self.fit(few[:jobs])  # starts the processes
            started = time.perf_counter()
            self.fit(few)
            name = f"{np.dtype(dtype)}, {'all cores a fit' if jobs == 1 else 'a core a fit'}"
            ways[time.perf_counter() - started] = (name, self._x, jobs)
            print(f"scikit-learn, {name}: {time.perf_counter() - started:.1f} s for {len(few)}", file=sys.stderr)
        self.name, self._x, self._jobs = ways[min(ways)]

    def fit(self, trials: Sequence[tuple[float, int]] = TRIALS) -> list[tuple[Any, Any]]:
        """Weight and bias of each."""
        import joblib

        parallel = joblib.Parallel(self._jobs) if self._jobs > 1 else (lambda calls: [f(*a, **k) for f, a, k in calls])
        fitted: list[tuple[Any, Any]] = parallel(
            joblib.delayed(_fit_one)(self._x, self._y, self._folds, *trial) for trial in trials
        )
        return fitted


def _fit_one(x: Any, y: Any, folds: Any, l2: float, fold: int) -> tuple[Any, Any]:
    from sklearn.linear_model import LogisticRegression

    rows = folds != fold
    model = LogisticRegression(C=1 / (l2 * rows.sum()), max_iter=100_000).fit(x[rows], y[rows])
    return model.coef_, model.intercept_


def _judged(fitted: Sequence[tuple[Any, Any]], x: Any, folds: Any) -> Any:
    """[settings, n, classes] logits of rows by the heads that have not seen them."""
    found = np.empty((len(L2S), len(x), len(fitted[0][1])), np.float32)
    for number, ((_, fold), (weight, bias)) in enumerate(zip(TRIALS, fitted, strict=True)):
        rows = folds == fold
        found[number // FOLDS, rows] = x[rows].astype(np.float32) @ weight.T.astype(np.float32) + bias
    return found


def _accuracy(logits: Any, y: Any) -> Any:
    return (logits.argmax(2) == y).mean(1)


def report(seconds: dict[str, list[float]], way: str, ours: Any, theirs: Any, rows: int) -> str:
    """The section: seconds, their ratio, and how far accuracies are apart."""
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    names = {"together": "bertray, all at once, float32", "alone": f"scikit-learn, one by one: {way}"}
    lines = [
        {
            "contestant": names[name],
            "seconds": f"{medians[name]:.2f}",
            "times": f"{medians['alone'] / medians[name]:.1f}",
            "best accuracy, held out": f"{accuracy.max():.4f}",
        }
        for name, accuracy in (("together", ours), ("alone", theirs))
    ]
    return "\n".join(
        [
            "## A grid of heads",
            "",
            f"{len(TRIALS)} heads ({FOLDS} folds, {len(L2S)} penalties from {L2S[0]:g} to {L2S[-1]:g}) on {rows:,} "
            f"vectors of {MODEL}, mean. Medians of rounds: {len(seconds['alone'])}. The accuracies of a penalty "
            f"differ by at most {np.abs(ours - theirs).max():.5f}.",
            "",
            results.table(lines),
            "",
            *(f"- {name}: {fact}" for name, fact in machine.describe().items()),
        ]
    )


if __name__ == "__main__":
    main()
