"""How good heads on frozen vectors get, on real data: whole jobs of bertray, each from spec to metrics, with what is to
be reached. `python -m benchmarks.quality --data FOLDER` runs all, or those that are named.

The folder holds tweets, banking77, banking77_pairs, wnut17 and qa as JSON Lines, as in the sources that README names.
"""

import argparse
import json
import logging
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TWEETS = {"id": "id", "labels": ["negative", "neutral", "positive"]}
PAIRS = {"id": "id", "text_pair": "text_pair"}
WORDS = {"id": "id", "text": "tokens", "label": "tags"}
QUESTIONS = {"id": "id", "text": "question", "text_pair": "context", "label": "answers"}
SOLVED = {"optimizer": "lbfgs", "standardize": True}

# name: (data set, columns, encoder, head, metric, at least)
JOBS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str, float]] = {
    "tweets, mean": ("tweets", TWEETS, {"pooling": "mean"}, {"optimizer": "lbfgs", "l2": 1e-4}, "accuracy", 0.697),
    "tweets, searched": (
        "tweets",
        TWEETS,
        {"pooling": ["mean", "max"], "layers": "all"},
        {
            **SOLVED,
            "search": {
                "pooling": ["mean", ["mean", "max"]],
                "layers": ["last", "last4", "all"],
                "l2": [0.003, 0.01, 0.03, 0.1],
            },
        },
        "accuracy",
        0.75,
    ),
    "banking77, mean": (
        "banking77",
        {"id": "id"},
        {"pooling": "mean"},
        {"optimizer": "lbfgs", "l2": 1e-4},
        "accuracy",
        0.928,
    ),
    "pairs, cross": (
        "banking77_pairs",
        PAIRS,
        {"pooling": ["cls", "mean"], "layers": "last4"},
        {
            **SOLVED,
            "search": {"layers": ["last", "last4"], "pooling": ["cls", ["cls", "mean"]], "l2": [0.003, 0.03, 0.3]},
        },
        "accuracy",
        0.82,
    ),
    "pairs, siamese": (
        "banking77_pairs",
        PAIRS,
        {"pooling": "mean", "pair": "siamese"},
        {**SOLVED, "search": {"l2": [0.001, 0.01, 0.1]}},
        "accuracy",
        0.895,
    ),
    "wnut17, last layer": ("wnut17", WORDS, {"pooling": "first"}, {**SOLVED, "l2": 1e-3}, "f1", 0.235),
    "wnut17, searched": (
        "wnut17",
        WORDS,
        {"pooling": "first", "layers": "all"},
        {**SOLVED, "search": {"layers": [2, 3, 4, 5, [3, 4], "last4"], "l2": [3e-4, 1e-3, 3e-3, 1e-2]}},
        "f1",
        0.38,
    ),
    "qa": (
        "qa",
        QUESTIONS,
        {"pooling": "mean", "layers": [4], "max_length": 384, "truncation": "window"},
        {**SOLVED, "l2": 1e-3, "folds": 0},
        "f1",
        0.0,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(JOBS)}")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    print("| job | metric on test | value | 95 % | at least | chosen | seconds |\n|---|---|---|---|---|---|---|")
    for name in options.names or JOBS:
        print(run(name, options.data), flush=True)


def run(name: str, data: Path) -> str:
    """A job, as a line of a table."""
    import bertray
    from bertray.features import named

    folder, columns, encoder, head, metric, least = JOBS[name]
    rows = {
        split: str(path) for split in ("train", "dev", "test") if (path := data / folder / f"{split}.jsonl").exists()
    }
    task = {"wnut17": "token-classification", "qa": "question-answering"}.get(folder, "text-classification")
    with tempfile.TemporaryDirectory(prefix="bertray-") as output:
        started = time.perf_counter()
        spec = {
            "task": task,
            "data": {**rows, **columns},
            "encoder": {"model": MODEL, **encoder},
            "head": head,
            "output": output,
        }
        summary = bertray.run(spec)
        seconds = time.perf_counter() - started
    value, (low, high) = summary["metrics"]["test"][metric], summary["intervals"]["test"][metric]
    least = baseline(data / folder) if folder == "qa" else least
    chosen = f"{named(summary['features'])}; l2 {summary['head']['l2']:g}"
    return f"| {name} | {metric} | {value:.4f} | {low:.3f} to {high:.3f} | {least:.3f} | {chosen} | {seconds:.0f} |"


def baseline(folder: Path) -> float:
    """F1 of taking the sentence of a context that is most similar to the question, by the cosine of mean vectors."""
    from bertray import checkpoints
    from bertray.encoder import Encoder
    from bertray.metrics import span_f1
    from bertray.spec import Encoder as EncoderSpec

    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").split("\n") if line]
    contexts = {row["context"]: _sentences(row["context"]) for row in rows}
    sentences = list(dict.fromkeys(sentence for found in contexts.values() for sentence in found))
    encoder = Encoder(checkpoints.find(MODEL), EncoderSpec(pooling="mean"))
    vectors = dict(zip(sentences, _normed(encoder, sentences), strict=True))
    scores = []
    for row, question in zip(rows, _normed(encoder, [row["question"] for row in rows]), strict=True):
        best = max(contexts[row["context"]], key=lambda sentence: float(vectors[sentence] @ question))
        scores.append(span_f1(best, [answer["text"] for answer in row["answers"]]))
    return float(np.mean(scores))


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]


def _normed(encoder: Any, texts: Sequence[str]) -> Any:
    vectors = encoder.encode(list(texts)).vectors.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
