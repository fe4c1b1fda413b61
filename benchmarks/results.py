"""Results: tables in Markdown, and RESULTS.md, in which every benchmark keeps a section of its own."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
_TITLE = """# Results

Written by the scripts beside this file, each into its own section: `make bench` on a machine's CPUs,
`python -m benchmarks.engine --device cuda --write` on a GPU. Everything in one section was measured in one run on
the machine that the section names.
"""


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table that also reads well as plain text: the first column left, the others right."""
    cells = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *body = (_line(row, widths) for row in cells)
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([head, rule, *body])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"


def write(section: str, markdown: str, path: Path = RESULTS) -> None:
    """Put markdown in place of what the section held, or behind all others if there is none of that name yet."""
    text = path.read_text(encoding="utf-8") if path.exists() else _TITLE
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    block = f"{begin}\n{markdown.strip()}\n{end}"
    found = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", text, re.S)
    text = text[: found.start()] + block + text[found.end() :] if found else f"{text.rstrip()}\n\n{block}\n"
    path.write_text(text, encoding="utf-8")
