import gzip
import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from conftest import bytes_read

from bertray import sources
from bertray.errors import SourceError
from bertray.formats import format_of
from bertray.sources import Columns, Reader, from_hub, is_saved_dataset, stage, units
from bertray.spec import Source
from bertray.storage import Location

COLUMNS = Columns("text", label="label", id="id")
TEXTS = ["plain", " spaces ", 'a "quoted", one', "line\nbreak", "nel\x85ps\u2028ls", "émoji 😀", "", "tab\there"]
ROWS = [{"id": f"r{i}", "text": f"{text}{i if text else ''}", "label": i % 3} for i in range(40) for text in TEXTS]
FRAME = pd.DataFrame(ROWS)


def write(folder, name):
    path = folder / name
    frame = FRAME
    if name.startswith("rows.parquet"):
        frame.to_parquet(path, row_group_size=50)
    elif name.startswith("rows.feather"):
        pa.feather.write_feather(pa.Table.from_pandas(frame), str(path), chunksize=37)
    elif name.startswith("rows.arrow"):
        table = pa.Table.from_pandas(frame)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=37)
    elif name.startswith(("rows.csv", "rows.tsv")):
        text = frame.to_csv(index=False, sep="\t" if "tsv" in name else ",").encode()
        with pa.output_stream(str(path), compression="detect") as sink:
            sink.write(text)
    elif name == "rows.json":
        frame.to_json(path, orient="records", force_ascii=False)
    else:
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    return str(path)


def read_all(source, columns=COLUMNS, unit_rows="auto"):
    reader = Reader(columns)
    return pa.concat_tables([reader.read(unit).rows for unit in units(source, columns, unit_rows)])


FORMATS = ["parquet", "feather", "arrow", "csv", "csv.gz", "tsv", "tsv.zst", "json", "jsonl", "jsonl.gz", "ndjson.bz2"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_rows_at_any_cut(tmp_path, kind):
    source = Source(path=write(tmp_path, f"rows.{kind}"))
    for unit_rows in ("auto", 33, 1000):
        table = read_all(source, unit_rows=unit_rows)
        assert table["id"].to_pylist() == FRAME["id"].tolist()
        assert table["text"].to_pylist() == FRAME["text"].tolist()
        assert table["label"].to_pylist() == FRAME["label"].astype(str).tolist()


@pytest.mark.parametrize("kind", FORMATS)
def test_units_can_be_read_in_any_order(tmp_path, kind):
    cut = units(Source(path=write(tmp_path, f"rows.{kind}")), COLUMNS, 33)
    reader = Reader(COLUMNS)
    for i in (5, 2, 3, 9, 0):
        start, stop = (cut[i].start, cut[i].stop) if kind == "parquet" else (33 * i, 33 * i + 33)
        assert reader.read(cut[i]).rows["text"].to_pylist() == FRAME["text"].tolist()[start:stop]


def test_only_large_files_that_have_to_be_read_are_counted_elsewhere(tmp_path, monkeypatch):
    asked = []

    def over_nodes(count, files):
        asked.extend(file.name for file in files)
        return map(count, files)

    for large, elsewhere in ((1 << 30, []), (100, ["rows.csv"])):
        monkeypatch.setattr(sources, "_FAR_BYTES", large)
        for kind in ("csv", "parquet"):
            source = Source(path=write(tmp_path, f"rows.{kind}"))
            assert units(source, COLUMNS, 33, over_nodes) == units(source, COLUMNS, 33)
        assert asked == elsewhere


def test_text_files_are_a_row_a_line(tmp_path):
    (tmp_path / "lines.txt").write_bytes("one\r\ntwo\x85two\n\nlast".encode())
    table = read_all(Source(path=str(tmp_path / "lines.txt")), Columns("text"))
    assert table["text"].to_pylist() == ["one", "two\x85two", "", "last"]
    assert table["id"].to_pylist() == ["lines.txt:0", "lines.txt:1", "lines.txt:2", "lines.txt:3"]
    assert table["label"].null_count == 4


def test_folders_globs_and_limits(tmp_path):
    for name in ("b.csv", "a.csv", "deep/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text,label\nx,0\ny,1\n")
    (tmp_path / "README.md").write_text("not rows")
    columns = Columns("text", label="label")
    every = ["a.csv:0", "a.csv:1", "b.csv:0", "b.csv:1", "deep/c.csv:0", "deep/c.csv:1"]
    assert read_all(Source(path=str(tmp_path)), columns)["id"].to_pylist() == every
    assert read_all(Source(path=f"{tmp_path}/*.csv"), columns)["id"].to_pylist() == every[:4]
    assert read_all(Source(path=str(tmp_path), limit=3), columns)["id"].to_pylist() == every[:3]


def test_units_of_a_file_do_not_move_when_another_is_added(tmp_path):
    (tmp_path / "b.csv").write_text("text,label\n" + "x,0\n" * 50)
    columns = Columns("text", label="label")
    before = [unit.key for unit in units(Source(path=str(tmp_path)), columns, 20)]
    (tmp_path / "a.csv").write_text("text,label\n" + "x,0\n" * 50)
    after = [unit.key for unit in units(Source(path=str(tmp_path)), columns, 20)]
    assert after[-3:] == before
    assert len(set(after)) == len(after) == 6


def test_nulls_are_set_aside_with_a_reason_and_empty_texts_are_kept(tmp_path):
    rows = [
        {"text": "", "label": "a"},
        {"text": None, "label": "a"},
        {"text": "no label", "label": None},
        {"label": "a"},
        {"text": "  ", "label": "a"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    columns = Columns("text", label="label")
    (unit,) = units(Source(path=str(tmp_path / "rows.jsonl")), columns)
    batch = Reader(columns).read(unit)
    assert batch.rows["text"].to_pylist() == ["", "  "]
    assert batch.rejects.to_pylist() == [
        {"id": "rows.jsonl:1", "reason": "text is null", "preview": ""},
        {"id": "rows.jsonl:2", "reason": "label is null", "preview": "no label"},
        {"id": "rows.jsonl:3", "reason": "text is null", "preview": ""},
        {"id": "rows.jsonl:5", "reason": "text is null", "preview": ""},  # the blank line
    ]


def test_empty_fields_of_csv_are_empty_texts_and_missing_labels(tmp_path):
    (tmp_path / "rows.csv").write_text('\ufefftext,label\n,a\n"",a\nx,\nNA,null\n', encoding="utf-8")
    columns = Columns("text", label="label")
    (unit,) = units(Source(path=str(tmp_path / "rows.csv")), columns)
    batch = Reader(columns).read(unit)
    assert batch.rows["text"].to_pylist() == ["", "", "NA"]
    assert batch.rows["label"].to_pylist() == ["a", "a", "null"]
    assert batch.rejects["reason"].to_pylist() == ["label is null"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([0, 1], ["0", "1"]), ([True, False], ["true", "false"]), ([1.0, None], ["1"]), (["x", "y"], ["x", "y"])],
)
def test_labels_of_several_types(tmp_path, labels, expected):
    pd.DataFrame({"text": ["a", "b"], "label": labels}).to_parquet(tmp_path / "rows.parquet")
    table = read_all(Source(path=str(tmp_path / "rows.parquet")), Columns("text", label="label"))
    assert table["label"].to_pylist() == expected


def test_dictionary_encoded_columns(tmp_path):
    table = pa.table({"text": pa.array(["a", "b"]).dictionary_encode(), "label": pa.array(["x", "y"])})
    pq.write_table(table, tmp_path / "rows.parquet")
    read = read_all(Source(path=str(tmp_path / "rows.parquet")), Columns("text", label="label"))
    assert read["text"].to_pylist() == ["a", "b"]


BAD = {
    "missing.csv": (None, "does not exist, or no file fits it"),
    "empty.csv": ("", "holds no rows"),
    "header.csv": ("text,label\n", "holds no rows"),
    "empty.jsonl": ("", "holds no rows"),
    "column.csv": ("words,label\na,b\n", r"has no column 'text'. It has: words, label"),
    "column.jsonl": ('{"words": "a"}\n', "has no column 'text'. It has: words"),
    "column.json": ('[{"words": "a"}]', "has no column 'text'"),
    "ragged.csv": ("text,label\na,b,c\n", "ragged.csv cannot be read: .*Expected 2 columns, got 3"),
    "broken.jsonl": (
        '{"text": \n{"text": "a"\n',
        "broken.jsonl:1: line is not JSON: .* None of the first 2",
    ),
    "list.jsonl": ("[1, 2]\n", "list.jsonl:1: record is not an object"),
    "text.jsonl": ('{"text": 5, "label": 1}\n', "text.jsonl:1: text is a number. .* set data.text"),
    "lists.jsonl": ('{"text": ["a"], "label": 1}\n', "lists.jsonl:1: text is a list"),
    "float.jsonl": ('{"text": "a", "label": 0.5}\n', "float.jsonl:1: label is not a whole number"),
    "latin.jsonl": (b'{"text": "\xe9", "label": 1}\n', "latin.jsonl:1: line is not UTF-8"),
    "latin.csv": (b"text,label\n\xe9,1\n", "latin.csv cannot be read: .*UTF8"),
    "latin.txt": (b"\xe9\n", "latin.txt:1: text is not UTF-8"),
    "surrogate.jsonl": ('{"text": "\\ud800", "label": 1}\n', "surrogate.jsonl:1: text holds half a character"),
    "inf.jsonl": ('{"text": "a", "label": Infinity}\n', "inf.jsonl:1: label is not a whole number"),
    "not.parquet": ("hello", "not.parquet cannot be read"),
    "not.arrow": ("hello", "not.arrow cannot be read"),
    "cut.json": ('[{"text": "a", "label": 1}, {"te', "cut.json: record 2 is not JSON"),
    "rows.xyz": ("hello", "the name does not tell the format"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a", "label": 1}\n' * 5000)[:-30], "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_clear_line(tmp_path, name):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    columns = Columns("text", label="" if name.endswith(".txt") else "label")
    with pytest.raises(SourceError, match=message) as caught:
        read_all(Source(path=str(tmp_path / name)), columns)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_copy_is_the_same_source_and_a_change_is_another(tmp_path):
    columns = Columns("text", label="label")
    keys = []
    for folder, text in (("one", "a"), ("two", "a"), ("three", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.csv").write_text(f"text,label\n{text},0\n")
        os.utime(tmp_path / folder / "rows.csv", (len(keys), len(keys)))
        keys += [unit.key for unit in units(Source(path=str(tmp_path / folder)), columns)]
    assert keys[0] == keys[1] != keys[2]


def test_after_an_error_the_next_unit_is_read_from_its_own_place(tmp_path):
    """Of a file that changed: units cut before are refused, those cut after are read."""
    path, columns = tmp_path / "rows.jsonl", Columns("text", label="label")
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": 0}) + "\n" for i in range(30)))
    old, reader = units(Source(path=str(path)), columns, 10), Reader(columns)
    reader.read(old[0])
    path.write_text("".join(json.dumps({"text": f"u{i}", "label": 0}) + "\n" for i in range(30)))
    with pytest.raises(SourceError, match="rows.jsonl has changed since this run looked at it. Run the command again"):
        reader.read(old[1])
    new = units(Source(path=str(path)), columns, 10)
    assert reader.read(new[2]).rows["text"].to_pylist() == [f"u{i}" for i in range(20, 30)]


@pytest.mark.parametrize("change", ["shorter", "gone", "touched", "none"])
def test_a_file_that_is_another_when_it_is_read(tmp_path, change):
    path, columns = tmp_path / "rows.csv", Columns("text", label="label")
    path.write_text("text,label\n" + "x,0\n" * 50)
    (unit,) = units(Source(path=str(path)), columns)
    if change == "gone":
        path.unlink()
    elif change == "shorter":
        path.write_text("text,label\n" + "x,0\n" * 20)
        with pytest.raises(SourceError, match="has become shorter"):
            Reader(columns).read(replace(unit, version=""))  # nobody is to look
    elif change == "touched":
        os.utime(path, (5, 5))
    if change in ("touched", "none"):  # as another node's copy may be: what it holds is the same
        assert Reader(columns).read(unit).rows.num_rows == 50
    else:
        with pytest.raises(SourceError, match="has changed since"):
            Reader(columns).read(unit)


@pytest.mark.parametrize(
    ("groups", "step", "expected"),
    [
        ([50] * 4, 120, [(0, 100), (100, 200)]),
        ([50] * 3, 33, [(0, 25), (25, 50), (50, 75), (75, 100), (100, 125), (125, 150)]),
        ([10, 10, 100, 10], 40, [(0, 20), (20, 53), (53, 86), (86, 120), (120, 130)]),
        ([0, 5, 0], 10, [(0, 5)]),
        ([0], 10, None),
    ],
)
def test_units_of_parquet_files_follow_row_groups(tmp_path, groups, step, expected):
    with pq.ParquetWriter(tmp_path / "rows.parquet", pa.schema([("text", pa.string())])) as writer:
        for size in groups:
            writer.write_table(pa.table({"text": pa.array(["x"] * size, pa.string())}))
    if expected is None:
        with pytest.raises(SourceError, match="holds no rows"):
            units(Source(path=str(tmp_path)), Columns("text"), step)
    else:
        cut = units(Source(path=str(tmp_path)), Columns("text"), step)
        assert [(unit.start, unit.stop) for unit in cut] == expected


def test_units_of_long_texts_hold_fewer_rows(tmp_path):
    (tmp_path / "rows.txt").write_text(("x" * 49_999 + "\n") * 1000)
    cut = units(Source(path=str(tmp_path)), Columns("text"))
    assert [(unit.start, unit.stop) for unit in cut] == [(0, 335), (335, 670), (670, 1000)]


def test_a_key_that_occurs_late(tmp_path):
    path, columns = tmp_path / "rows.jsonl", Columns("text", label="label")
    path.write_text('{"text": "a"}\n' * 150 + '{"text": "b", "label": "x"}\n')
    (unit,) = units(Source(path=str(path)), columns)
    batch = Reader(columns).read(unit)
    assert batch.rows["text"].to_pylist() == ["b"]
    assert batch.rejects["reason"].to_pylist() == ["label is null"] * 150
    path.write_text('{"text": "a"}\n' * 150)
    with pytest.raises(SourceError, match="has no column 'label'. It has: text"):
        units(Source(path=str(path)), columns)


@pytest.mark.parametrize("kind", ["pandas", "arrow", "datasets", "ray"])
def test_rows_in_memory_are_staged_in_order(tmp_path, kind, request):
    import datasets

    rows = FRAME
    if kind == "arrow":
        rows = pa.Table.from_pandas(FRAME)
    elif kind == "datasets":
        rows = datasets.Dataset.from_pandas(FRAME)
    elif kind == "ray":
        request.getfixturevalue("ray_cluster")
        import ray.data

        rows = ray.data.from_pandas(FRAME)
    for _ in range(2):  # again: found by content
        assert stage(rows, COLUMNS, Location(str(tmp_path))) == ()
        (file,) = Location(str(tmp_path)).files()
    table = read_all(Source(path=str(tmp_path)))
    assert table["text"].to_pylist() == FRAME["text"].tolist()
    stage(FRAME[:5], COLUMNS, Location(str(tmp_path)))
    (other,) = Location(str(tmp_path)).files()
    assert other.name != file.name
    with pytest.raises(SourceError, match="have no column 'nope'"):
        stage(rows, Columns("nope"), Location(str(tmp_path)))


def test_save_to_disk_folders_and_their_splits(tmp_path):
    import datasets

    features = datasets.Features(
        id=datasets.Value("string"), text=datasets.Value("string"), label=datasets.ClassLabel(names=["x", "y", "z"])
    )
    rows = datasets.Dataset.from_pandas(FRAME, features=features)
    datasets.DatasetDict(train=rows, test=rows.select(range(10))).save_to_disk(str(tmp_path / "disk"))
    source = Source(path=str(tmp_path / "disk"), split="train[5:25]+test")
    assert is_saved_dataset(source)
    chosen = from_hub(source)
    assert chosen["id"][:] == FRAME["id"].tolist()[5:25] + FRAME["id"].tolist()[:10]
    assert stage(chosen, COLUMNS, Location(str(tmp_path / "staged"))) == ("x", "y", "z")
    with pytest.raises(SourceError, match=r"several splits. Set split to one of: train, test"):
        from_hub(Source(path=str(tmp_path / "disk")))
    with pytest.raises(SourceError, match="cannot be loaded: Unknown split"):
        from_hub(Source(path=str(tmp_path / "disk"), split="nope"))


def test_names_that_look_like_numbers_are_not_taken_for_them(tmp_path):
    """The library sorts the names of a ClassLabel as strings: 10 is its number 2."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(11)], "label": list(range(11))})
    names = stage(rows.class_encode_column("label"), Columns("text", label="label"), Location(str(tmp_path)))
    assert names[2] == "10"
    assert read_all(Source(path=str(tmp_path)), Columns("text", label="label"))["label"].to_pylist() == [
        str(i) for i in range(11)
    ]


def test_folders_of_several_formats_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("text\na\n")
    (tmp_path / "README.txt").write_text("about the rows")
    with pytest.raises(SourceError, match="holds files of several formats \\(csv, text\\)"):
        units(Source(path=str(tmp_path)), Columns("text"))
    assert len(units(Source(path=f"{tmp_path}/*.csv"), Columns("text"))) == 1


def test_rows_in_memory_that_are_none(tmp_path):
    for rows, message in (
        ([{"text": "a"}], "must be a frame, a data set or a table. Got list"),
        (FRAME[:0], "The rows are empty"),
        (pd.DataFrame({"id": ["a", "b"], "text": ["x", "y"], "label": [1, "b"]}), "The rows cannot be read"),
    ):
        with pytest.raises(SourceError, match=message):
            stage(rows, COLUMNS, Location(str(tmp_path)))


def test_missing_values_as_python_writes_them(tmp_path):
    records = [("NaN", "1"), ('"a"', "NaN"), ('"b"', "1.0"), ('"c"', '"x"')]
    lines = "\n".join(f'{{"text": {text}, "label": {label}}}' for text, label in records)
    (tmp_path / "rows.jsonl").write_text(lines)
    columns = Columns("text", label="label")
    batch = Reader(columns).read(units(Source(path=str(tmp_path)), columns)[0])
    assert batch.rows["label"].to_pylist() == ["1", "x"]
    assert batch.rejects["reason"].to_pylist() == ["text is null", "label is null"]


def test_a_json_array_with_a_byte_order_mark(tmp_path):
    (tmp_path / "rows.json").write_text('\ufeff[{"text": "a"}]', encoding="utf-8")
    assert read_all(Source(path=str(tmp_path)), Columns("text"))["text"].to_pylist() == ["a"]


def test_hub_data_sets_with_slices(tmp_path):
    """A folder stands for the hub: `load_dataset` takes both by the same name."""
    FRAME.to_csv(tmp_path / "train.csv", index=False)
    chosen = from_hub(Source(hub=str(tmp_path), split="train[:20]", limit=7))
    assert chosen["id"][:] == FRAME["id"].tolist()[:7]
    with pytest.raises(SourceError, match="The data set some-one/nothing cannot be loaded"):
        from_hub(Source(hub="some-one/nothing", split="train"))


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.CSV", "csv"), ("x/a.jsonl.gz", "jsonl"), ("a.gz", ""), ("a", ""), ("a.b.parquet", "parquet")],
)
def test_formats_by_name(name, format):
    assert format_of(name) == format


def test_a_unit_of_a_parquet_file_takes_no_more_than_its_groups(tmp_path):
    """Arrow fetches all row groups that it is told of, at once and at the first of them."""
    rng = np.random.default_rng(0)
    texts = [" ".join(words) for words in rng.integers(0, 10**6, (40_000, 12)).astype(str)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": texts, "label": ["a"] * len(texts)}), path, row_group_size=2000)
    columns = Columns("text", label="label")
    unit = units(Source(path=str(path)), columns)[1]
    before = bytes_read()
    Reader(columns).read(unit)
    assert bytes_read() - before < path.stat().st_size / 4


def test_a_few_series_of_units_beside_each_other_read_a_file_once_each(tmp_path, monkeypatch):
    path, opened, real = tmp_path / "rows.csv", [], sources.open_rows
    path.write_text("text\n" + "".join(f"row {i}\n" for i in range(90)))
    cut, reader = units(Source(path=str(path)), Columns("text"), 3), Reader(Columns("text"))
    monkeypatch.setattr(sources, "open_rows", lambda *given: opened.append(given) or real(*given))
    for number in range(10):
        for series in (0, 10, 20):
            unit = cut[series + number]
            texts = reader.read(unit).rows["text"].to_pylist()
            assert texts == [f"row {i}" for i in range(unit.start, unit.stop)]
    assert len(opened) == 3
