"""What explore found, for people: text of 80 columns that needs no colour, or one page. Knows nothing of models."""

import json
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH = 80
_SHADES = " ░▒▓█"
_MOST = 32  # lines of a list
_SQUARE = 20  # tokens of a map
_LABEL = 12  # columns of a token before numbers
_LAYERS = 13  # columns of layers
_PICTURE = 24  # lines of a picture of the positions

Found = dict[str, Any]


def lines(found: Found) -> Iterator[str]:
    """The lines of what `explore` found."""
    yield from _wrapped(f"{found['model']} looks at:")
    for text in found["texts"]:
        yield from _wrapped(_clean(text), "  ")
    for note in found["notes"]:
        yield from _wrapped(f"Note: {note}")
    for name, shown in _SECTIONS.items():
        if found.get(name):
            yield ""
            yield f"{name.upper()} {'─' * (WIDTH - len(name) - 1)}"
            yield from _wrapped(found["about"][name])
            yield from shown(found[name], found)


def vocabulary_lines(found: Found) -> Iterator[str]:
    """The lines of ids and their tokens."""
    for token in found["ids"]:
        yield _cut(f"{token['id']:>8}  {_clean(token['token'])}")


def page(plain: Found) -> bytes:
    """One self-contained HTML page of what `explore` found, as lists: the page of `bertray serve` draws it too."""

    def read(*path: str) -> str:
        return resources.files("bertray").joinpath(*path).read_text(encoding="utf-8")

    style = read("static", "style.css") + read("static", "explore.css")
    code = "".join(re.sub("^import .*\n", "", read("static", name), flags=re.M) for name in ("make.js", "explore.js"))
    data = json.dumps(plain, ensure_ascii=False).replace("<", "\\u003c")  # a text may hold </script>
    text = read("templates", "explore.html")
    for mark, part in (("STYLE", style), ("CODE", code), ("DATA", data)):
        text = text.replace(f"<!--{mark}-->", part, 1)
    return text.encode()


# --- sections ---------------------------------------------------------------------------------------------


def _tokens(tokens: Found, found: Found) -> Iterator[str]:
    yield ""
    yield "place  token                    id  type  mask  position  characters"
    yield from _some(tokens["tokens"], _token)
    several = [word for word in tokens["words"] if len(word["pieces"]) > 1]
    yield from _listed("In pieces", [_clean(f"{word['read_as']} = {' '.join(word['pieces'])}") for word in several])
    changed = [f"{_clean(word['text'])} as {_clean(word['read_as'])}" for word in tokens["changed"]]
    yield from _listed("Read otherwise", changed)
    yield from _listed("Not in the vocabulary", [_clean(word["text"]) for word in tokens["unknown"]])
    yield from _listed("Dropped", [f"{_clean(run['text'])} at {run['start']}" for run in tokens["dropped"]])


def _token(token: Found) -> str:
    span = "" if token["start"] is None else f"{token['start']}-{token['stop']}"
    return (
        f"{token['place']:>5}  {_fit(token['token'], 18)}  {token['id']:>7}  {token['type']:>4}  "
        f"{token['mask']:>4}  {token['position']:>8}  {span}"
    ).rstrip()


def _tables(tables: Found, found: Found) -> Iterator[str]:
    for kind in ("token", "position", "type"):
        if table := tables[kind]:
            yield ""
            yield _cut(f"{kind} table {table['shape']}: {table['name']}, first numbers")
            for row, values in enumerate(table["values"]):
                yield _numbers(f"  row {row}", values, "{:>9.4f}", 7)
    given = tables["input"]
    names = _names(found, len(given["sum"]))
    kinds = [kind for kind in ("token", "position", "type", "sum", "normalized") if kind in given]
    place = min(1, len(given["sum"]) - 1)
    yield ""
    yield from _wrapped(f"How they add up for {names[place]}, first numbers:")
    signs = {kind: "+" for kind in kinds} | {kinds[0]: " ", "sum": "=", "normalized": ">"}
    for kind in kinds:
        yield _numbers(f"  {signs[kind]} {kind}", given[kind][place], "{:>9.4f}", 6, 16)
    yield ""
    yield "Lengths (norms) of those vectors:"
    yield " " * _LABEL + "".join(f"{kind:>12}" for kind in kinds)
    norms = np.stack([given["norms"][kind] for kind in kinds], 1)
    yield from _some(
        range(len(norms)), lambda row: _fit(names[row], _LABEL) + "".join(f"{norm:>12.3f}" for norm in norms[row])
    )
    if tables["neighbours"]:
        yield ""
        yield "Nearest in the token table (cosine):"
    yield from _some(tables["neighbours"], _neighbour)
    if positions := tables["positions"]:
        first, last = positions["places"][0], positions["places"][-1]
        yield ""
        yield from _wrapped(f"Positions {first} to {last} of their table beside one another, by cosine: {_scale()}")
        yield from _picture(np.asarray(positions["cosine"]))


def _neighbour(token: Found) -> str:
    near = ", ".join(f"{_clean(other['token'])} {other['cosine']:.2f}" for other in token["nearest"])
    return _cut(f"{_fit(token['token'], _LABEL)}  {near}")


def _architecture(built: Found, found: Found) -> Iterator[str]:
    yield ""
    yield from _wrapped(
        f"{built['type']}: {built['layers']} layers, {built['width']} wide ({built['inner']} inside), with "
        f"{built['heads']} attention heads each; a vocabulary of {built['vocabulary']:,} tokens; numbers in "
        f"{built['kind']}."
    )
    yield ""
    yield f"{'':<{WIDTH - 14}}{'parameters':>14}"
    tree = built["tree"]
    for place, line in enumerate(tree):
        shapes = "  ".join(f"{name} {shape}".strip() for name, shape in line["shapes"].items())
        name = f"{_branch(tree, place)}{line['name']}"
        left = _cut(f"{name}  {shapes}" if shapes else name, WIDTH - 15)
        yield f"{left:<{WIDTH - 14}}{line['parameters']:>14,}"
    yield f"{'frozen':<{WIDTH - 14}}{built['frozen']:>14,}"
    head = built["trained"]
    named = f"trained: a head {head['shape']} and its bias" if head else "trained: nothing before a head is fitted"
    yield f"{named:<{WIDTH - 14}}{head['parameters'] if head else 0:>14,}"


def _outputs(outputs: Found, found: Found) -> Iterator[str]:
    values = outputs["last_hidden_state"]["values"]
    names = _names(found, len(values))
    yield ""
    yield f"last_hidden_state {outputs['last_hidden_state']['shape']}, first numbers of each token's vector"
    yield from _some(
        range(len(values)), lambda row: _numbers(_fit(names[row], _LABEL), values[row], "{:>6.2f}", 11, _LABEL)
    )
    yield ""
    if pooled := outputs["pooler_output"]:
        yield _cut(f"pooler_output {pooled['shape']}: tanh(dense({names[0]})), first numbers")
        yield _numbers("", pooled["values"], "{:>8.4f}", 9, 0)
        yield ""
    yield f"{'pooled by':<{_LABEL}}{'norm':>8}   first numbers"
    for pooling in outputs["poolings"]:
        label = f"{pooling['name']:<{_LABEL}}{pooling['norm']:>8.2f}  "
        yield _numbers(label, pooling["values"], "{:>7.3f}", 8, len(label))
    if outputs["cosine"] is not None and len(names) <= _SQUARE:
        yield from _square("Cosines of tokens behind the last layer, in hundredths", outputs["cosine"][-1], names)
    if outputs["attention"] is not None and len(names) <= _SQUARE:
        title = "Attention in the last layer, mean of its heads, in percent: from each row to its columns"
        yield from _square(title, outputs["attention"][-1].mean(0), names)
    if len(names) > _SQUARE and outputs["cosine"] is not None:
        yield ""
        yield from _wrapped("Maps of token by token are on the page (--html FILE).")
    yield ""
    yield "How far each token has moved: cosine to what the first layer was given"
    yield from _layers(names, np.asarray(outputs["movement"]["from_first"]).T)
    if outputs["same_words"]:
        yield ""
        yield "The same word in both texts, each read by itself: cosine behind each layer"
        yield from _layers(
            [word["word"] for word in outputs["same_words"]], [w["cosine"] for w in outputs["same_words"]]
        )


def _pretraining(tasks: Found, found: Found) -> Iterator[str]:
    tokens = found.get("tokens", {}).get("tokens")
    masked, follows = tasks["masked"], tasks["follows"]
    yield ""
    if masked["why_not"]:
        yield from _wrapped(f"Masked words: {masked['why_not']}")
    for fill in masked["fills"]:
        around = ""
        if tokens:
            near = tokens[max(0, fill["place"] - 3) : fill["place"] + 4]
            around = f" ({' '.join(_clean(token['token']) for token in near)})"
        yield _cut(f"Token {fill['place']}{around} is probably:")
        for candidate in fill["candidates"]:
            yield f"  {_fit(candidate['token'], 20)} {_bar(candidate['probability'])}"
    if follows["why_not"]:
        yield from _wrapped(f"Next sentence: {follows['why_not']}")
    else:
        yield f"  {'the second text follows'} {_bar(follows['probability'])}"


def _prediction(prediction: Found, found: Found) -> Iterator[str]:
    yield ""
    yield from _wrapped(f"{prediction['bundle']}: {_clean(prediction['told'])}")
    if prediction["why_not"]:
        yield from _wrapped(prediction["why_not"])
        return
    shown = "{:.4f}".format if prediction["problem"] == "regression" else _bar
    yield from _some(prediction["scores"], lambda each: f"  {_fit(each['label'], 24)} {shown(each['score'])}")
    label = _clean(prediction["explained"])
    for title, name, key in (
        (f"By how much {label} falls without each word (occlusion)", "words", "text"),
        (f"What each token gives {label} (gradient times input)", "tokens", "token"),
    ):
        yield ""
        yield from _wrapped(title)
        yield from _signed(prediction[name], key)
    yield ""
    if prediction["why_no_nearest"]:
        yield from _wrapped(f"Nearest training texts: {prediction['why_no_nearest']}")
        return
    yield "Nearest training texts (cosine, label, text):"
    for row in prediction["nearest"]:
        text = " / ".join(filter(None, (row["text"], row.get("text_pair"))))
        yield _cut(f"  {row['cosine']:.3f}  {_fit(str(row['label']), 12)}  {_clean(text)}")


_SECTIONS: dict[str, Callable[[Any, Found], Iterator[str]]] = {
    "tokens": _tokens,
    "tables": _tables,
    "architecture": _architecture,
    "outputs": _outputs,
    "pretraining": _pretraining,
    "prediction": _prediction,
}


# --- parts ------------------------------------------------------------------------------------------------


def _square(title: str, values: NDArray[np.float32], names: Sequence[str]) -> Iterator[str]:
    """A map of token by token, of numbers below 1 as hundredths."""
    yield ""
    yield from _wrapped(title)
    yield " " * _LABEL + "".join(f"{place:>3}" for place in range(len(names)))
    for place, row in enumerate(np.asarray(values)):
        cells = "".join("  *" if value > 0.995 else f"{round(100 * value):>3}" for value in row.tolist())
        yield _fit(f"{place} {names[place]}", _LABEL) + cells
    yield "  * is 100"


def _layers(names: Sequence[str], rows: Any) -> Iterator[str]:
    """A line a name, a column a layer, or every few."""
    rows = np.asarray(rows)
    step = -(-rows.shape[1] // _LAYERS)
    chosen = list(range(rows.shape[1] - 1, -1, -step))[::-1]
    yield "layer".ljust(_LABEL) + "".join(f"{layer:>5}" for layer in chosen)
    yield from _some(
        range(len(names)), lambda row: _fit(names[row], _LABEL) + "".join(f"{rows[row, i]:>5.2f}" for i in chosen)
    )


def _picture(values: NDArray[Any]) -> Iterator[str]:
    """Cosines as shades, two columns a cell."""
    chosen = np.linspace(0, len(values) - 1, min(_PICTURE, len(values))).round().astype(int)
    for row in values[np.ix_(chosen, chosen)]:
        shades = (np.clip(row, 0, 0.999) * len(_SHADES)).astype(int)
        yield ("  " + "".join(_SHADES[shade] * 2 for shade in shades)).rstrip()


def _scale() -> str:
    return ", ".join(f"{shade * 2} from {i / len(_SHADES):.1f}" for i, shade in enumerate(_SHADES) if i)


def _signed(rows: Sequence[Found], key: str) -> Iterator[str]:
    """Weights as bars to the left and to the right."""
    most = max((abs(row["weight"]) for row in rows), default=0) or 1
    half = 20

    def line(row: Found) -> str:
        length = round(half * abs(row["weight"]) / most)
        left, right = ("█" * length, "") if row["weight"] < 0 else ("", "█" * length)
        return f"  {_fit(row[key], 20)} {row['weight']:>+8.4f} {left:>{half}}│{right}".rstrip()

    yield from _some(rows, line)


def _bar(share: float) -> str:
    return f"{share:>6.3f} {'█' * round(30 * share)}".rstrip()


def _numbers(label: str, values: Iterable[float], form: str, most: int, width: int = 8) -> str:
    shown = [form.format(value) for value in list(values)[:most]]
    return _cut(f"{label:<{width}}{''.join(shown)}")


def _branch(tree: Sequence[Found], place: int) -> str:
    """The lines before a name in a tree."""
    depth = tree[place]["depth"]
    if not depth:
        return ""
    marks = []
    for level in range(1, depth + 1):
        behind = next((line["depth"] for line in tree[place + 1 :] if line["depth"] <= level), 0)
        marks.append(("├─ " if behind == level else "└─ ") if level == depth else ("│  " if behind == level else "   "))
    return "".join(marks)


def _listed(title: str, given: Iterable[str]) -> Iterator[str]:
    items = list(dict.fromkeys(given))
    if items:
        more = f", and {len(items) - _MOST:,} more" if len(items) > _MOST else ""
        yield ""
        yield from _wrapped(f"{title}: {'; '.join(items[:_MOST])}{more}")


def _names(found: Found, count: int) -> list[str]:
    """What so many tokens are called: their places, where tokens are not shown."""
    tokens = found.get("tokens", {}).get("tokens")
    return [_clean(token["token"]) for token in tokens] if tokens else list(map(str, range(count)))


def _some(items: Sequence[Any], line: Callable[[Any], str]) -> Iterator[str]:
    """A line each of the first items, and one that says how many more there are."""
    yield from map(line, items[:_MOST])
    if len(items) > _MOST:
        yield f"... and {len(items) - _MOST:,} more (--json has all)"


def _clean(text: str) -> str:
    """A text without what would move the cursor: it may be anybody's."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _cut(text: str, width: int = WIDTH) -> str:
    """A line of at most so many columns."""
    if sum(map(_columns, text)) <= width:
        return text
    shown, used = "", 0
    for char in text:
        used += _columns(char)
        if used > width - 1:
            break
        shown += char
    return f"{shown}…"


def _fit(text: str, width: int) -> str:
    """A text in exactly so many columns."""
    shown = _cut(_clean(text), width - 1)
    return shown + " " * (width - sum(map(_columns, shown)))


def _wrapped(text: str, indent: str = "") -> list[str]:
    """A text in lines: of words, and where those are too long, or have none, of columns."""
    lines = []
    for line in textwrap.wrap(text, WIDTH - len(indent)) or [""]:
        while (short := _cut(line, WIDTH - len(indent))) != line:
            lines.append(indent + short[:-1])
            line = line[len(short) - 1 :]
        lines.append(indent + line)
    return lines
