"""The report: plain results to one self-contained HTML page. Knows nothing of where they come from."""

import base64
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from bertray import metrics

_BLUES = ((247, 251, 255), (107, 174, 214), (8, 48, 107))
_MANY = 30  # classes from which on names and counts no longer fit a picture


def html(
    title: str,
    summary: Mapping[str, Any],
    splits: Mapping[str, Any],
    labels: Sequence[str],
    losses: Sequence[float],
    spec: str,
    versions: Mapping[str, str],
) -> str:
    """The page.

    Args:
        summary: what metrics.json holds.
        splits: split -> Evaluation.
        losses: the objective over epochs or evaluations.
        spec: the spec as YAML.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("bertray") / "templates" / "report.html").read_text(encoding="utf-8"))
    judged = "test" if "test" in splits else "train"
    return template.render(
        title=title,
        summary=summary,
        splits=splits,
        judged=judged,
        labels=labels,
        spec=spec,
        versions=versions,
        table=_class_table(splits[judged].confusion, labels),
        curve=_curve(losses),
        matrix=_matrix(splits[judged].confusion, labels),
    )


def _class_table(confusion: NDArray[np.int64], labels: Sequence[str]) -> list[dict[str, Any]]:
    columns = metrics.per_class(confusion)
    rows = [
        {"label": label, **{name: float(values[i]) for name, values in columns.items()}}
        for i, label in enumerate(labels)
    ]
    return sorted(rows, key=lambda row: row["f1"]) if len(rows) > _MANY else rows


def _curve(losses: Sequence[float]) -> str:
    """The objective over epochs or evaluations, as a line."""
    left, right, top, bottom, width, height = 58, 12, 12, 44, 460, 230
    low, high = min(losses), max(losses)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    steps = max(1, len(losses) - 1)
    xs = [left + i / steps * (width - left - right) for i in range(len(losses))]
    scale = (height - top - bottom) / ((high - low) or 1)
    ys = [height - bottom - (loss - low) * scale for loss in losses]
    parts = []
    for tick in ticks:
        y = height - bottom - (tick - low) * scale
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#e5e7eb"/>')
        parts.append(_text(left - 6, y + 4, f"{tick:.4g}", "end"))
    every = max(1, round(len(losses) / 8))
    parts += [_text(xs[i], height - bottom + 18, str(i + 1)) for i in range(0, len(losses), every)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    parts.append(f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="2"/>')
    if len(losses) < 40:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#2563eb"/>' for x, y in zip(xs, ys, strict=True)]
    parts.append(_text((left + width) / 2, height - 8, "epoch" if len(losses) < 40 else "step"))
    parts.append(_text(14, (top + height - bottom) / 2, "objective", turn=-90))
    return _svg(width, height, parts)


def _ticks(low: float, high: float) -> list[float]:
    """Up to six round numbers from about low to about high."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= 5)
    first = math.floor(low / step)
    return [(first + i) * step for i in range(math.ceil(high / step) - first + 1)]


def _matrix(confusion: NDArray[np.int64], labels: Sequence[str]) -> str:
    """The confusion matrix: shares of each true class as blue, counts and names where they fit."""
    few = len(labels) <= _MANY
    short = [label if len(label) <= 18 else label[:17] + "…" for label in labels] if few else [""] * len(labels)
    longest, slant = max(map(len, short)), len(labels) > 4
    cell = max(42.0, 150 / len(labels), 0 if slant else 8 * longest) if few else 420 / len(labels)
    left, bottom = 34 + 7 * longest, 34 + (5 * longest if slant else 14)
    side = cell * len(labels)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    parts = []
    for (row, column), count in np.ndenumerate(confusion):
        x, y, share = left + column * cell, 8 + row * cell, shares[row, column]
        if share or few:
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell:.2f}" height="{cell:.2f}" fill="{_blue(share)}"/>'
            )
        if few:
            color = "#ffffff" if share > 0.55 else "#1f2937"
            parts.append(_text(x + cell / 2, y + cell / 2 + 4, f"{count:,}", color=color))
    for i, label in enumerate(short if few else ()):
        middle = 8 + (i + 0.5) * cell
        parts.append(_text(left - 8, middle + 4, label, "end"))
        x, y = left - 8 + middle, 8 + side + 16
        parts.append(_text(x, y, label, "end", turn=-30) if slant else _text(x, y, label))
    parts.append(f'<rect x="{left}" y="8" width="{side:.1f}" height="{side:.1f}" fill="none" stroke="#9ca3af"/>')
    parts.append(_text(left + side / 2, 8 + side + bottom - 8, "predicted"))
    parts.append(_text(14, 8 + side / 2, "true", turn=-90))
    return _svg(left + side + 12, 8 + side + bottom, parts)


def _blue(share: float) -> str:
    """From nearly white over blue to dark blue."""
    place = 2 * share
    start, stop = _BLUES[1:] if place > 1 else _BLUES[:2]
    return "#" + "".join(f"{round(a + (b - a) * (place - (place > 1))):02x}" for a, b in zip(start, stop, strict=True))


def _text(x: float, y: float, text: str, anchor: str = "middle", color: str = "#374151", turn: int = 0) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"{turned}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    """The picture as a data URL: drawn by hand, since importing a library to do it takes longer than all else here."""
    page = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="system-ui,sans-serif" font-size="12">'
    )
    page += "".join(parts) + "</svg>"
    return "data:image/svg+xml;base64," + base64.b64encode(page.encode()).decode()
