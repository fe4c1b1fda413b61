"""Bad and odd input: each kind gives the right rows and rejects, or one clear line, and never loses a row silently."""

import bz2
import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from bertray.errors import SourceError
from bertray.sources import Columns, Reader, units
from bertray.spec import Source

pytestmark = pytest.mark.timeout(60)
TEXT = Columns("text")
LABELLED = Columns("text", label="label")
ALL = Columns("text", "pair", "label", "id")

ODD_TEXTS = [
    "",
    " \t ",
    "\x00",
    "a\x00b\x07\x1b[31m\x7f",
    "nel\x85line\u2028paragraph\u2029separator",
    "\ufefffeff \ufeff inside",
    "\u200bzero\u200dwidth\u2060",
    "👩‍👩‍👧‍👦🏳️‍🌈 😀",
    "مرحبا \u202eright to left\u202c שלום",
    "e\u0301 is not \u00e9",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f" * 20,
    "\ufffe\uffff\U0010ffff\ue000",
    "漢字かな交じり文",
    "a\rb\r\nc\nd\te",
    "\"'`\\,;|{}[]",
    "=cmd|' /C calc'!A0",
    "NaN",
    "null",
    "x" * 20_000,
    "[CLS] [SEP] [MASK] [PAD] [UNK]",
]


def lines(*records):
    """JSON Lines: strings and bytes as they are, all else as JSON."""
    raw = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    return b"\n".join(raw) + b"\n"


def good(text="good", label="x"):
    return {"text": text, "label": label}


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, columns=TEXT, unit_rows="auto", **source):
    """Texts, labels and rejects of all units, having checked that together they are all rows that were counted."""
    cut = units(Source(path=str(path), **source), columns, unit_rows)
    batches = [Reader(columns).read(unit) for unit in cut]
    for unit, batch in zip(cut, batches, strict=True):
        assert batch.rows.num_rows + batch.rejects.num_rows == unit.stop - unit.start
        assert None not in batch.rows["text"].to_pylist() + batch.rejects["reason"].to_pylist()
        json.dumps(batch.rejects.to_pylist(), ensure_ascii=False).encode()  # as the store writes them
    rows = pa.concat_tables([batch.rows for batch in batches])
    return rows, [reject for batch in batches for reject in batch.rejects.to_pylist()]


def refused(path, message, columns=TEXT, **source):
    with pytest.raises(SourceError, match=message) as caught:
        read(path, columns, **source)
    assert "\n" not in str(caught.value)


NO_JSON = "line is not JSON: "
# What stands between two good records: the reason why it is set aside, and the preview where it is not the line.
BAD_LINES = {
    "not JSON": (b"what is this", f"{NO_JSON}Expecting value", None),
    "cut short": (b'{"text": "a", "la', f"{NO_JSON}Unterminated string starting", None),
    "single quotes": (b"{'text': 'a'}", f"{NO_JSON}Expecting property name enclosed in double quotes", None),
    "two records": (b'{"text": "a"}{"text": "b"}', f"{NO_JSON}Extra data", None),
    "trailing comma": (b'{"text": "a",}', f"{NO_JSON}Expecting property name enclosed in double quotes", None),
    "control character": (b'{"text": "a\x01"}', f"{NO_JSON}Invalid control character", None),
    "bad escape": (b'{"text": "\\q"}', f"{NO_JSON}Invalid \\escape", None),
    "a comment": (b"// rows", f"{NO_JSON}Expecting value", None),
    "U+0085 alone": ("\x85".encode(), f"{NO_JSON}Expecting value", None),
    "NUL bytes": (b"\x00\x00\x00\x00", f"{NO_JSON}Expecting value", None),
    "too many digits": (b'{"text": %s}' % (b"9" * 5000), f"{NO_JSON}a number has too many digits", None),
    "not UTF-8": (b'{"text": "caf\xe9"}', "line is not UTF-8", '{"text": "caf\ufffd"}'),
    "surrogate bytes": (b'{"text": "\xed\xa0\x80"}', "line is not UTF-8", '{"text": "\ufffd\ufffd\ufffd"}'),
    "nested too deeply": (b"[" * 100_000, "line is nested too deeply", None),
    "a list": (b'["a", "x"]', "record is not an object", None),
    "a string": (b'"a"', "record is not an object", "a"),
    "a number": (b"5", "record is not an object", None),
    "null": (b"null", "record is not an object", None),
    "blank": (b"", "text is null", None),
    "spaces": (b" \t ", "text is null", ""),
    "an empty object": (b"{}", "text is null", ""),
    "null text": (b'{"text": null, "label": "x"}', "text is null", ""),
    "NaN text": (b'{"text": NaN, "label": "x"}', "text is null", ""),
    "list as text": (b'{"text": ["a", 1], "label": "x"}', "text is a list", '["a", 1]'),
    "object as text": (b'{"text": {"a": "b"}, "label": "x"}', "text is an object", '{"a": "b"}'),
    "boolean as text": (b'{"text": true, "label": "x"}', "text is a boolean", "true"),
    "half a character in text": (
        b'{"text": "a\\ud800", "label": "x"}',
        "text holds half a character (a lone surrogate)",
        "a\\ud800",
    ),
    "half a character in label": (
        b'{"text": "a", "label": "\\udc00"}',
        "label holds half a character (a lone surrogate)",
        "a",
    ),
    "null label": (b'{"text": "a", "label": null}', "label is null", "a"),
    "no label": (b'{"text": "a"}', "label is null", "a"),
    "list as label": (b'{"text": "a", "label": ["x"]}', "label is a list", "a"),
    "object as label": (b'{"text": "a", "label": {}}', "label is an object", "a"),
    "fraction as label": (b'{"text": "a", "label": 0.5}', "label is not a whole number", "a"),
    "infinite label": (b'{"text": "a", "label": -Infinity}', "label is not a whole number", "a"),
    "label over all floats": (b'{"text": "a", "label": 1e400}', "label is not a whole number", "a"),
    "NaN label": (b'{"text": "a", "label": NaN}', "label is null", "a"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_set_aside_and_those_around_it_are_kept(tmp_path, kind):
    line, reason, preview = BAD_LINES[kind]
    preview = line[:80].decode() if preview is None else preview
    path = put(tmp_path, "rows.jsonl", lines(good("before"), line, good("behind")))
    for unit_rows in ("auto", 2):
        rows, rejects = read(path, LABELLED, unit_rows)
        assert rows["text"].to_pylist() == ["before", "behind"]
        assert rows["id"].to_pylist() == ["rows.jsonl:0", "rows.jsonl:2"]
        assert rejects == [{"id": "rows.jsonl:1", "reason": reason, "preview": preview}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"text": "a", "pair": ["b"], "label": 1, "id": "i"}', "text_pair is a list"),
        ('{"text": "a", "pair": "\\ud800", "label": 1, "id": "i"}', "text_pair holds half a character"),
        ('{"text": "a", "pair": null, "label": 1, "id": "i"}', "text_pair is null"),
        ('{"text": "a", "pair": "b", "label": 1, "id": ["i"]}', "id is a list"),
        ('{"text": "a", "pair": "b", "label": 1, "id": "\\ud800"}', "id holds half a character"),
        ('{"text": "a", "pair": "b", "label": 1, "id": 1.5}', "id is not a whole number"),
        ('{"text": ["a"], "pair": true, "label": [], "id": {}}', "text is a list"),  # the first of several
    ],
)
def test_every_column_has_its_reasons(tmp_path, record, reason):
    fine = {"text": "a", "pair": "b", "label": 1, "id": "fine"}
    rows, rejects = read(put(tmp_path, "rows.jsonl", lines(fine, record)), ALL)
    assert rows.to_pylist() == [{"id": "fine", "text": "a", "text_pair": "b", "label": "1"}]
    assert len(rejects) == 1 and rejects[0]["reason"].startswith(reason)


ARRAYS = {
    "not objects": (b'[{"text": "a"}, 5, [1], null, {"text": "b"}]', ["a", "b"], ["record is not an object"] * 3),
    "deep": (
        b'[{"text": "a"}, {"text": %s1%s}, {"text": "b"}]' % (b"[" * 50_000, b"]" * 50_000),
        ["a", "b"],
        ["record is nested too deeply"],
    ),
    "digits": (
        b'[{"text": "a"}, {"x": %s}, {"text": "b"}]' % (b"9" * 5000),
        ["a", "b"],
        ["record is not JSON: a number has too many digits"],
    ),
    "escape": (
        b'[{"text": "a"}, {"text": "\\q]}["}, {"text": "b"}]',
        ["a", "b"],
        ["record is not JSON: Invalid \\escape"],
    ),
    "surrogate": (
        b'[{"text": "a"}, {"text": "\\ud800"}]',
        ["a"],
        ["text holds half a character (a lone surrogate)"],
    ),
    "not UTF-8": (
        b'[{"text": "a\xe9"}, {"text": "b", "other": "\xe9"}, {"text": "\\udc00"}]',
        ["b"],
        ["text is not UTF-8", "text holds half a character (a lone surrogate)"],
    ),
    "NaN": (b'[{"text": "a"}, {"text": NaN}]', ["a"], ["text is null"]),
    "duplicate keys": (b'[{"text": "a", "text": "b"}]', ["b"], []),
    "mixed": (b'[{"text": "a"}, {"text": 5}, {"text": 2.5}, {"text": {}}]', ["a", "5", "2.5"], ["text is an object"]),
    "spaces": (b' \n [ \n {"text":"a"} \r\n , {"text":"b"}\n]\n \n', ["a", "b"], []),
    "half a character that is whole": (b'[{"text": "\\ud83d\\ude00"}]', ["😀"], []),
    "a byte order mark": (b'\xef\xbb\xbf[{"text": "\xef\xbb\xbfa"}]', ["\ufeffa"], []),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_json(tmp_path, kind, monkeypatch):
    content, texts, reasons = ARRAYS[kind]
    path = put(tmp_path, "rows.json", content)
    for piece in (1 << 20, 7):  # also where pieces of the file end anywhere
        monkeypatch.setattr("bertray.formats._PIECE", piece)
        rows, rejects = read(path)
        assert rows["text"].to_pylist() == texts
        assert [reject["reason"] for reject in rejects] == reasons


OF_FIVE = "text,label\n" + "".join(f"t{i},{i}\n" for i in range(5))
# Files that are read whole: columns, content, the texts they hold and the reasons of what is set aside.
WHOLE = {
    "bom.csv": (LABELLED, "\ufefftext,label\na,x\n", ["a"], []),
    "bom.jsonl": (LABELLED, b"\xef\xbb\xbf" + lines(good("a"), good("\ufeffb")), ["a", "\ufeffb"], []),
    "boms-inside.jsonl": (LABELLED, lines(good("a")) + b"\xef\xbb\xbf" + lines(good("b")), ["a", "b"], []),
    "bom.txt": (TEXT, b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "\ufeffb"], []),
    "latin.txt": (TEXT, b"a\ncaf\xe9\n\xff\xfe\nb", ["a", "b"], ["text is not UTF-8"] * 2),
    "bom.tsv": (TEXT, "\ufefftext\tlabel\na\tb\n", ["a"], []),
    "crlf.csv": (LABELLED, OF_FIVE.replace("\n", "\r\n"), [f"t{i}" for i in range(5)], []),
    "lone-cr.csv": (LABELLED, OF_FIVE.replace("\n", "\r"), [f"t{i}" for i in range(5)], []),
    "no-newline-at-the-end.csv": (LABELLED, OF_FIVE[:-1], [f"t{i}" for i in range(5)], []),
    "quoted.csv": (LABELLED, 'text,label\n"a\nb, ""c""\r\n",x\n', ['a\nb, "c"\r\n'], []),
    "inner-quote.csv": (LABELLED, 'text,label\na"b,x\n', ['a"b'], []),
    "quoted.tsv": (LABELLED, 'text\tlabel\n"a\tb"\tx\nc,d\tx\n', ["a\tb", "c,d"], []),
    "nul.csv": (LABELLED, "text,label\na\x00b,x\n", ["a\x00b"], []),
    "blank-lines.csv": (LABELLED, "text,label\n\na,x\n\n", ["a"], []),
    "empty-fields.csv": (LABELLED, "text,label\n,x\na,\n", [""], ["label is null"]),
    "latin-in-another-column.csv": (LABELLED, b"text,label,other\na,x,\xe9\n", ["a"], []),
    "other-columns-twice.csv": (TEXT, "text,b,b\na,1,2\n", ["a"], []),
    "wide.csv": (
        LABELLED,
        ",".join(["text", "label", *(f"c{i}" for i in range(5000))]) + "\na,x" + ",1" * 5000 + "\n",
        ["a"],
        [],
    ),
    "wide.jsonl": (LABELLED, lines({**{f"c{i}": i for i in range(5000)}, **good("a")}), ["a"], []),
    "wide.parquet": (
        LABELLED,
        pa.table({**{f"c{i}": [1] for i in range(2000)}, "text": ["a"], "label": [1]}),
        ["a"],
        [],
    ),
    "one-word.txt": (TEXT, "x" * 5_000_000, ["x" * 5_000_000], []),
    "one-word.jsonl": (LABELLED, lines(good("x" * 5_000_000)), ["x" * 5_000_000], []),
    "one-word.csv": (LABELLED, "text,label\n" + "x" * 5_000_000 + ",1\n", ["x" * 5_000_000], []),
    "separators.jsonl": (
        LABELLED,
        '{"text": "nel\x85ps\u2028", "label": 1}\n{"text": "\u2029\x0b\x0c"\r, "label": 1}\r\n'.replace("\x0b\x0c", ""),
        ["nel\x85ps\u2028", "\u2029"],
        [],
    ),
    "duplicate-keys.jsonl": (LABELLED, '{"text": "a", "text": "b", "label": 1}\n', ["b"], []),
    "two-members.jsonl.gz": (
        LABELLED,
        gzip.compress(lines(good("a"))) + gzip.compress(lines(good("b"))),
        ["a", "b"],
        [],
    ),
    "numbers.jsonl": (
        LABELLED,
        lines(good(5), good("a"), good(2.0), good(10**30)),
        ["5", "a", "2", "1" + "0" * 30],
        [],
    ),
    "large.parquet": (TEXT, pa.table({"text": pa.array(["a", None], pa.large_string())}), ["a"], ["text is null"]),
    "view.parquet": (TEXT, pa.table({"text": pa.array(["a"], pa.string_view())}), ["a"], []),
    "dictionary.parquet": (
        LABELLED,
        pa.table({c: pa.array(["a", None, "b"]).dictionary_encode() for c in ("text", "label")}),
        ["a", "b"],
        ["text is null"],
    ),
    "floats.parquet": (
        LABELLED,
        pa.table({"text": list("abcdef"), "label": [1.0, float("nan"), None, 0.5, float("inf"), 1e300]}),
        ["a"],
        ["label is null"] * 2 + ["label is not a whole number"] * 3,
    ),
    "small-floats.parquet": (LABELLED, pa.table({"text": ["a"], "label": pa.array([2.0], pa.float32())}), ["a"], []),
    "booleans.parquet": (LABELLED, pa.table({"text": ["a", "b"], "label": [True, None]}), ["a"], ["label is null"]),
    "large-numbers.parquet": (
        LABELLED,
        pa.table({"text": ["a"], "label": pa.array([2**64 - 1], pa.uint64())}),
        ["a"],
        [],
    ),
    "nested-beside.parquet": (TEXT, pa.table({"text": ["a"], "other": [{"b": [{"c": 1}]}]}), ["a"], []),
}


@pytest.mark.parametrize("name", WHOLE)
def test_odd_files_that_hold_rows(tmp_path, name):
    columns, content, texts, reasons = WHOLE[name]
    rows, rejects = read(put(tmp_path, name, content), columns)
    assert rows["text"].to_pylist() == texts
    assert [reject["reason"] for reject in rejects] == reasons


def arrow(kind):
    """The bytes of an Arrow file or stream of two batches."""
    sink, table = pa.BufferOutputStream(), pa.table({"text": ["a" * 1000] * 50})
    with kind(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=25)
    return sink.getvalue().to_pybytes()


MANY = b"text,label\n" + b"a long enough row to be compressed,1\n" * 9000
# Files that cannot be read to their end, or not as the spec says: one line that names the file.
REFUSED = {
    "utf-16.csv": (LABELLED, OF_FIVE.encode("utf-16"), "utf-16.csv is UTF-16 text. Convert it"),
    "utf-16.jsonl": (LABELLED, lines(good()).decode().encode("utf-16"), "utf-16.jsonl is UTF-16 text. Convert it"),
    "utf-16.txt": (TEXT, "a\nb\n".encode("utf-16"), "utf-16.txt is UTF-16 text. Convert it"),
    "utf-16.json": (TEXT, '[{"text": "a"}]'.encode("utf-16"), "utf-16.json is UTF-16 text. Convert it"),
    "latin.csv": (LABELLED, b"text,label\n" + b"a,x\n" * 500 + b"\xe9,x\n", "latin.csv cannot be read: .*UTF8"),
    "latin.json": (TEXT, b'[{"text": "\xe9"}]', "latin.json:1: text is not UTF-8"),
    "open-quote.csv": (LABELLED, OF_FIVE + '"a,1\nb,2\n', "open-quote.csv cannot be read: .*Expected 2 columns"),
    "ragged.csv": (LABELLED, OF_FIVE + "a,b,c\n", "ragged.csv cannot be read: .*Expected 2 columns, got 3"),
    "short-row.csv": (LABELLED, OF_FIVE + "a\n", "short-row.csv cannot be read: .*Expected 2 columns, got 1"),
    "no-header.csv": (LABELLED, "good day,1\nbad day,0\n", "has no column 'text'. It has: good day, 1"),
    "semicolons.csv": (LABELLED, "text;label\na;1\n", "has no column 'text'. It has: text;label"),
    "twice.csv": (LABELLED, "text,text,label\na,b,x\n", "several columns 'text'. Rename all but one"),
    "header-only.csv": (LABELLED, "text,label\n", "holds no rows"),
    "line-feeds.csv": (LABELLED, "\n\n\n", "line-feeds.csv"),
    "cut.csv.gz": (LABELLED, gzip.compress(MANY)[:-20], "cut.csv.gz cannot be read"),
    "cut.csv.zst": (LABELLED, pa.compress(MANY, "zstd", asbytes=True)[:-20], "cut.csv.zst cannot be read"),
    "cut.jsonl.bz2": (LABELLED, bz2.compress(lines(good()) * 9000)[:-20], "cut.jsonl.bz2 cannot be read"),
    "cut.txt.gz": (TEXT, gzip.compress(b"a\n" * 10_000_000, 1)[:-9], "cut.txt.gz cannot be read"),
    "no.csv.gz": (LABELLED, OF_FIVE, "no.csv.gz cannot be read"),
    "no.json.gz": (LABELLED, b'[{"text": "a"}]', "no.json.gz cannot be read"),
    "csv.parquet": (LABELLED, OF_FIVE, "csv.parquet cannot be read"),
    "empty.parquet": (LABELLED, "", "holds no rows"),
    "zero-rows.parquet": (
        LABELLED,
        pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}),
        "no rows",
    ),
    "no-label.parquet": (LABELLED, pa.table({"text": ["a"]}), "has no column 'label'. It has: text"),
    "lists.parquet": (
        LABELLED,
        pa.table({"text": [["a"]], "label": [1]}),
        "column 'text' must hold strings. It holds list",
    ),
    "structs.parquet": (LABELLED, pa.table({"text": [{"a": "b"}], "label": [1]}), "must hold strings. It holds struct"),
    "binary.parquet": (LABELLED, pa.table({"text": [b"a"], "label": [1]}), "must hold strings. It holds binary"),
    "ints.parquet": (LABELLED, pa.table({"text": [5], "label": [1]}), "must hold strings. It holds int64"),
    "times.parquet": (
        LABELLED,
        pa.table({"text": ["a"], "label": pa.array([0], pa.timestamp("s"))}),
        "column 'label' must hold strings or whole numbers. It holds timestamp",
    ),
    "fractions.parquet": (
        LABELLED,
        pa.table({"text": ["a"], "label": [0.5]}),
        "fractions.parquet:1: label is not a whole",
    ),
    "twice.parquet": (
        TEXT,
        pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]),
        "several columns 'text'",
    ),
    "cut.arrow": (TEXT, arrow(pa.ipc.new_file)[:-900], "cut.arrow cannot be read"),
    "cut-stream.arrow": (TEXT, arrow(pa.ipc.new_stream)[:-900], "cut-stream.arrow cannot be read"),
    "damaged.arrow": (TEXT, arrow(pa.ipc.new_file)[:600] + b"\xa5" * 600, "damaged.arrow cannot be read"),
    "cut.json": (TEXT, b'[{"text": "a"}, {"te', "cut.json: record 2 is not JSON"),
    "open.json": (TEXT, b'[{"text": "a"}, {"text": "b"}', "open.json: record 2 is not JSON: Expecting ',' delimiter"),
    "comma.json": (TEXT, b'[{"text": "a"},]', "comma.json: record 2 is not JSON: Expecting value"),
    "open-quote.json": (TEXT, b'[{"text": "a}, {"text": "b"}]', "open-quote.json: record 1 is not JSON"),
    "two.json": (TEXT, b'[{"text": "a"}]\n[{"text": "b"}]', "two.json is not JSON: something follows the array's end"),
    "brackets.json": (TEXT, b"[" * 100_000, "brackets.json: record 1 is nested too deeply"),
    "empty-array.json": (TEXT, b" [ ]", "holds no rows"),
    "pretty.json": (TEXT, json.dumps({"text": "a"}, indent=1), "pretty.json:1: line is not JSON"),
    "all-bad.jsonl": (LABELLED, b"oops\n" * 3, "all-bad.jsonl:1: line is not JSON: .* None of the first 3 rows"),
    "numbers.jsonl": (LABELLED, lines(good(1), good(2)), "numbers.jsonl:1: text is a number"),
    "booleans.jsonl": (LABELLED, lines(good(True)), "booleans.jsonl:1: text is a boolean"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(tmp_path, name):
    columns, content, message = REFUSED[name]
    path = put(tmp_path, name, content)
    refused(path, message, columns)


@pytest.mark.parametrize("damage", ["head", "middle", "tail"])
def test_damaged_parquet(tmp_path, damage):
    rng = np.random.default_rng(0)
    table = pa.table({"text": [rng.bytes(40).hex() for _ in range(20_000)], "label": [1] * 20_000})
    path = put(tmp_path, "rows.parquet", table)
    data = bytearray(path.read_bytes())
    place = {"head": 4, "middle": len(data) // 2, "tail": len(data) - 400}[damage]
    data[place : place + 300] = b"\xa5" * 300
    path.write_bytes(data)
    refused(path, "rows.parquet", LABELLED)


def test_ids_as_they_come(tmp_path):
    columns = Columns("text", id="id")
    ids = [1, 1, None, "", "a", True, 2.0, 10**25]
    rows, rejects = read(put(tmp_path, "rows.jsonl", lines(*({"text": "t", "id": i} for i in ids))), columns)
    assert rows["id"].to_pylist() == ["1", "1", "rows.jsonl:2", "", "a", "true", "2", "1" + "0" * 25]
    assert not rejects
    rows, _ = read(put(tmp_path, "rows.csv", "text,id\na,7\nb,\nc,7\n"), columns)
    assert rows["id"].to_pylist() == ["7", "rows.csv:1", "7"]
    rows, _ = read(put(tmp_path, "rows.parquet", pa.table({"text": ["a", "b"], "id": [7, None]})), columns)
    assert rows["id"].to_pylist() == ["7", "rows.parquet:1"]


def test_labels_of_every_kind_beside_each_other(tmp_path):
    labels = [1, "1", True, 2.0, 2.5, 10**25, "", " a ", None, [], {}]
    rows, rejects = read(put(tmp_path, "rows.jsonl", lines(*(good(label=label) for label in labels))), LABELLED)
    assert rows["label"].to_pylist() == ["1", "1", "true", "2", "1" + "0" * 25, "", " a "]
    reasons = ["label is not a whole number", "label is null", "label is a list", "label is an object"]
    assert [reject["reason"] for reject in rejects] == reasons
    rows, rejects = read(put(tmp_path, "more.jsonl", lines(good(label=1.5), good(label=True), good(label=1))), LABELLED)
    assert rows["label"].to_pylist() == ["true", "1"]  # and not 1, 1


def test_bytes_in_a_column_of_strings(tmp_path):
    offsets, data = np.array([0, 1, 2, 2], np.int32), b"\xffa"
    strings = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    rows, rejects = read(put(tmp_path, "rows.parquet", pa.table({"text": strings})))
    assert rows["text"].to_pylist() == ["a", ""]
    assert rejects == [{"id": "rows.parquet:0", "reason": "text is not UTF-8", "preview": ""}]


@pytest.mark.parametrize("format", ["parquet", "jsonl", "json"])
def test_bad_rows_far_from_the_start_of_a_large_unit(tmp_path, format):
    """Arrow reads them in several chunks."""
    labels = [float(i % 3) for i in range(19_000)]
    labels[9_000], labels[17_001] = 0.5, None
    table = pa.table({"text": [f"t{i}" for i in range(19_000)], "label": labels})
    contents = {
        "parquet": table,
        "jsonl": lines(*table.to_pylist()),
        "json": json.dumps(table.to_pylist(), indent=1),
    }
    rows, rejects = read(put(tmp_path, f"rows.{format}", contents[format]), LABELLED, 20_000)
    name = f"rows.{format}"
    assert rejects == [
        {"id": f"{name}:9000", "reason": "label is not a whole number", "preview": "t9000"},
        {"id": f"{name}:17001", "reason": "label is null", "preview": "t17001"},
    ]
    assert rows["text"].to_pylist() == [f"t{i}" for i in range(19_000) if i not in (9_000, 17_001)]
    assert set(rows["label"].to_pylist()) == {"0", "1", "2"}


def test_ten_million_rows_of_one_letter(tmp_path):
    path = put(tmp_path, "rows.txt", b"a\n" * 10_000_000)
    cut = units(Source(path=str(path), limit=25_000), TEXT)
    assert [(unit.start, unit.stop) for unit in cut] == [(0, 20_000), (20_000, 25_000)]
    assert Reader(TEXT).read(cut[1]).rows["text"].to_pylist() == ["a"] * 5000
    every = units(Source(path=str(path)), TEXT)
    assert len(every) == 500 and every[-1].stop == 10_000_000


def test_files_of_several_schemas(tmp_path):
    put(tmp_path / "types", "a.parquet", pa.table({"text": ["a"], "label": [1]}))
    put(tmp_path / "types", "b.parquet", pa.table({"label": ["1"], "text": ["b"], "more": [0]}))
    rows, _ = read(tmp_path / "types", LABELLED)
    assert rows.select(["text", "label"]).to_pylist() == [good("a", "1"), good("b", "1")]
    put(tmp_path / "types", "c.parquet", pa.table({"text": ["c"]}))
    refused(tmp_path / "types", "c.parquet has no column 'label'", LABELLED)
    put(tmp_path / "lines", "a.jsonl", lines(good()))
    put(tmp_path / "lines", "b.jsonl", lines({"text": "b"}))
    refused(tmp_path / "lines", "b.jsonl has no column 'label'. It has: text", LABELLED)


def test_a_file_of_nothing_but_blank_lines_among_others(tmp_path):
    put(tmp_path, "a.jsonl", lines(good()))
    put(tmp_path, "b.jsonl", b"\n{}\n")
    rows, rejects = read(tmp_path, LABELLED)
    assert rows["text"].to_pylist() == ["good"]
    assert [reject["id"] for reject in rejects] == ["b.jsonl:0", "b.jsonl:1"]


def test_empty_row_groups(tmp_path):
    with pq.ParquetWriter(tmp_path / "rows.parquet", pa.schema([("text", pa.string())])) as writer:
        for size in (0, 3, 0, 0, 2, 0):
            writer.write_table(pa.table({"text": pa.array(list("abcde")[:size], pa.string())}))
    assert read(tmp_path)[0]["text"].to_pylist() == list("abcab")


NAMES = [
    "with space.csv",
    "ünïcödé 漢字.csv",
    "a[1]*?.csv",
    "per%20cent.csv",
    "#hash.csv",
    "a:b.csv",
    "new\nline.csv",
    "'\".csv",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(tmp_path, name):
    path = put(tmp_path / "rows here", name, OF_FIVE)
    put(tmp_path / "rows here", "a1xx.csv", OF_FIVE)  # which the name taken as a glob would fit
    for place in (path, tmp_path / "gone" / ".." / "rows here" / name):
        rows, _ = read(place, LABELLED)
        assert rows["id"].to_pylist() == [f"{name}:{i}" for i in range(5)]
    assert len(read(tmp_path / "rows here", LABELLED)[0]) == 10


def test_places_that_are_no_files(tmp_path):
    put(tmp_path, "a.csv", OF_FIVE)
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "round.csv").symlink_to("round.csv")
    (tmp_path / "nowhere.csv").symlink_to("nothing.csv")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "pipe.csv", "pipe.csv does not exist, or no file fits it")
    refused("/dev/null", "/dev/null does not exist, or no file fits it")
    refused(tmp_path / "round.csv", "round.csv cannot be read")
    refused(tmp_path / "nowhere.csv", "nowhere.csv does not exist, or no file fits")
    refused(tmp_path / "a.csv" / "b.csv", "does not exist")
    refused(tmp_path / "empty", "empty does not exist, or no file fits")
    refused(tmp_path / "no*.csv", "does not exist, or no file fits")
    assert len(read(tmp_path, LABELLED)[0]) == 5  # in a folder they are passed over


def test_links_folders_and_hidden_files(tmp_path):
    put(tmp_path / "rows", "deep/a.csv", OF_FIVE)
    put(tmp_path / "rows", "named.csv/b.csv", OF_FIVE)
    put(tmp_path / "rows", ".hidden.csv", "no,such\n")
    put(tmp_path / "rows", "_SUCCESS", "")
    put(tmp_path / "rows", ".cache/c.csv", "no,such\n")
    (tmp_path / "rows" / "link.csv").symlink_to("deep/a.csv")
    (tmp_path / "rows" / "deep" / "back").symlink_to("..")  # round and round
    for name in "abc":
        (tmp_path / "rows" / "deep" / name).symlink_to(".")
    rows, _ = read(tmp_path / "rows", LABELLED)
    assert {i.rpartition(":")[0] for i in rows["id"].to_pylist()} == {"deep/a.csv", "link.csv", "named.csv/b.csv"}
    assert len(rows) == 15


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_that_may_not_be_read(tmp_path):
    path = put(tmp_path, "rows.csv", OF_FIVE)
    path.chmod(0)
    refused(path, "rows.csv cannot be read: .*Permission denied", LABELLED)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(lines(good()))


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_another(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    shutil.move(other, path)


@pytest.mark.parametrize("change", [grow, shrink, replace_by_another, Path.unlink])
@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet", "json"])
def test_a_file_that_changes_between_two_units(tmp_path, change, format):
    table = pa.table({"text": [f"t{i}" for i in range(5000)], "label": ["x"] * 5000})
    contents = {
        "jsonl": lines(*table.to_pylist()),
        "json": json.dumps(table.to_pylist()).encode(),
        "csv": table.to_pandas().to_csv(index=False).encode(),
        "parquet": table,
    }
    path = put(tmp_path, f"rows.{format}", contents[format])
    os.utime(path, (1, 1))
    cut, reader = units(Source(path=str(path)), LABELLED), Reader(LABELLED)
    assert reader.read(cut[0]).rows.num_rows == cut[0].stop
    change(path)
    for reading in (reader, Reader(LABELLED)):
        with pytest.raises(SourceError, match="has changed since this run looked at it. Run the command again."):
            reading.read(cut[1])


@pytest.mark.parametrize("format", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_odd_texts_are_not_altered(tmp_path, format):
    table = pa.table({"text": ODD_TEXTS, "label": ["x"] * len(ODD_TEXTS)})
    contents = {
        "jsonl": lines(*(json.dumps(row, ensure_ascii=False) for row in table.to_pylist())),
        "json": json.dumps(table.to_pylist(), ensure_ascii=False).encode(),
        "csv": table.to_pandas().to_csv(index=False, quoting=1).encode(),
        "tsv": table.to_pandas().to_csv(index=False, quoting=1, sep="\t").encode(),
        "parquet": table,
    }
    rows, rejects = read(put(tmp_path, f"rows.{format}", contents[format]), LABELLED, 3)
    assert rows["text"].to_pylist() == ODD_TEXTS
    assert not rejects


def test_odd_texts_have_finite_vectors(tiny):
    from bertray.checkpoints import find
    from bertray.encoder import Encoder
    from bertray.spec import Encoder as EncoderSpec

    encoder = Encoder(find(str(tiny)), EncoderSpec(pooling="mean", precision="fp32"))
    encoded = encoder.encode(ODD_TEXTS)
    assert encoded.vectors.shape == (len(ODD_TEXTS), 32)
    assert np.isfinite(encoded.vectors).all()
    assert (encoded.tokens >= 2).all() and (encoded.tokens <= 512).all()
    for i in (0, 3, len(ODD_TEXTS) - 1):
        np.testing.assert_allclose(encoder.encode([ODD_TEXTS[i]]).vectors[0], encoded.vectors[i], atol=1e-5)
