"""Reasons: why a head answers a text as it does: by words left out, by gradients, and by the training texts that are
most like it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bertray import answers
from bertray.bundle import Bundle
from bertray.explain import pieces
from bertray.features import parse, related
from bertray.forward import Passage
from bertray.predict import Predictor
from bertray.storage import Location
from bertray.store import Store
from bertray.vectors import vectors_of

_NEAREST = 5  # training texts

Found = dict[str, Any]


class Seen(NamedTuple):
    """The tokens of a text (token, of, special), and what they passed through, to be differentiated."""

    tokens: list[Found]
    passage: Passage


See = Callable[[str, str | None], Seen]


def reasons(bundle: Bundle, url: str, text: str, pair: str | None, see: See) -> Found:
    """A bundle's answer to a text, and why.

    bundle, task, problem: which, and what it answers.
    label, told: its answer, and that as people read it.
    why_not: why there is no more: of answers that are not of a whole text nothing else is told.
    scores: label and score of each label, the highest first; explained: the label that has it.
    words: occlusion: text, of (which text), start, stop, weight. tokens: gradient times input: token, of, special,
        weight.
    nearest: training texts: id, text (and text_pair), label, cosine; why_no_nearest: why there are none.

    Args:
        url: where the bundle is.
        see: takes a text, or two as a pair, through the layers.
    """
    predictor = Predictor(bundle)
    texts = [text] if pair is None else [text, pair]
    asked = [[given] for given in texts]
    found: Found = {"bundle": url, "task": bundle.task, "problem": bundle.problem}
    if bundle.task != "text-classification":
        why_not = f"Answers of {bundle.task} are not explained."
        return found | _told(bundle, predictor.predict(*asked).labels[0]) | {"why_not": why_not}
    vectors = predictor.vectors(*asked)
    logits = bundle.head.logits(vectors)
    label = answers.columns(bundle, logits, [text])["predicted"][0].as_py()
    scores = answers.scores(bundle, logits)[0]
    order = np.argsort(-scores, kind="stable").tolist()
    best = order[0]
    nearest, why_no_nearest = _nearest(bundle, url, vectors[0])
    return {
        **found,
        **_told(bundle, label),
        "why_not": "",
        "scores": [{"label": bundle.labels[i], "score": float(scores[i])} for i in order],
        "explained": bundle.labels[best],
        "words": _occlusion(predictor, texts, best, float(scores[best])),
        "tokens": _gradients(bundle, text, pair, best, see),
        "nearest": nearest,
        "why_no_nearest": why_no_nearest,
    }


def _told(bundle: Bundle, label: Any) -> Found:
    unsure = label is None and bundle.form == "name"
    return {"label": label, "told": "not sure enough" if unsure else answers.told(label)}


def _occlusion(predictor: Predictor, texts: Sequence[str], label: int, score: float) -> list[Found]:
    """By how much the label's score falls without each word, as in `explain`."""
    found = []
    for of, given in enumerate(texts):
        words = pieces(given)
        if not words.without:
            continue
        changed = [[*texts[:of], without, *texts[of + 1 :]] for without in words.without]
        logits = predictor.bundle.head.logits(predictor.vectors(*map(list, zip(*changed, strict=True))))
        without = answers.scores(predictor.bundle, logits)[:, label].tolist()
        found += [
            {"text": given[start:stop], "of": of, "start": start, "stop": stop, "weight": score - low}
            for (start, stop), low in zip(words.spans, without, strict=True)
        ]
    return found


def _gradients(bundle: Bundle, text: str, pair: str | None, label: int, see: See) -> list[Found]:
    """For each token its embedding times the gradient of the label's logit by it, summed (gradient times input:
    Shrikumar et al. 2016, "Not just a black box"). Of labels that exclude each other the logit is taken above their
    mean, since only differences between them count. In fp32; of a text in several windows, for the first."""
    sides = [see(text, pair)] if not bundle.siamese else [see(text, None), see(pair or "", None)]
    features = list(map(parse, bundle.features))
    vectors = [torch.cat([side.passage.vector(*feature) for feature in features])[None] for side in sides]
    seen = related(*vectors) if bundle.siamese else vectors[0]
    logits = (seen @ torch.from_numpy(bundle.head.weight).T)[0]
    logit = logits[label] - (logits.mean() if bundle.problem == "single_label" else 0)
    inputs = [side.passage.parts["token"] for side in sides]
    found = []
    for place, (side, embedded, gradient) in enumerate(
        zip(sides, inputs, torch.autograd.grad(logit, inputs), strict=True)
    ):
        for token, weight in zip(side.tokens, (embedded * gradient).sum(1).tolist(), strict=True):
            of = place if bundle.siamese else token["of"]
            found.append({"token": token["token"], "of": of, "special": token["special"], "weight": weight})
    return found


def _nearest(bundle: Bundle, url: str, vector: NDArray[np.float32]) -> tuple[list[Found], str]:
    """The training texts whose vectors are most like a text's, from the store of the run beside the bundle; and why
    there are none."""
    if bundle.siamese:
        return [], "The texts of its pairs have vectors of their own."
    store = _store(bundle, url)
    if store is None:
        return [], "The vectors of its training texts are not beside the bundle."
    names = ["id", "text", *(["text_pair"] if bundle.pairs else []), "label"]
    best: list[Found] = []
    for table in store.tables([*names, *bundle.features]):
        vectors = np.asarray(vectors_of(table, bundle.features), np.float32)
        cosines = vectors @ vector / np.maximum(np.linalg.norm(vectors, axis=1) * np.linalg.norm(vector), 1e-12)
        for row in np.argsort(-cosines, kind="stable")[:_NEAREST].tolist():
            best.append({name: table[name][row].as_py() for name in names} | {"cosine": float(cosines[row])})
        best = sorted(best, key=lambda one: -one["cosine"])[:_NEAREST]
    return best, ""


def _store(bundle: Bundle, url: str) -> Store | None:
    """The store of the training rows that a bundle's run has left."""
    folder = Location(Location(url).url.rstrip("/").rpartition("/")[0]) / "stores"
    for name in folder.folders():
        store = Store((folder / name).url)
        manifest = store.manifest() if name.startswith("train-") else None
        if manifest and _fits(bundle, manifest.made_by):
            return store
    return None


def _fits(bundle: Bundle, made_by: Mapping[str, Any]) -> bool:
    identity = bundle.encoder["identity"]
    same = all(made_by.get(part) == identity[part] for part in identity)
    return same and {*bundle.features} <= {*made_by["features"]} and "states" not in made_by
