"""The report: plain results to one self-contained HTML page. Knows nothing of where they come from."""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertray import metrics

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
    figure, axes = _figure(6.4, 3.2)
    axes.plot(range(1, len(losses) + 1), losses, color="#2563eb", marker="o" if len(losses) < 40 else "", linewidth=2)
    axes.set_xlabel("epoch" if len(losses) < 40 else "step")
    axes.set_ylabel("objective")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _matrix(confusion: NDArray[np.int64], labels: Sequence[str]) -> str:
    few = len(labels) <= _MANY
    size = min(9.0, 2.6 + 0.55 * len(labels)) if few else 9.0
    figure, axes = _figure(size + 0.8, size)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if few:
        # A dollar sign would start a formula.
        short = [(label if len(label) <= 18 else label[:17] + "…").replace("$", r"\$") for label in labels]
        axes.set_xticks(
            range(len(labels)),
            short,
            rotation=30 if len(labels) > 4 else 0,
            ha="right" if len(labels) > 4 else "center",
        )
        axes.set_yticks(range(len(labels)), short)
        for (row, column), count in np.ndenumerate(confusion):
            axes.text(
                column,
                row,
                f"{count:,}",
                ha="center",
                va="center",
                fontsize=10 if len(labels) < 12 else 6,
                color="white" if shares[row, column] > 0.55 else "#1f2937",
            )
    return _svg(figure)


def _figure(width: float, height: float) -> Any:
    # Not pyplot: it keeps figures in global state and looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    """The figure as a data URL: as an image, its ids cannot clash with another figure's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue().encode()).decode()
