"""Bad and odd input of many kinds: each gives exactly the rows it holds, with what is set aside and why, or one line that
says what is wrong and where. Never a traceback, a hang or a silent loss."""

import bz2
import gzip
import io
import json
import os
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from bertray.checkpoints import find
from bertray.encoder import Encoder
from bertray.errors import BertrayError, SourceError
from bertray.sources import Columns, Reader, units
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import Source

# A line a kind reads better than five.
# ruff: noqa: E501

pytestmark = pytest.mark.timeout(60)
GOOD = {"text": "good", "label": 1}


def lines(*records):
    """JSON Lines: records as JSON, strings and bytes as they are."""
    parts = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    return b"".join(part + b"\n" for part in parts)


def parquet(groups=None, **columns):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=groups)
    return sink.getvalue()


def arrow(**columns):
    sink = io.BytesIO()
    pyarrow.feather.write_feather(pa.table(columns), sink)
    return sink.getvalue()


def unchecked(*values):
    """Strings of Arrow that nobody has checked to be UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


def kept(*texts, rejects=(), name="rows.jsonl", labels=None, ids=None):
    """A file that gives these texts, and rows set aside for these reasons."""
    return {"texts": list(texts), "rejects": list(rejects), "name": name, "labels": labels, "ids": ids}


def refused(pattern, name="rows.jsonl"):
    return {"error": pattern, "name": name}


NONE = "none of its first 1 rows can be used: "
ODD = {
    "control characters": "a\x01b\x02\x1b[31mred\x7f",
    "nul": "before\x00after",
    "next line": "one\x85two",
    "line and paragraph separators": "one\u2028two\u2029three",
    "byte order mark inside": "one\ufefftwo",
    "carriage return": "one\rtwo",
    "newlines": "one\n\ntwo\r\n",
    "spaces only": " \t\u00a0\u3000 ",
    "zero width": "z\u200be\u200dr\u2060o",
    "right to left": "שלום \u202eabc\u202c مرحبا",
    "emoji and joined": "👩‍👩‍👧‍👦🏳️‍🌈😀",
    "combining": "e\u0301\u0323" + "\u0301" * 200,
    "private and unassigned": "\ue000\U000e0001\U0010fffd",
    "damaged encoding": "it ï¿½ was",
    "quotes and backslashes": '\\"\\\\"\',;|`',
    "a tag": "<script>alert(1)</script>[MASK][CLS]",
    "one word of 100 kB": "x" * 100_000,
    "many words": "word " * 20_000,
    "without spaces": "你好世界" * 5_000,
}
KINDS = {
    **{f"text: {kind}": (lines({**GOOD, "text": text}), kept(text)) for kind, text in ODD.items()},
    "text: 5 MB of one word": (lines({**GOOD, "text": "x" * 5_000_000}, GOOD), kept("x" * 5_000_000, "good")),
    "jsonl: byte order mark": (b"\xef\xbb\xbf" + lines(GOOD), kept("good")),
    "jsonl: unescaped U+0085 and U+2028": ('{"text": "a\x85b\u2028c", "label": 1}\n'.encode(), kept("a\x85b\u2028c")),
    "jsonl: raw NUL in a string": (lines(GOOD, b'{"text": "a\x00b", "label": 1}'), kept("good", rejects=["line 2 is not JSON"])),
    "jsonl: lone surrogate": (lines(GOOD, r'{"text": "\ud800", "label": 1}'), kept("good", rejects=["text holds half a character"])),
    "jsonl: lone surrogate in a label": (lines(GOOD, r'{"text": "a", "label": "\udfff"}'), kept("good", rejects=["label holds half"])),
    "jsonl: surrogate pair": (lines(r'{"text": "\ud83d\ude00", "label": 1}'), kept("😀")),
    "jsonl: invalid UTF-8": (lines(GOOD, b'{"text": "\xe9", "label": 1}', GOOD), kept("good", "good", rejects=["line 2 is not UTF-8"])),
    "jsonl: only invalid UTF-8": (lines(b'{"text": "\xff", "label": 1}'), refused(NONE + "line 1 is not UTF-8")),
    "jsonl: UTF-16": ('{"text": "a", "label": 1}\n'.encode("utf-16"), refused("rows.jsonl: none of its first 2 rows")),
    "jsonl: broken line": (lines(GOOD, '{"text": ', GOOD), kept("good", "good", rejects=["line 2 is not JSON: Expecting value"])),
    "jsonl: two objects on a line": (lines(GOOD, '{"text": "a"}{"text": "b"}'), kept("good", rejects=["line 2 is not JSON: Extra data"])),
    "jsonl: trailing comma": (lines(GOOD, '{"text": "a",}'), kept("good", rejects=["line 2 is not JSON"])),
    "jsonl: single quotes": (lines("{'text': 'a'}"), refused(NONE + "line 1 is not JSON")),
    "jsonl: not objects": (lines(GOOD, "[1]", '"a"', "7", "null"), kept("good", rejects=["record 2 must be", "record 3 must be", "record 4 must be", "record 5 must be"])),
    "jsonl: nested too deep": (lines(GOOD, '{"text": ' + "[" * 100_000), kept("good", rejects=["line 2 is not JSON"])),
    "jsonl: nested but whole": (lines(GOOD, '{"text": ' + "[" * 5_000 + "]" * 5_000 + "}"), kept("good", rejects=[""])),
    "jsonl: lists for texts": (lines(GOOD, {**GOOD, "text": ["a"]}), kept("good", rejects=["text is a list"])),
    "jsonl: only lists for texts": (lines({**GOOD, "text": ["a"]}), refused(NONE + "text is a list")),
    "jsonl: objects for texts": (lines(GOOD, {**GOOD, "text": {"a": 1}}), kept("good", rejects=["text is an object"])),
    "jsonl: list for a label": (lines(GOOD, {"text": "a", "label": [1]}), kept("good", rejects=["label is a list"])),
    "jsonl: numbers among texts": (lines(GOOD, {**GOOD, "text": 5}, {**GOOD, "text": 1.5}), kept("good", "5", "1.5")),
    "jsonl: only numbers for texts": (lines({**GOOD, "text": 5}), refused("column 'text' must hold strings")),
    "jsonl: null and missing": (lines(GOOD, {"text": None, "label": 1}, {"text": "a"}, {}), kept("good", rejects=["text is null", "label is null", "text is null"])),
    "jsonl: NaN": (lines(GOOD, '{"text": "a", "label": NaN}', '{"text": NaN, "label": 1}'), kept("good", rejects=["label is null", "text is null"])),
    "jsonl: infinite label": (lines(GOOD, '{"text": "a", "label": -Infinity}'), kept("good", rejects=["label is -inf, not a whole number"])),
    "jsonl: fraction label": (lines(GOOD, {"text": "a", "label": 0.5}), kept("good", rejects=["label is 0.5, not a whole number"])),
    "jsonl: whole floats": (lines(GOOD, {"text": "a", "label": 2.0}), kept("good", "a", labels=["1", "2"])),
    "jsonl: huge int label": (lines(GOOD, {"text": "a", "label": 10**30}), kept("good", "a", labels=["1", str(10**30)])),
    "jsonl: int of 5,000 digits": (lines(GOOD, '{"text": "a", "label": ' + "9" * 5_000 + "}"), kept("good", rejects=["line 2 is not JSON"])),
    "jsonl: booleans": (lines({"text": "a", "label": True}), kept("a", labels=["true"])),
    "jsonl: duplicate keys": (lines('{"text": "a", "text": "b", "label": 1}'), kept("b")),
    "jsonl: blank lines": (lines(GOOD, "", "  ", GOOD), kept("good", "good", rejects=["text is null", "text is null"])),
    "jsonl: no newline at the end": (lines(GOOD)[:-1], kept("good")),
    "jsonl: carriage returns": (b'{"text": "a", "label": 1}\r\n{"text": "b", "label": 1}\r\n', kept("a", "b")),
    "jsonl: a key first in row 150": (lines(*[{"label": 1}] * 149, GOOD), kept("good", rejects=["text is null"] * 149)),
    "jsonl: a thousand columns": (lines({f"c{i}": i for i in range(1_000)} | GOOD), kept("good")),
    "jsonl: cut in the middle": (lines(GOOD, GOOD)[:-9], kept("good", rejects=["line 2 is not JSON"])),
    "jsonl: duplicate ids": (lines({**GOOD, "id": "x"}, {**GOOD, "id": "x"}), kept("good", "good", ids=["x", "x"])),
    "jsonl: null and empty ids": (lines({**GOOD, "id": None}, {**GOOD, "id": ""}, {**GOOD, "id": 7}), kept("good", "good", "good", ids=["rows.jsonl:0", "", "7"])),
    "json: cut short": (b'[{"text": "a", "label": 1}, {"te', refused("rows.json is not JSON", "rows.json")),
    "json: not objects": (json.dumps([GOOD, 5, [1]]).encode(), kept("good", rejects=["record 2 must be", "record 3 must be"], name="rows.json")),
    "json: byte order mark": (b"\xef\xbb\xbf" + json.dumps([GOOD]).encode(), kept("good", name="rows.json")),
    "json: lone surrogate": (b'[{"text": "\\ud800", "label": 1}]', refused(NONE + "text holds half a character", "rows.json")),
    "json: nested too deep": (b'[{"text": ' + b"[" * 100_000, refused("rows.json is not JSON: it is nested too deeply", "rows.json")),
    "json: no comma between": (b'[{"text": "a", "label": 1} {"text": "b"}]', refused("Expecting ',' or ']', in or behind record 2", "rows.json")),
    "json: NaN": (b'[{"text": "a", "label": NaN}, {"text": "b", "label": 1}]', kept("b", rejects=["label is null"], name="rows.json")),
    "json: 3 MB records": (json.dumps([{**GOOD, "text": "y" * 3_000_000}, GOOD] * 2).encode(), kept("y" * 3_000_000, "good", "y" * 3_000_000, "good", name="rows.json")),
    "json: spaces all around": (b' \n[ \n' + json.dumps(GOOD).encode() + b" \n , \t" + json.dumps(GOOD).encode() + b"\n]\n ", kept("good", "good", name="rows.json")),
    "json: invalid UTF-8": (b'[{"text": "\xe9", "label": 1}]', refused("rows.json is not UTF-8", "rows.json")),
    "json: one object": (json.dumps(GOOD).encode(), kept("good", name="rows.json")),
    "json: empty array": (b"[]", refused("holds no rows", "rows.json")),
    "csv: byte order mark": (b"\xef\xbb\xbftext,label\na,1\n", kept("a", name="rows.csv")),
    "csv: UTF-16": ("text,label\na,1\n".encode("utf-16"), refused("rows.csv", "rows.csv")),
    "csv: invalid UTF-8": (b"text,label\n\xe9,1\n", refused("rows.csv cannot be read: .*UTF8", "rows.csv")),
    "csv: a quote that never ends": (b'text,label\n"a,1\nb,2\n', refused("rows.csv", "rows.csv")),
    "csv: quotes inside": (b'text,label\n"a ""b"" c",1\n', kept('a "b" c', name="rows.csv")),
    "csv: quoted newlines": (b'text,label\n"a\nb\r\nc",1\n', kept("a\nb\r\nc", name="rows.csv")),
    "csv: too many fields": (b"text,label\na,1,2\n", refused("Expected 2 columns, got 3", "rows.csv")),
    "csv: too few fields": (b"text,label\na\n", refused("Expected 2 columns, got 1", "rows.csv")),
    "csv: carriage returns": (b"text,label\r\na,1\r\nb,2\r\n", kept("a", "b", name="rows.csv")),
    "csv: only a header": (b"text,label\n", refused("holds no rows", "rows.csv")),
    "csv: no header": (b"a,1\nb,2\n", refused("has no column 'text'. It has: a, 1", "rows.csv")),
    "csv: empty fields": (b"text,label\n,1\na,\n", kept("", rejects=["label is null"], name="rows.csv")),
    "csv: NUL": (b"text,label\na\x00b,1\n", kept("a\x00b", name="rows.csv")),
    "csv: semicolons": (b"text;label\na;1\n", refused("has no column 'text'. It has: text;label", "rows.csv")),
    "tsv: quotes": (b'text\tlabel\n"a\tb"\t1\n', kept("a\tb", name="rows.tsv")),
    "text: invalid UTF-8": (b"a\n\xe9\nb\n", kept("a", "b", rejects=["line 2 is not UTF-8"], name="rows.txt")),
    "text: byte order mark and empty lines": (b"\xef\xbb\xbfa\n\n", kept("a", "", name="rows.txt")),
    "gz: cut short": (gzip.compress(lines(*[GOOD] * 5_000))[:-30], refused("rows.jsonl.gz cannot be read", "rows.jsonl.gz")),
    "gz: is none": (lines(GOOD), refused("rows.jsonl.gz cannot be read", "rows.jsonl.gz")),
    "gz: several parts": (gzip.compress(lines(GOOD)) + gzip.compress(lines(GOOD)), kept("good", "good", name="rows.jsonl.gz")),
    "bz2: cut short": (bz2.compress(lines(*[GOOD] * 5_000))[:-30], refused("rows.jsonl.bz2 cannot be read", "rows.jsonl.bz2")),
    "zst: is none": (lines(GOOD), refused("rows.jsonl.zst cannot be read", "rows.jsonl.zst")),
    "parquet: is csv": (b"text,label\na,1\n", refused("rows.parquet cannot be read", "rows.parquet")),
    "parquet: cut short": (parquet(text=["a"], label=[1])[:-20], refused("rows.parquet cannot be read", "rows.parquet")),
    "parquet: empty file": (b"", refused("holds no rows", "rows.parquet")),
    "parquet: no rows": (parquet(text=pa.array([], pa.string()), label=pa.array([], pa.int64())), refused("holds no rows", "rows.parquet")),
    "parquet: column missing": (parquet(words=["a"]), refused("has no column 'text'. It has: words", "rows.parquet")),
    "parquet: lists for texts": (parquet(text=[["a"]], label=[1]), refused("column 'text' must hold strings", "rows.parquet")),
    "parquet: bytes for texts": (parquet(text=[b"a"], label=[1]), refused("column 'text' must hold strings", "rows.parquet")),
    "parquet: structs for labels": (parquet(text=["a"], label=[{"a": 1}]), refused("column 'label' must hold strings or", "rows.parquet")),
    "parquet: times for labels": (parquet(text=["a"], label=[datetime(2020, 1, 1)]), refused("column 'label' must hold", "rows.parquet")),
    "parquet: NaN labels": (parquet(text=["a", "b"], label=[1.0, float("nan")]), kept("a", rejects=["label is null"], name="rows.parquet")),
    "parquet: fraction labels": (parquet(text=["a", "b"], label=[1.0, 0.25]), kept("a", rejects=["label is 0.25, not"], name="rows.parquet", labels=["1"])),
    "parquet: large strings": (parquet(text=pa.array(["a"], pa.large_string()), label=[1]), kept("a", name="rows.parquet")),
    "parquet: dictionaries": (parquet(text=pa.array(["a", "a"]).dictionary_encode(), label=pa.array(["x", "y"]).dictionary_encode()), kept("a", "a", name="rows.parquet", labels=["x", "y"])),
    "parquet: not UTF-8": (parquet(text=unchecked(b"a", b"\xff\xfe", None), label=[1, 1, 1]), kept("a", rejects=["text is not UTF-8", "text is null"], name="rows.parquet")),
    "parquet: label not UTF-8": (parquet(text=["a", "b"], label=unchecked(b"x", b"\xff")), kept("a", rejects=["label is not UTF-8"], name="rows.parquet")),
    "parquet: null column": (parquet(text=pa.nulls(2), label=[1, 1]), kept(rejects=["text is null", "text is null"], name="rows.parquet")),
    "parquet: many row groups": (parquet(groups=1, text=list("abcde"), label=[1] * 5), kept(*"abcde", name="rows.parquet")),
    "arrow: is none": (b"hello", refused("rows.arrow cannot be read", "rows.arrow")),
    "arrow: cut short": (arrow(text=["a"], label=[1])[:-40], refused("rows.arrow", "rows.arrow")),
    "name: no format": (b"hello", refused("the name does not tell the format", "rows.xyz")),
    "name: spaces and brackets": (lines(GOOD), kept("good", name="my [odd] rows (1) é.jsonl")),
    "name: upper case": (lines(GOOD), kept("good", name="ROWS.JSONL")),
    "name: wildcard characters": (lines(GOOD), kept("good", name="what?*.jsonl")),
}  # fmt: skip


def read_all(path, columns, **source):
    """Texts, labels, ids and reasons; and that nothing is lost."""
    cut = units(Source(path=str(path), **source), columns)
    reader = Reader(columns)
    batches = [reader.read(unit) for unit in cut]
    rows = pa.concat_tables([batch.rows for batch in batches])
    rejects = pa.concat_tables([batch.rejects for batch in batches])
    assert rows.num_rows + rejects.num_rows == sum(unit.stop - unit.start for unit in cut)
    for name in ("id", "text"):
        assert rows[name].null_count == 0
        rows[name].validate(full=True)
    assert all("\n" not in reason and preview is not None for reason, preview in zip(
        rejects["reason"].to_pylist(), rejects["preview"].to_pylist(), strict=True))  # fmt: skip
    return rows, rejects


def test_there_are_many_kinds():
    assert len(KINDS) >= 60


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_its_rows_or_one_line(kind, tmp_path):
    content, expected = KINDS[kind]
    path = tmp_path / expected["name"]
    path.write_bytes(content)
    columns = Columns("text", label="" if path.suffix == ".txt" else "label", id="id" if expected.get("ids") else "")
    if "error" in expected:
        with pytest.raises(SourceError, match=expected["error"]) as caught:
            read_all(path, columns)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
        return
    rows, rejects = read_all(path, columns)
    assert rows["text"].to_pylist() == expected["texts"]
    reasons = rejects["reason"].to_pylist()
    assert len(reasons) == len(expected["rejects"])
    for reason, begin in zip(reasons, expected["rejects"], strict=True):
        assert reason.startswith(begin)
    if expected["labels"]:
        assert rows["label"].to_pylist() == expected["labels"]
    if expected["ids"]:
        assert rows["id"].to_pylist() == expected["ids"]


def test_rejects_show_what_was_there(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(
        lines(GOOD, '{"text": "broken ' + "x" * 300, b'{"text": "\xe9"}', {"text": ["a"]})
    )
    _, rejects = read_all(tmp_path / "rows.jsonl", Columns("text", label="label"))
    assert rejects["id"].to_pylist() == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert rejects["preview"].to_pylist() == [
        '{"text": "broken ' + "x" * 63,
        '{"text": "\ufffd"}',
        '{"text": ["a"]}',
    ]


def test_ten_million_rows_of_one_letter_cut_short(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"x\n" * 10_000_000 + b"y")  # the last line without its end
    cut = units(Source(path=str(path)), Columns("text"))
    assert sum(unit.stop - unit.start for unit in cut) == 10_000_001
    assert Reader(Columns("text")).read(cut[-1]).rows["text"].to_pylist()[-1] == "y"
    assert read_all(path, Columns("text"), limit=30_000)[0].num_rows == 30_000


def test_files_that_do_not_agree_with_each_other(tmp_path):
    columns = Columns("text", label="label")
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"], "label": ["2"]}), tmp_path / "b.parquet")
    assert read_all(tmp_path, columns)[0]["label"].to_pylist() == ["1", "2"]
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "c.parquet")
    with pytest.raises(SourceError, match="c.parquet has no column 'label'"):
        read_all(tmp_path, columns)
    (tmp_path / "d.csv").write_text("text,label\nd,1\n")
    with pytest.raises(SourceError, match="holds files of several formats"):
        read_all(tmp_path, columns)


def test_odd_places(tmp_path):
    columns = Columns("text", label="label")
    (tmp_path / "sub folder").mkdir()
    (tmp_path / "sub folder" / "rows.jsonl").write_bytes(lines(GOOD))
    assert read_all(f"{tmp_path}/sub folder/../sub folder/rows.jsonl", columns)[0].num_rows == 1
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "sub folder" / "rows.jsonl")
    assert read_all(tmp_path / "link.jsonl", columns)[0].num_rows == 1
    (tmp_path / "folder.jsonl").mkdir()
    for path in ("folder.jsonl", "none.jsonl", "none/*.jsonl", "sub folder/none", "\x00.jsonl", "x" * 5_000):
        with pytest.raises(BertrayError) as caught:
            read_all(f"{tmp_path}/{path}", columns)
        assert "\n" not in str(caught.value)
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(BertrayError):
        read_all(tmp_path / "loop.jsonl", columns)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(SourceError, match="rows.jsonl"):
        read_all(path, Columns("text", label="label"))


def test_odd_texts_are_encoded_each_to_one_finite_vector(tiny):
    encoder = Encoder(find(str(tiny)), EncoderSpec(pooling="mean", precision="fp32"))
    texts = [*ODD.values(), "", "x" * 1_000_000, "plain"]
    encoded, failed = encoder.encode_rows(texts)
    assert failed == {}
    assert np.isfinite(encoded.vectors).all()
    assert np.abs(encoded.vectors).sum(1).min() > 0
    np.testing.assert_allclose(encoded.vectors[-1], encoder.encode(["plain"]).vectors[0], atol=1e-6)
