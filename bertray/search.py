"""Search: which features, penalty and the like do best on rows that were left out. Fits all candidates of one set of
features together. Knows nothing of files or of Ray."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertray import calibration, metrics
from bertray.errors import SpecError
from bertray.features import Feature, features, named, parse
from bertray.heads import LinearHead, probabilities
from bertray.progress import log
from bertray.samples import Samples, Share, Wanted
from bertray.solvers import held_out, solve
from bertray.spans import null_margin
from bertray.spec import Head
from bertray.trials import Record, Trial

METRICS = {"name": "accuracy", "names": "micro F1", "number": "R2", "tokens": "entity F1", "answers": "log likelihood"}
ALWAYS = 1e9  # a margin that no answer never has: there is always one
_EXACT = 1 << 28  # numbers of all vectors, above which L-BFGS computes in float32, to within 1e-5 of the optimum
_KEPT = 50_000_000  # numbers of what is left out that are kept


@dataclass(frozen=True)
class Setting:
    """What a head is fitted with."""

    features: tuple[str, ...]
    combine: str
    l2: float
    seed: int


@dataclass(frozen=True)
class Choice:
    """The setting that does best, and what its heads give the rows that each was fitted without.

    curve: for each setting its score, and how sure that is (95 %), where that is known.
    logits: [rows, outputs], and targets: what was asked, of the rows that were left out, in their order; empty where
        none were.
    temperature: what logits are divided by, so that probabilities are what they say.
    sizes: how many of the rows belong to each text or question; empty where each is one.
    """

    setting: Setting
    metric: str = ""
    curve: tuple[dict[str, Any], ...] = ()
    logits: NDArray[np.float32] | None = None
    targets: NDArray[Any] | None = None
    temperature: float = 1.0
    sizes: tuple[int, ...] = ()

    @property
    def probabilities(self) -> NDArray[np.float32] | None:
        """[rows, outputs] of the logits where one of the outputs is true, as they are after calibration."""
        return None if self.logits is None else probabilities("softmax", self.logits / np.float32(self.temperature))


def settings(spec: Head, stored: Sequence[str], layers: int) -> list[Setting]:
    """All settings that a spec wants tried; one where it wants none.

    Args:
        stored: the features that there are.
        layers: of the encoder.

    Raises:
        SpecError: it wants features that are not there.
    """
    search, every = spec.search, tuple(stored)
    sets = [every]
    if search.pooling or search.layers:
        known = [parse(name) for name in stored]
        numbers = tuple(sorted({feature.layer for feature in known}))
        poolings = tuple(dict.fromkeys(feature.pooling for feature in known))
        wanted = product(search.layers or (numbers,), search.pooling or (poolings,))
        sets = list(dict.fromkeys(_present(features(names, of, layers), known) for of, names in wanted))
    found = [
        Setting(names, combine if len(names) > 1 else "concat", l2, seed)
        for names, combine, l2, seed in product(
            sets, search.combine or (spec.combine,), search.l2 or (spec.l2,), search.seeds or (spec.seed,)
        )
    ]
    return list(dict.fromkeys(found))


def _present(wanted: Sequence[Feature], known: Sequence[Feature]) -> tuple[str, ...]:
    for feature in wanted:
        if feature not in known:
            raise SpecError(
                f"head.search asks for {feature}, which is not stored. Give encoder.pooling and encoder.layers all "
                f"that is to be searched: there are {', '.join(map(str, known))}."
            )
    return tuple(map(str, wanted))


def choose(samples: Samples, wanted: Wanted, candidates: Sequence[Setting], spec: Head, share: Share) -> Choice:
    """The best of the candidates, by rows that were left out; the first, where none are."""
    folds = 1 if len(wanted.stores) > 1 else wanted.folds
    if not folds:
        return Choice(candidates[0])
    best: tuple[float, Setting, NDArray[np.float32]] | None = None
    curve = []
    for (names, combine), group in groupby(candidates, key=lambda each: (each.features, each.combine)):
        same = list(group)
        logits = _left_out(of(samples, wanted, same[0]), same, folds, combine, spec, share)
        log.info("fitting: %d settings of %s tried on %d folds", len(same), named(names), folds)
        for setting, given in zip(same, logits, strict=True):
            score, spread = _score(given, samples, wanted, share, folds)
            curve.append({**asdict(setting), "score": score, "low": score - spread, "high": score + spread})
            if best is None or score > best[0]:
                best = (score, setting, given)
    assert best is not None
    logits, targets, sizes = _gathered(best[2], samples, share, folds)
    for point in curve:
        point["chosen"] = Setting(*(point[name] for name in ("features", "combine", "l2", "seed"))) == best[1]
    heat = _temperature(samples.kind, logits, targets)
    return Choice(best[1], METRICS[wanted.form], tuple(curve), logits, targets, heat, sizes)


def of(samples: Samples, wanted: Wanted, setting: Setting) -> Samples:
    """The samples by the features of a setting."""
    stored = wanted.features
    return samples.of([stored.index(name) for name in setting.features], setting.combine == "mean")


def fit_one(
    samples: Samples, wanted: Wanted, choice: Choice, spec: Head, share: Share, record: Record, **resume: Any
) -> LinearHead:
    """The head of a choice on all training rows, calibrated, over all of its features side by side."""
    import torch

    setting = choice.setting
    spec = spec.model_copy(update={"combine": setting.combine, "seed": setting.seed, "l2": setting.l2})
    stops = spec.early_stopping and len(wanted.stores) > 1
    trial = Trial(setting.l2, 0 if stops else -1, setting.seed)
    chosen = of(samples, wanted, setting)
    many = sum(share.gather(len(chosen.folds))) * chosen.width > _EXACT
    dtype = torch.float32 if many and spec.optimizer == "lbfgs" else None
    (head,) = solve(chosen, [trial], spec, share, record, dtype=dtype, **resume)
    weight = head.weight / choice.temperature
    if setting.combine == "mean":  # the same over features side by side
        count = len(setting.features)
        weight = np.tile(weight / count, (1, count))
    return LinearHead(np.ascontiguousarray(weight, np.float32), head.bias / np.float32(choice.temperature))


def _left_out(
    samples: Samples, same: Sequence[Setting], folds: int, combine: str, spec: Head, share: Share
) -> NDArray[np.float32]:
    """[settings, mine, outputs] what heads give the rows that they were fitted without."""
    import torch

    trials = [Trial(setting.l2, fold, setting.seed) for setting in same for fold in range(folds)]
    spec = spec.model_copy(update={"combine": combine})
    dtype = torch.float32 if spec.optimizer == "lbfgs" else None
    heads = solve(samples, trials, spec, share, lambda loss: None, dtype=dtype)
    mine = set(samples.folds.unique().tolist())  # few texts may leave a fold without a row of this worker's, or of all
    own = [number for number, trial in enumerate(trials) if trial.fold in mine]
    if not own:
        return np.full((len(same), len(samples.folds), samples.outputs), np.nan, np.float32)
    return held_out(samples, [heads[number] for number in own], [trials[number] for number in own])


def _score(
    logits: NDArray[np.float32], samples: Samples, wanted: Wanted, share: Share, folds: int
) -> tuple[float, float]:
    """How well logits answer the rows that were left out, over all workers, higher being better; and half the width of
    its 95 % interval, 0 where that is not known."""
    left = (samples.folds < folds).cpu().numpy()
    targets = samples.targets.cpu().numpy()
    parts = share.gather(_counted(wanted.form, logits, targets, left, samples, wanted.names))
    if wanted.form == "tokens":
        return float(metrics.entity_scores(metrics.sum_counts(parts))["micro"]["f1"]), 0.0
    summed = np.sum(parts, 0)
    if wanted.form == "name":
        right, rows = summed
        share_right = right / max(1, rows)
        return float(share_right), 1.96 * math.sqrt(share_right * (1 - share_right) / max(1, rows))
    if wanted.form == "names":
        return float(metrics.micro(summed)["f1"]), 0.0
    if wanted.form == "number":
        rows, total, squares, errors = summed
        return float(1 - errors / max(1e-30, squares - total**2 / max(1, rows))), 0.0
    return float(summed[0] / max(1, summed[1])), 0.0


def _counted(
    form: str,
    logits: NDArray[np.float32],
    targets: NDArray[Any],
    left: NDArray[np.bool_],
    samples: Samples,
    names: Sequence[str],
) -> Any:
    """What a worker's rows add to a score."""
    if form == "tokens":
        return _entities(logits.argmax(1), targets, left, samples, names)
    if form == "answers":
        return _likelihood(logits, targets, left, samples)
    logits, targets = logits[left], targets[left]
    if form == "name":
        return np.array([(logits.argmax(1) == targets).sum(), len(targets)])
    if form == "names":
        return metrics.label_counts(targets > 0, logits > 0)
    y = targets.astype(np.float64)
    return np.array([y.size, y.sum(), (y**2).sum(), ((y - logits) ** 2).sum()])


def _entities(
    given: NDArray[np.int64], true: NDArray[np.int64], left: NDArray[np.bool_], samples: Samples, names: Sequence[str]
) -> Any:
    assert samples.edges is not None
    spans = [(i, j) for i, j in pairwise(samples.edges.tolist()) if i < j and left[i]]
    tags = ([[names[tag] for tag in part[i:j]] for i, j in spans] for part in (true.tolist(), given.tolist()))
    return metrics.entity_counts(*tags)


def _likelihood(
    logits: NDArray[np.float32], targets: NDArray[np.float32], left: NDArray[np.bool_], samples: Samples
) -> NDArray[np.float64]:
    """The sum over questions of the log of the probability of their answers' start and end, and how many there are."""
    assert samples.edges is not None
    edges = samples.edges.cpu().numpy()
    starts = edges[:-1]
    shifted = logits.astype(np.float64) - np.repeat(np.maximum.reduceat(logits, starts), np.diff(edges), 0)
    log_p = shifted - np.repeat(np.log(np.add.reduceat(np.exp(shifted), starts)), np.diff(edges), 0)
    each = np.add.reduceat(np.where(targets > 0, targets * log_p, 0), starts).mean(1)
    return np.array([each[left[starts]].sum(), left[starts].sum()])


def _gathered(
    logits: NDArray[np.float32], samples: Samples, share: Share, folds: int
) -> tuple[NDArray[np.float32], NDArray[Any], tuple[int, ...]]:
    """The logits and targets of all workers' rows that were left out, in the order of the rows, and their sizes."""
    edges = np.arange(len(logits) + 1) if samples.edges is None else samples.edges.cpu().numpy()
    room = _KEPT // share.world // max(1, logits.shape[1])
    groups = int(np.searchsorted(edges, room, side="right")) - 1
    left = np.append((samples.folds < folds).cpu().numpy(), True)  # a text without a word goes with the next one
    kept = np.flatnonzero(left[edges[:groups]])
    if groups < len(edges) - 1:
        log.info("fitting: of the rows that were left out %d are looked at more closely", groups * share.world)
    targets = samples.targets.cpu().numpy()
    mine = [(logits[edges[g] : edges[g + 1]], targets[edges[g] : edges[g + 1]]) for g in kept.tolist()]
    numbers = (kept * share.world + share.rank).tolist()
    workers = share.gather(list(zip(numbers, mine, strict=True)))
    every = sorted((pair for worker in workers for pair in worker), key=lambda pair: pair[0])
    sizes = () if samples.edges is None else tuple(len(part[0]) for _, part in every)
    found = zip((logits[:0], targets[:0]), *(part for _, part in every), strict=True)
    all_logits, all_targets = (np.concatenate(parts) for parts in found)
    return all_logits, all_targets, sizes


def lengths_of(samples: Samples, share: Share, longest: int = 30) -> tuple[float, ...]:
    """The log of how probable answers of 1, 2, ... tokens are: how often they occur, and once more each (Laplace)."""
    assert samples.edges is not None
    edges, targets = samples.edges.cpu().numpy(), samples.targets.cpu().numpy()
    places = np.arange(len(targets)) - np.repeat(edges[:-1], np.diff(edges))
    begun, ended = np.add.reduceat(targets * places[:, None], edges[:-1]).T  # on average over a question's answers
    more = np.rint(ended - begun).astype(int)[targets[edges[:-1], 0] == 0]
    counts = np.sum(share.gather(np.bincount(np.clip(more, 0, longest - 1), minlength=longest)), 0) + 1
    return tuple(np.log(counts / counts.sum()).tolist())


def _temperature(kind: str, logits: NDArray[np.float32], targets: NDArray[Any]) -> float:
    if not len(logits) or kind not in ("softmax", "sigmoid"):
        return 1.0
    if kind == "sigmoid":
        return calibration.temperature_of_labels(logits, targets > 0)
    return calibration.temperature(logits, targets)


def threshold(choice: Choice, accuracy: float, form: str, lengths: Sequence[float]) -> float:
    """How sure a head has to be to answer (see `Bundle.threshold`), by the rows that were left out.

    Args:
        accuracy: that what is answered has to have at least.
        lengths: see `lengths_of`.
    """
    if form == "answers":
        return _least_margin(choice, lengths)
    p = choice.probabilities if accuracy else None
    if p is None:
        return 0.0
    found = calibration.threshold_for(p.max(1), p.argmax(1) == choice.targets, accuracy)
    if not math.isfinite(found):
        log.warning(
            "fitting: however sure the head is, it does not reach head.answer_accuracy %g: no row is answered", accuracy
        )
        return 1.01
    return float(found)


def _least_margin(choice: Choice, lengths: Sequence[float]) -> float:
    """By how much no answer has to be likelier than the best one, for most questions to be told right; ALWAYS where
    each question has an answer."""
    if choice.logits is None or choice.targets is None:
        return ALWAYS
    edges = np.cumsum([0, *choice.sizes])
    none = choice.targets[edges[:-1], 0] > 0.5 if len(choice.sizes) else np.zeros(0, bool)
    if not none.any():
        return ALWAYS
    margins = np.array([null_margin(choice.logits[i:j], lengths) for i, j in pairwise(edges.tolist())])
    order = np.argsort(-margins)
    right = np.cumsum(none[order]) + (~none).sum() - np.cumsum(~none[order])  # if the first so many get no answer
    best = int(right.argmax())
    if (~none).sum() > right[best]:  # if all are answered
        return float(margins[order[0]]) + 1e-6
    return float(margins[order[best]]) - 1e-6


def to_bytes(choice: Choice) -> bytes:
    """A choice as a file of arrays, without pickles."""
    fields = {
        "setting": asdict(choice.setting),
        **{name: getattr(choice, name) for name in ("metric", "curve", "temperature", "sizes")},
    }
    arrays = {name: value for name in ("logits", "targets") if (value := getattr(choice, name)) is not None}
    sink = io.BytesIO()
    np.savez_compressed(sink, fields=np.array(json.dumps(fields)), **arrays)
    return sink.getvalue()


def from_bytes(data: bytes) -> Choice:
    """What `to_bytes` wrote.

    Raises:
        ValueError, KeyError, OSError: it is damaged.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        fields = json.loads(str(found["fields"]))
        arrays = {name: found[name] for name in ("logits", "targets") if name in found.files}
    setting = fields.pop("setting")
    setting["features"] = tuple(setting["features"])
    curve, sizes = tuple(fields.pop("curve")), tuple(fields.pop("sizes"))
    return Choice(Setting(**setting), curve=curve, sizes=sizes, **fields, **arrays)
