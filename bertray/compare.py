"""Finished runs side by side: what they differ in, how well each does, and whether a difference is more than chance."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bertray.annotations import form_of
from bertray.answers import is_right
from bertray.errors import BertrayError
from bertray.storage import Location

Facts = Mapping[str, Any]

_SMALLER_IS_BETTER = {"loss", "ece", "rmse", "mae"}
_SETTINGS = ("features", "encoder", "head")
_WIDTH, _NAME, _CELL = 80, 22, 14  # characters of a line, of what it tells, and of a run


def compare(folders: Sequence[str]) -> dict[str, Any]:
    """Set runs side by side, from what lies in their folders.

    Args:
        folders: at least two, of runs that are evaluated; the first is what the others are held against.

    Returns:
        runs: for each its output, task, problem, judged (test, or train where it has no test rows), rows of each split,
        and seconds. differing: setting -> its value in each run, of those that are not the same in all. metrics:
        name -> values, intervals and best (the places of the best runs), a run each, None where it has none. paired:
        for each further run over the same test rows how many rows only_first and only_other has right, and p, that of
        an exact McNemar test. notes: what could not be compared, a line each.

    Raises:
        BertrayError: fewer than two, a folder that is no run, or one that is not evaluated.
    """
    if len(folders) < 2:
        raise BertrayError("There is nothing to compare: give the folders of at least two runs.")
    places = [Location(folder) for folder in folders]
    found = [_read(place) for place in places]
    kinds = [(facts.get("task", "text-classification"), facts.get("problem", "single_label")) for facts in found]
    judged = ["test" if "test" in facts["metrics"] else "train" for facts in found]
    notes = []
    if len(set(kinds)) > 1:
        named = ", ".join(dict.fromkeys(f"{task} ({problem})" for task, problem in kinds))
        notes.append(f"Different tasks, {named}: only what they share is compared.")
    if len(set(judged)) > 1:
        notes.append("Not all have test rows: those without are judged by the rows they were fitted on.")
    paired: list[dict[str, Any]] = []
    if len(set(kinds)) == 1 and set(judged) == {"test"}:
        paired, more = _all_paired(places, *kinds[0])
        notes += more
    return {
        "runs": [
            {
                "output": place.url,
                "task": task,
                "problem": problem,
                "judged": split,
                "rows": {name: rows.get("rows") for name, rows in facts.get("rows", {}).items()},
                "seconds": facts.get("seconds", {}),
            }
            for place, facts, (task, problem), split in zip(places, found, kinds, judged, strict=True)
        ],
        "differing": _differing(found),
        "metrics": _metrics(found, judged, shared=len(set(kinds)) > 1),
        "paired": paired,
        "notes": notes,
    }


def _read(place: Location) -> dict[str, Any]:
    """The metrics.json of a run."""
    path = place / "metrics.json"
    if not path.exists():
        if (place / "stores").exists() or (place / "head").exists():
            raise BertrayError(f"{place} is not evaluated yet: run its spec to the end first.")
        raise BertrayError(f"{place} is not the folder of a run: it has no metrics.json.")
    try:
        facts = json.loads(path.read())
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or not isinstance(facts.get("metrics"), dict) or not facts["metrics"]:
        raise BertrayError(f"{path} is damaged: run the spec again, which writes it anew.")
    return facts


def _differing(found: Sequence[Facts]) -> dict[str, list[Any]]:
    """Settings of encoder and head that are not the same in all runs, as `encoder.model`."""
    flat = [dict(_flat({name: facts.get(name) for name in _SETTINGS})) for facts in found]
    names = dict.fromkeys(name for settings in flat for name in settings)
    values = {name: [settings.get(name) for settings in flat] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif value is not None:
        yield name, value


def _metrics(found: Sequence[Facts], judged: Sequence[str], shared: bool) -> dict[str, dict[str, Any]]:
    scores = [facts["metrics"][split] for facts, split in zip(found, judged, strict=True)]
    intervals = [(facts.get("intervals") or {}).get(split, {}) for facts, split in zip(found, judged, strict=True)]
    names = dict.fromkeys(name for each in scores for name in each if name != "rows")
    return {
        name: {
            "values": (values := [each.get(name) for each in scores]),
            "intervals": [each.get(name) for each in intervals],
            "best": [] if shared else _best(values, name),
        }
        for name in names
        if not shared or all(name in each for each in scores)
    }


def _best(values: Sequence[float | None], name: str) -> list[int]:
    """Places of the best values; none where all that are known are the same, or none is better."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2 or name == "outliers":  # that tells of rows, not of heads
        return []
    best = min(known) if name in _SMALLER_IS_BETTER else max(known)
    return [place for place, value in enumerate(values) if value == best]


# --- row by row -------------------------------------------------------------------------------------------


def _all_paired(places: Sequence[Location], task: str, problem: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The first run against each other row by row, and why not where they cannot be."""
    if problem == "regression":
        return [], []
    form = form_of(task, problem)
    first, *others = [_predictions(place, form) for place in places]
    paired, notes = [], []
    for place, other in enumerate(others, 1):
        if first is None or other is None:
            notes.append(f"{_letter(0)} and {_letter(place)} are not compared row by row: predictions are missing.")
        elif not (aligned := _aligned(first, other)):
            notes.append(f"{_letter(0)} and {_letter(place)} are not compared row by row: their test rows differ.")
        else:
            one, two = (_right(table, form) for table in aligned)
            only_first, only_other = int((one & ~two).sum()), int((two & ~one).sum())
            counts = {"rows": len(one), "only_first": only_first, "only_other": only_other}
            paired.append({"first": 0, "other": place, **counts, "p": mcnemar(only_first, only_other)})
    return paired, notes


def _predictions(place: Location, form: str) -> pa.Table | None:
    path = place / "predictions" / "test.parquet"
    if not path.exists():
        return None
    columns = ["id", "label", "predicted", *(["tags"] if form == "tokens" else [])]
    try:
        return pq.read_table(path.path, filesystem=path.fs, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise BertrayError(f"{path} is damaged: delete it and run the spec again. ({error})") from None


def _aligned(one: pa.Table, two: pa.Table) -> tuple[pa.Table, pa.Table] | None:
    """Both tables in one order of their ids; None if they are not of the same rows with the same labels."""
    if len(one) != len(two):
        return None
    if not one["id"].equals(two["id"]):
        if len(one["id"].unique()) < len(one):
            return None
        one, two = one.sort_by("id"), two.sort_by("id")
    same = one["id"].equals(two["id"]) and one["label"].equals(two["label"])
    return (one, two) if same else None


def _right(table: pa.Table, form: str) -> "np.ndarray[Any, Any]":
    """[rows] whether each is answered rightly."""
    return np.array([is_right(form, row) for row in table.to_pylist()], bool)


def mcnemar(only_first: int, only_other: int) -> float:
    """How probable it is that two equally good runs differ at least this much: the exact two-sided test (McNemar 1947)
    of rows that only one of them has right, each of which is either's with probability 1/2. 1 without such rows."""
    n, k = only_first + only_other, min(only_first, only_other)
    steps = np.arange(1, k + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(n - steps + 1) - np.log(steps))])  # of n over 0 .. k
    return float(min(1.0, 2 * np.exp(np.logaddexp.reduce(logs) - n * np.log(2))))


# --- a table for terminals --------------------------------------------------------------------------------


def lines(found: Facts) -> Iterator[str]:
    """What compare found, in lines of at most 80 characters; the best of each metric with a star."""
    runs = found["runs"]
    for place, run in enumerate(runs):
        yield f"{_letter(place)}  {_cut(run['output'], _WIDTH - 4, tail=True)}"
    for note in found["notes"]:
        yield from ("", *_wrapped(note))
    long = {
        name: values for name, values in found["differing"].items() if any(len(_said(v)) > _CELL - 2 for v in values)
    }
    for name, values in long.items():
        yield from ("", name)
        yield from (f"  {_letter(i)}  {_cut(_said(value), _WIDTH - 6)}" for i, value in enumerate(values))
    fits = (_WIDTH - _NAME) // _CELL
    for start in range(0, len(runs), fits):
        yield ""
        yield from _table(found, range(start, min(start + fits, len(runs))), set(found["differing"]) - set(long))
    if found["paired"]:
        yield ""
        yield f"{'row by row':<{_NAME}}{'only A right':>{_CELL}}{'only other':>{_CELL}}{'p':>{_CELL}}"
    for pair in found["paired"]:
        counts = f"{pair['only_first']:>{_CELL},}{pair['only_other']:>{_CELL},}"
        yield f"{'A and ' + _letter(pair['other']):<{_NAME}}{counts}{pair['p']:>{_CELL}.2g}"


def _table(found: Facts, runs: Sequence[int], settings: set[str]) -> Iterator[str]:
    """The lines of some runs, a column each."""

    def line(name: str, cells: Sequence[str]) -> str:
        return (_cut(name, _NAME - 1).ljust(_NAME) + "".join(cell.rjust(_CELL) for cell in cells)).rstrip()

    def of(values: Sequence[Any]) -> list[Any]:
        return [values[run] for run in runs]

    facts = of(found["runs"])
    yield line("", [_letter(run) for run in runs])
    for name in found["differing"]:
        if name in settings:
            yield line(name, [_said(value) for value in of(found["differing"][name])])
    for split in dict.fromkeys(split for run in found["runs"] for split in run["rows"]):
        yield line(f"{split} rows", [_whole(run["rows"].get(split)) for run in facts])
    for name, metric in found["metrics"].items():
        stars = ["*" if run in metric["best"] else " " for run in runs]
        values = of(metric["values"])
        yield line(name, [f"{_four(value)}{star}" for value, star in zip(values, stars, strict=True)])
        if any(of(metric["intervals"])):
            yield line("  95 %", [_range(interval) for interval in of(metric["intervals"])])
    steps = dict.fromkeys(step for run in found["runs"] for step in run["seconds"])
    for step in steps:
        yield line(f"{step}, s", [_seconds(run["seconds"].get(step)) for run in facts])


def _letter(place: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return (_letter(place // 26 - 1) if place >= 26 else "") + chr(ord("A") + place % 26)


def _said(value: Any) -> str:
    if value is None:
        return "-"
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:.6g}"
        if isinstance(value, float)
        else str(value)
    )


def _four(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _range(interval: Sequence[float] | None) -> str:
    return "" if not interval or None in interval else f"{interval[0]:.3f}-{interval[1]:.3f} "


def _whole(value: int | None) -> str:
    return "- " if value is None else f"{value:,} "


def _seconds(value: float | None) -> str:
    return "- " if value is None else f"{value:,.1f} "


def _cut(text: str, most: int, tail: bool = False) -> str:
    """A text on one line of at most so many characters: its head, or its tail."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    return "..." + text[3 - most :] if tail else text[: most - 3] + "..."


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, _WIDTH)
