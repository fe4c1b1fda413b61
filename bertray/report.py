"""The report: plain results to one self-contained HTML page. Knows nothing of where they come from."""

import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertray import clock

Facts = Mapping[str, Any]

_TITLES = {
    "splits": "Rows and scores",
    "examples": "Examples",
    "learning": "Learning curve",
    "search": "What was tried",
    "classes": "Classes",
    "confusion": "Confusion",
    "calibration": "Trust in probabilities",
    "scatter": "Given against true",
    "map": "Map of the rows",
    "worst": "Worst mistakes",
    "doubts": "Labels that are probably wrong",
    "conflicts": "Texts with several labels",
    "shared": "Test rows that the training rows hold",
    "aside": "Cut and set aside",
    "time": "Time",
    "spec": "Spec and versions",
}
_METRICS = {  # main ones first: what each is called, and its format
    "accuracy": ("accuracy", "%"),
    "exact": ("exactly right", "%"),
    "f1": ("F1", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "macro_f1": ("macro F1", ".3f"),
    "micro_f1": ("micro F1", ".3f"),
    "pearson": ("Pearson's r", ".3f"),
    "spearman": ("Spearman's rho", ".3f"),
    "rmse": ("root mean squared error", ".4g"),
    "mae": ("mean absolute error", ".4g"),
    "r2": ("R²", ".3f"),
    "auroc": ("AUROC", ".3f"),
    "loss": ("log loss", ".3f"),
    "ece": ("calibration error", ".3f"),
    "coverage": ("answered", "%"),
    "accuracy_answered": ("accuracy of answered", "%"),
    "outliers": ("unlike training rows", "%"),
    "has_answer_f1": ("F1 with an answer", ".3f"),
    "no_answer_f1": ("F1 without an answer", ".3f"),
}
_CARDS = {
    "single_label": ("accuracy", "macro_f1", "auroc", "loss", "ece", "coverage", "accuracy_answered"),
    "multi_label": ("micro_f1", "macro_f1", "exact", "auroc", "loss"),
    "regression": ("pearson", "spearman", "rmse", "mae", "r2"),
    "token-classification": ("f1", "precision", "recall", "macro_f1", "accuracy", "loss"),
    "question-answering": ("f1", "exact", "has_answer_f1", "no_answer_f1", "loss"),
}
_DASH = "\N{EN DASH}"  # for what is not defined
_MANY = 30  # classes from which on counts no longer fit a table
_LONGEST = 500  # rows of a table at most
_PAIRS = 12  # confused pairs of classes
_MAP_POINTS, _MAP_WIDTH, _MAP_BYTES = 2_000, 800, 400_000  # bytes of texts
_SCATTER_POINTS = 1_000
# At least 3:1 against white and against the dark background.
PALETTE = ("#2b7fd4", "#d2601a", "#239a63", "#c4468f", "#8a67d6", "#a5810c", "#16939f", "#d64550", "#6c8f1f")
OTHERS = "#848b96"
# What plots are drawn in, and what the page's colours are called.
_INK, _ACCENT, _SECOND = "#7a7b7c", "#2b7fd5", "#d2601b"
_VARIABLES = {_INK: "var(--soft)", _ACCENT: "var(--accent)", _SECOND: "var(--second)"}


def html(title: str, summary: Facts, details: Facts, spec: str, versions: Mapping[str, str]) -> str:
    """The page. What is absent, empty or None in summary and details has no section.

    Args:
        title: name of the run.
        summary: what metrics.json holds: task, problem, encoder, features, head, rows, metrics, intervals, seconds,
            faults and examples.
        details: judged (the split that is judged), and of it confusion, per_class, reliability, abstention, worst, map
            and more; losses of the fit; doubts, conflicts, overlap and near duplicates; search.
        spec: the spec as YAML.
        versions: package -> version.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bertray"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"short": _short, "label": _label, "metric": _metric}
    environment.filters |= {
        name: partial(_formed, form=form) for name, form in (("count", ",.0f"), ("share", ".2f"), ("exact", ".4f"))
    }
    judged = _judged(summary, details)
    sections = _sections(summary, details, judged) | {"spec": {"text": spec, "versions": versions}}
    return environment.get_template("report.html").render(
        title=title,
        judged=judged,
        cards=_cards(summary, judged),
        rows=summary.get("rows", {}).get(judged, {}).get("rows"),
        made_of=_made_of(summary, details),
        legend=(sections["map"] or {}).get("legend", ()),
        sections={name: (heading, sections[name]) for name, heading in _TITLES.items() if sections.get(name)},
    )


def _sections(summary: Facts, details: Facts, judged: str) -> dict[str, Any]:
    """What each section shows, by name; empty where there is nothing to show."""
    get = details.get
    labels = [str(label) for label in get("labels") or ()]
    return {
        "splits": _splits(summary),
        "examples": summary.get("examples"),
        "learning": _learning(summary, details),
        "search": _search(get("search")),
        "classes": sorted(get("per_class") or (), key=_weakest) if len(labels) > _MANY else get("per_class"),
        "confusion": _confusion((get("confusion") or {}).get(judged), labels),
        "calibration": _calibration(details),
        "scatter": _scatter(get("scatter")),
        "map": _map(get("map"), summary.get("problem") == "regression"),
        "worst": (get("worst") or ())[:_LONGEST],
        "doubts": (get("doubts") or ())[:_LONGEST],
        "conflicts": (get("conflicts") or ())[:_LONGEST],
        "shared": _shared(get("overlap"), get("near")),
        "aside": _aside(get("truncated"), get("rejected")),
        "time": _time(summary),
    }


# --- words and numbers ------------------------------------------------------------------------------------


def _short(value: Any, most: int = 300) -> str:
    """A text, a label, a list of them or a number in one line of at most so many characters; a dash for None."""
    if value is None:
        return _DASH
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = " ".join(text.split()) or "(empty)"
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _label(value: Any, most: int = 60) -> str:
    """A label that may be broken behind its underscores, as HTML."""
    from markupsafe import Markup, escape

    return Markup(escape(_short(value, most)).replace("_", Markup("_<wbr>")))


def _formed(value: float | None, form: str) -> str:
    return _DASH if value is None else f"{value:{form}}"


def _metric(value: float | None, name: str, unit: bool = True) -> str:
    """A metric as it is written: 87.2 %, 0.872; a dash where it is not defined."""
    form = _METRICS.get(name, (name, ".4g"))[1]
    if value is None:
        return _DASH
    return f"{100 * value:.1f}{' %' if unit else ''}" if form == "%" else f"{value:{form}}"


def _called(name: str) -> str:
    return _METRICS.get(name, (name.replace("_", " "), ""))[0]


def _judged(summary: Facts, details: Facts) -> str:
    return details.get("judged") or ("test" if "test" in summary.get("metrics", {}) else "train")


def _cards(summary: Facts, judged: str) -> list[dict[str, Any]]:
    """The main metrics of a split, each with its interval."""
    found = summary.get("metrics", {}).get(judged, {})
    intervals = (summary.get("intervals") or {}).get(judged, {})
    names = _CARDS.get(summary.get("task", ""), ()) or _CARDS.get(summary.get("problem", ""), tuple(_METRICS))
    return [
        {"name": _called(name), "value": _metric(found[name], name), "interval": _bounds(intervals, name)}
        for name in names
        if name in found
    ]


def _made_of(summary: Facts, details: Facts) -> str:
    """What the result was made of, in a sentence."""
    encoder, head = summary.get("encoder", {}), summary.get("head") or {}
    where = f" ({', '.join(encoder['backends'])})" if encoder.get("backends") else ""
    states = _states(summary.get("features") or ()) or f"{_short(encoder.get('pooling'))} pooling"
    rows = summary.get("rows", {}).get("train", {}).get("rows")
    labels = len(details.get("labels") or ())
    fitted = (f" by {head['optimizer']}" if head.get("optimizer") else "") + (f" on {rows:,} rows" if rows else "")
    unused = _OF_STEPS if head.get("optimizer") == "lbfgs" else ()
    told = {name: value for name, value in head.items() if _told(name, value) and name not in unused}
    settings = ", ".join(_setting(name, value) for name, value in told.items())
    return (
        f"{encoder.get('model', 'The encoder')}{where}, {states}; a linear head"
        f"{f' over {labels:,} labels' if labels else ''} fitted{fitted}{f': {settings}' if settings else ''}."
    )


_OF_STEPS = ("lr", "batch_size", "epochs", "early_stopping")  # settings that L-BFGS does not know


def _told(name: str, value: Any) -> bool:
    """Whether a setting does something: most do nothing at 0 or none."""
    idle = value in (None, False, "", "none") or (value == 0 and name != "l2")
    return name not in ("optimizer", "seed") and not _nested(value) and not idle


def _nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list | tuple) and len(value) > 6)


def _setting(name: str, value: Any) -> str:
    return name.replace("_", " ") if value is True else f"{name.replace('_', ' ')} {_short(value, 40)}"


def _states(names: Sequence[str]) -> str:
    """mean_5, mean_6 -> mean of layers 5, 6."""
    layers: dict[str, list[str]] = {}
    for name in names:
        pooling, _, layer = name.rpartition("_")
        layers.setdefault(pooling or layer, []).append(layer)
    return " and ".join(
        f"{pooling} of layer{'s' if len(many) > 1 else ''} {', '.join(many)}" for pooling, many in layers.items()
    )


# --- sections ---------------------------------------------------------------------------------------------


def _splits(summary: Facts) -> dict[str, Any]:
    """A line for each count and metric, with what it is in each split."""
    scores, rows = summary.get("metrics", {}), summary.get("rows", {})
    intervals = summary.get("intervals") or {}
    splits = list({**rows, **scores})
    counts = {"rows": "rows", "rejected": "set aside", "empty": "empty", "truncated": "truncated"}
    counts |= {"windowed": "in windows", "tokens": "tokens"}
    lines: list[tuple[str, list[tuple[str, list[str]]]]] = [
        (word, [(_formed(rows.get(split, {}).get(name), ",.0f"), []) for split in splits])
        for name, word in counts.items()
        if any(name in each for each in rows.values())
    ]
    found = dict.fromkeys(name for each in scores.values() for name in each if name != "rows")
    for name in [*(name for name in _METRICS if name in found), *(name for name in found if name not in _METRICS)]:
        cells = [
            (_metric(scores.get(split, {}).get(name), name), _bounds(intervals.get(split, {}), name))
            for split in splits
        ]
        lines.append((_called(name), cells))
    reasons = {split: each["reasons"] for split, each in rows.items() if each.get("reasons")}
    return {"splits": splits, "lines": lines, "reasons": reasons} if lines else {}


def _bounds(intervals: Mapping[str, Any], name: str) -> list[str]:
    """Low and high of a metric as they are written; none where they are not known."""
    bounds = intervals.get(name) or ()
    return [] if None in bounds else [_metric(bound, name, unit=False) for bound in bounds]


def _weakest(row: Facts) -> float:
    return row["f1"] if row["f1"] is not None else -1.0


def _confusion(counts: Sequence[Sequence[int]] | None, labels: Sequence[str]) -> dict[str, Any] | None:
    """A table of counts and shares of each true class, or a picture where classes are many; and what is confused."""
    if counts is None or not len(counts):
        return None
    matrix = np.asarray(counts, np.int64)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    wrong = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    pairs = [divmod(int(place), len(matrix)) for place in order if wrong.flat[place]]
    few = len(matrix) <= _MANY
    labels = labels or [str(number) for number in range(len(matrix))]
    return {
        "labels": labels,
        "rows": list(zip(labels, matrix.tolist(), shares.tolist(), strict=True)) if few else [],
        "plot": None if few else _heat(shares),
        "pairs": [(labels[a], labels[b], int(matrix[a, b]), float(shares[a, b])) for a, b in pairs if len(matrix) > 4],
    }


def _calibration(details: Facts) -> dict[str, Any] | None:
    after, before = details.get("reliability"), details.get("reliability_before")
    curve = details.get("abstention")
    curve = curve if curve and len(curve["threshold"]) else None
    if not (after or curve):
        return None
    return {
        "after": after,
        "before": before,
        "reliability": _reliability(after, before) if after else None,
        "abstention": _abstention(curve) if curve else None,
        "chosen": curve.get("chosen") if curve else None,
        "at": _chosen(curve) if curve else None,
    }


def _chosen(curve: Facts) -> dict[str, float] | None:
    """Coverage and accuracy at the chosen threshold; None without one, or where it lets no row through."""
    places = [i for i, t in enumerate(curve["threshold"]) if curve.get("chosen") is not None and t >= curve["chosen"]]
    return {"coverage": curve["coverage"][places[0]], "accuracy": curve["accuracy"][places[0]]} if places else None


def _shared(overlap: Facts | None, near: Sequence[Facts] | None) -> dict[str, Any] | None:
    overlap = overlap if overlap and overlap.get("rows") else None
    return {"overlap": overlap, "near": (near or ())[:_LONGEST]} if overlap or near else None


def _aside(truncated: Sequence[Facts] | None, rejected: Sequence[Facts] | None) -> dict[str, Any] | None:
    found = {"truncated": (truncated or ())[:_LONGEST], "rejected": (rejected or ())[:_LONGEST]}
    return found if truncated or rejected else None


def _time(summary: Facts) -> dict[str, Any]:
    seconds = {step: s for step, s in (summary.get("seconds") or {}).items() if s is not None}
    longest = max((s for step, s in seconds.items() if step != "total"), default=0.0) or 1.0
    steps = [(step, s, min(1.0, s / longest) if step != "total" else None) for step, s in seconds.items()]
    spent = [f"{title.capitalize()}: {line}." for title, line in clock.lines(summary.get("spent") or {})]
    return {"steps": steps, "faults": summary.get("faults") or {}, "spent": spent} if steps else {}


def _map(points: Facts | None, numbers: bool) -> dict[str, Any] | None:
    """Points of the most frequent labels in a colour each, those of all others in grey; the texts as short as they
    have to be for the page to stay light."""
    if not points or not len(points["x"]):
        return None
    places = np.stack([np.asarray(points["x"], float), np.asarray(points["y"], float)], 1)
    rows = np.flatnonzero(np.isfinite(places).all(1))[:_MAP_POINTS]
    if not len(rows):
        return None
    at, height = _placed(places[rows])
    labels = _ranges(points["label"]) if numbers else [_short(label, 60) for label in points["label"]]
    frequent = [label for label, _ in Counter(labels[row] for row in rows).most_common()]
    named = frequent if len(frequent) <= len(PALETTE) else frequent[: len(PALETTE) - 1]
    named = sorted(named, key=(lambda label: float(label.split()[0])) if numbers else None)
    others = len(frequent) - len(named)
    groups: list[list[dict[str, Any]]] = [[] for _ in [*named, others]]
    for (x, y), row, tip in zip(at, rows, _tips(points, rows), strict=True):
        wrong = not numbers and points["label"][row] != points["predicted"][row]
        group = groups[named.index(labels[row]) if labels[row] in named else -1]
        group.append({"x": round(x), "y": round(y), "wrong": wrong, "tip": tip})
    names, colours = [*named, f"{others} other labels"], [*PALETTE[: len(named)], OTHERS]
    legend = [
        {"key": key, "name": name, "colour": colour, "points": group, "other": key == len(named)}
        for key, (name, colour, group) in enumerate(zip(names, colours, groups, strict=True))
        if group
    ]
    return {
        "width": _MAP_WIDTH,
        "height": height,
        "legend": legend,
        "groups": sorted(legend, key=lambda group: -len(group["points"])),  # small ones on top
        "wrong": sum(point["wrong"] for group in groups for point in group),
        "points": len(rows),
        "radius": 5 if len(rows) < 500 else 3.5,
    }


def _placed(places: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """[n, 2] places in a picture, both axes in the same scale, and the picture's height."""
    margin = 14
    low, size = places.min(0), np.maximum(np.ptp(places, 0), 1e-9)
    height = int(np.clip(_MAP_WIDTH * size[1] / size[0], 320, 560))
    scale = min((_MAP_WIDTH - 2 * margin) / size[0], (height - 2 * margin) / size[1])
    middle = np.array([_MAP_WIDTH, height]) / 2
    return middle + (places - low - size / 2) * scale * np.array([1, -1]), height


def _ranges(values: Sequence[float]) -> list[str]:
    """The fifth of all numbers that each belongs to, in words."""
    numbers = np.asarray(values, float)
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, 6)))
    bins = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, max(0, len(edges) - 2))
    return [f"{edges[b]:.4g} to {edges[min(b + 1, len(edges) - 1)]:.4g}" for b in bins]


def _tips(points: Facts, rows: NDArray[np.int64]) -> list[str]:
    """[n] what is told of each point, in lines: text, label and answer, id."""
    tips: list[str] = []
    for most in (160, 110, 70, 40, 20):
        tips = [_tip(points, row, most) for row in rows]
        if sum(len(tip.encode("utf-8", "replace")) + 4 * sum(map(tip.count, "&<>\"'")) for tip in tips) <= _MAP_BYTES:
            break
    return tips


def _tip(points: Facts, row: int, most: int) -> str:
    label, given = _short(points["label"][row], most // 2), _short(points["predicted"][row], most // 2)
    lines = [_short(points["text"][row], most), f"label {label}" + (f", answered {given}" if given != label else "")]
    return "\n".join([*lines, _short(points["id"][row], most // 2)] if points.get("id") else lines)


# --- plots ------------------------------------------------------------------------------------------------


def _learning(summary: Facts, details: Facts) -> str | None:
    losses, held_out = details.get("losses"), details.get("validation_losses")
    if losses is None or not len(losses):
        return None
    step = "evaluation" if (summary.get("head") or {}).get("optimizer") == "lbfgs" else "epoch"

    def draw(axes: Any) -> None:
        x = np.arange(1, len(losses) + 1)
        dots = "o" if len(losses) < 40 else ""
        axes.plot(x, np.array(losses, float), color=_ACCENT, marker=dots, ms=4, label="training rows")
        if held_out is not None and len(held_out):
            axes.plot(
                np.linspace(1, len(losses), len(held_out)),
                np.array(held_out, float),
                color=_SECOND,
                marker=dots,
                ms=4,
                label="held-out rows",
            )
            axes.legend()
        axes.set(xlabel=step, ylabel="objective")
        axes.xaxis.get_major_locator().set_params(integer=True)

    words = f"The objective, {step} by {step}: from {_short(losses[0])} to {_short(losses[-1])}"
    return _plot("learning", 4.9, 3.0, words, draw)


def _search(search: Facts | None) -> dict[str, Any] | None:
    """What was tried, the best first, and a plot of the score over l2 where that was varied."""
    if not search or not search.get("curve"):
        return None
    lines: dict[str, list[Facts]] = {}
    for point in search["curve"]:
        name = " + ".join(point["features"]) + (f", {point['combine']}" if point.get("combine") else "")
        lines.setdefault(name, []).append(point)
    curve = sorted(search["curve"], key=lambda point: -(point["score"] if point["score"] is not None else -np.inf))
    varied = len({point["l2"] for point in curve}) > 1
    metric = _called(search.get("metric") or "score")
    return {"metric": metric, "curve": curve, "plot": _search_plot(lines, metric) if varied else None}


def _search_plot(lines: Mapping[str, Sequence[Facts]], metric: str) -> str:
    best = sorted(lines, key=lambda name: -max(_number(point["score"], -np.inf) for point in lines[name]))
    colours = dict(zip(best, PALETTE, strict=False))

    def draw(axes: Any) -> None:
        for name in reversed(best):
            points = sorted(lines[name], key=lambda point: point["l2"])
            x = [point["l2"] for point in points]
            y, low, high = (np.array([_number(p.get(key)) for p in points]) for key in ("score", "low", "high"))
            colour = colours.get(name, OTHERS)
            axes.plot(x, y, color=colour, marker="o", ms=4, label=_short(name, 34) if name in colours else None)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            chosen = [point for point in points if point.get("chosen")]
            ring = {"marker": "o", "ms": 12, "mfc": "none", "mec": _INK, "mew": 2, "linestyle": ""}
            axes.plot([point["l2"] for point in chosen], [point["score"] for point in chosen], **ring)
        positive = [point["l2"] for points in lines.values() for point in points if point["l2"] > 0]
        axes.set_xscale("symlog", linthresh=min(positive))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="l2", ylabel=metric)
        handles, names = axes.get_legend_handles_labels()
        axes.figure.legend(handles[::-1], names[::-1], loc="outside lower left")

    height = 3.2 + 0.2 * min(len(best), len(PALETTE))
    return _plot("search", 4.9, height, f"{metric} over l2, a line for each of {len(best)} sets of features", draw)


def _number(value: float | None, otherwise: float = np.nan) -> float:
    return otherwise if value is None else value


def _heat(shares: NDArray[np.float64]) -> str:
    def draw(axes: Any) -> None:
        colours = np.empty((*shares.shape, 4))
        colours[..., :3] = np.array([int(PALETTE[0][i : i + 2], 16) for i in (1, 3, 5)]) / 255
        colours[..., 3] = shares**0.6  # so that few rows are seen too
        axes.imshow(colours, interpolation="nearest")
        axes.set(xlabel="answered", ylabel="true")
        axes.grid(False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)

    return _plot("confusion", 6.4, 6.0, f"Confusion matrix of {len(shares)} classes", draw)


def _reliability(after: Facts, before: Facts | None) -> str:
    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=_INK, linestyle=":", linewidth=1)
        for bins, colour, name in ((before, _SECOND, "before scaling"), (after, _ACCENT, "after" if before else "")):
            if not bins:
                continue
            full = np.array(bins["count"]) > 0
            x, y = (np.array(bins[key], float)[full] for key in ("confidence", "accuracy"))
            size = 12 + 140 * np.sqrt(np.array(bins["count"])[full] / max(1, np.sum(bins["count"])))
            axes.plot(x, y, color=colour, label=name)
            axes.scatter(x, y, s=size, color=colour)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03), ylim=(0, 1.03))
        if before:
            axes.legend()

    return _plot(
        "reliability", 4.2, 3.6, f"Accuracy over confidence; calibration error {_formed(after['ece'], '.3f')}", draw
    )


def _abstention(curve: Facts) -> str:
    def draw(axes: Any) -> None:
        axes.plot(curve["coverage"], curve["accuracy"], color=_ACCENT)
        if chosen := _chosen(curve):
            axes.plot(chosen["coverage"], chosen["accuracy"], "o", ms=10, mfc="none", mec=_SECOND, mew=2)
        axes.set(xlabel="share of rows answered", ylabel="accuracy of these", xlim=(0, 1.03))

    return _plot("abstention", 4.2, 3.6, "Accuracy of the rows that are answered over their share", draw)


def _scatter(pairs: Facts | None) -> dict[str, Any] | None:
    if not pairs or not len(pairs["true"]):
        return None
    true, given = np.asarray(pairs["true"], float), np.asarray(pairs["given"], float)
    some = np.unique(np.linspace(0, len(true) - 1, _SCATTER_POINTS).round().astype(int))

    def draw(axes: Any) -> None:
        ends = [min(true.min(), given.min()), max(true.max(), given.max())]
        axes.plot(ends, ends, color=_INK, linestyle=":", linewidth=1)
        axes.plot(true[some], given[some], "o", ms=3.5, color=_ACCENT, alpha=0.5, mew=0)
        axes.set(xlabel="true", ylabel="given")

    return {"plot": _plot("scatter", 5.0, 4.2, "Numbers given over the true ones", draw), "rows": len(some)}


_STYLE: Any = {
    **{"svg.fonttype": "none", "text.parse_math": False, "font.size": 10.0, "lines.linewidth": 1.8},
    **{f"{name}.color": _INK for name in ("text", "xtick", "ytick", "grid")},
    **{"axes.edgecolor": _INK, "axes.labelcolor": _INK, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "image.composite_image": False, "legend.fontsize": 9.0},
}


def _plot(name: str, width: float, height: float, words: str, draw: Callable[[Any], None]) -> str:
    """What `draw` puts on axes, as inline SVG in the page's colours: light and dark take the same picture.

    Args:
        name: distinct among the plots of a page. width, height: in inches. words: what it shows, for who cannot see it.
    """
    import matplotlib
    from markupsafe import Markup, escape
    from matplotlib.figure import Figure  # not pyplot: it keeps figures in global state and looks for a display

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser will have a font for it
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub("<[^>]*>", lambda tag: _tag(tag[0], name), svg)
    opening = f'<svg role="img" aria-label="{escape(words)}" style="width: {96 * width:.0f}px" '
    return Markup(opening + re.sub(r'^<svg |(?<= )(?:width|height)="[\d.]+pt" ', "", svg, count=3))


def _tag(tag: str, name: str) -> str:
    """A tag of a plot: its ids are the plot's own, its colours the page's."""
    tag = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", tag)
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(colour, variable)
    return " ".join(tag.split())
