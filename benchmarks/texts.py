"""Texts to encode: real tweets, and real tweets joined to chosen lengths. The same for every run."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
_TWEETS = ROOT.parent / "shared" / "data" / "tweets" / "train.jsonl"
DEMO = ROOT / "jobs" / "data" / "demo-train.csv"
NAMES = ("tweets", "mixed", "long")
_LIGHTER = 8  # one long text costs about as much as so many tweets


def corpus(name: str, tweets_count: int, tokenizer: Path) -> list[str]:
    """The texts of that name; of the longer ones an eighth of so many tweets."""
    if name == "tweets":
        return tweets(tweets_count)
    n = max(1, tweets_count // _LIGHTER)
    return mixed(n, tokenizer) if name == "mixed" else long(n, tokenizer)


def tweets(n: int) -> list[str]:
    """n tweets, or rows of the demo where the tweets are not at hand; repeated if there are fewer."""
    return list(itertools.islice(itertools.cycle(rows(_TWEETS if _TWEETS.exists() else DEMO, n)), n))


def rows(file: Path, n: int | None = None) -> list[str]:
    """The texts of a file, JSON Lines or CSV, or the first n of them."""
    with file.open(encoding="utf-8", newline="") as lines:
        found = map(json.loads, lines) if file.suffix == ".jsonl" else csv.DictReader(lines)
        return [row["text"] for row in itertools.islice(found, n)]


def mixed(n: int, tokenizer: Path, seed: int = 0) -> list[str]:
    """n texts of 3 to 512 tokens, as many from 4 to 8 as from 256 to 512."""
    lengths = np.exp(np.random.default_rng(seed).uniform(np.log(3), np.log(513), n)).astype(int)
    return _joined(lengths, tokenizer, seed)


def long(n: int, tokenizer: Path, seed: int = 0) -> list[str]:
    """n texts of 128 to 512 tokens, all lengths alike."""
    return _joined(np.random.default_rng(seed).integers(128, 513, n), tokenizer, seed)


def _joined(lengths: np.ndarray, tokenizer: Path, seed: int) -> list[str]:
    """Tweets joined in a random order and cut to so many tokens each, [CLS] and [SEP] included."""
    from transformers import AutoTokenizer

    rows = tweets(4096)
    order = itertools.cycle(np.random.default_rng(seed).permutation(len(rows)).tolist())
    texts = []
    for length in lengths:
        text = ""
        while len(text) < 8 * length:  # a token has about four characters
            text += rows[next(order)].strip() + " "
        texts.append(text)
    tokens = AutoTokenizer.from_pretrained(tokenizer)(texts, return_offsets_mapping=True, verbose=False)
    cuts = [offsets[length - 2][1] for offsets, length in zip(tokens["offset_mapping"], lengths, strict=True)]
    return [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
