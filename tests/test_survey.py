"""A survey against the whole: rows, units and what the sample is like, without reading it all."""

import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import bytes_read

from bertray import survey as module
from bertray.errors import SourceError, SpecError
from bertray.formats import whole_records
from bertray.sources import Columns, Reader, units
from bertray.spec import Source
from bertray.survey import survey

COLUMNS = Columns("text", label="label")


def rows(count, seed=0):
    """Rows whose texts become longer towards the end."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 10**5, (count, 28)).astype(str)
    lengths = (1 + 20 * np.arange(count) / count + rng.integers(8, size=count)).astype(int)
    return [{"text": " ".join(own[:length]), "label": "a"} for own, length in zip(words, lengths, strict=True)]


def write(path, table, format, **options):
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(table), path, **options)
    elif format == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif format == "json":
        path.write_text(json.dumps(table, indent=1))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows({**row, "text": row["text"] + '\n"it" said'} for row in table)
    return path


def mean(table):
    return np.mean([len(text) for text in table["text"].to_pylist()])


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv", "json"])
@pytest.mark.parametrize("unit_rows", ["auto", 700])
def test_of_a_small_source_all_is_exact(tmp_path, format, unit_rows):
    write(tmp_path / f"a.{format}", rows(9000), format)
    write(tmp_path / f"b.{format}", rows(300), format)
    source = Source(path=str(tmp_path))
    found = survey("train", source, COLUMNS, unit_rows)
    cut = units(source, COLUMNS, unit_rows)
    assert found.exact
    assert (found.rows, found.units) == (9300, len(cut))
    whole = pa.concat_tables([Reader(COLUMNS).read(unit).rows for unit in cut])
    assert found.sample.num_rows <= 1.2 * module.SAMPLE_ROWS
    assert mean(found.sample) == pytest.approx(mean(whole), rel=0.06)
    assert set(found.sample["id"].to_pylist()) <= set(whole["id"].to_pylist()) or format != "parquet"


@pytest.mark.parametrize(
    ("format", "off"),
    [("jsonl", 0.03), ("parquet", 0.0)],
)
def test_a_large_file_is_not_read_whole(tmp_path, monkeypatch, format, off):
    monkeypatch.setattr(module, "_BYTES", 1 << 20)
    monkeypatch.setattr(module, "_REACH", 1 << 16)
    table = rows(120_000)
    path = write(tmp_path / f"a.{format}", table, format, **({"row_group_size": 1000} if format == "parquet" else {}))
    before = bytes_read()
    found = survey("train", Source(path=str(path)), COLUMNS)
    assert bytes_read() - before < path.stat().st_size / 2
    cut = units(Source(path=str(path)), COLUMNS)
    assert found.rows == pytest.approx(120_000, rel=off)
    assert found.exact == (format == "parquet")
    assert found.units == pytest.approx(len(cut), rel=max(off, 0.01))
    assert mean(found.sample) == pytest.approx(np.mean([len(row["text"]) for row in table]), rel=0.05)
    assert found.bytes == path.stat().st_size
    assert len(set(found.places.tolist())) == 16


@pytest.mark.parametrize("format", ["csv", "json"])
def test_what_can_only_be_read_forwards_is_told_by_its_beginning(tmp_path, monkeypatch, format):
    monkeypatch.setattr(module, "_BYTES", 1 << 18)
    path = write(
        tmp_path / f"a.{format}", [{"text": "some words " * (1 + i % 9), "label": "a"} for i in range(30_000)], format
    )
    found = survey("train", Source(path=str(path)), COLUMNS)
    assert not found.exact
    assert found.rows == pytest.approx(30_000, rel=0.03)
    assert found.rejected == 0
    assert "at the beginning" in found.how
    assert abs(len(units(Source(path=str(path)), COLUMNS)) - found.units) <= 1


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_of_packed_files_packed_bytes_count(tmp_path, monkeypatch, format):
    monkeypatch.setattr(module, "_BYTES", 1 << 20)
    rng = np.random.default_rng(0)
    table = [{"text": " ".join(map(str, rng.integers(0, 10**6, 20))), "label": "a"} for _ in range(40_000)]
    path = write(tmp_path / f"a.{format}", table, format)
    packed = tmp_path / f"b.{format}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    found = survey("train", Source(path=str(packed)), COLUMNS)
    assert not found.exact
    assert found.rows == pytest.approx(40_000, rel=0.05)


def test_of_many_files_some_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FOOTERS", 10)
    for number in range(40):
        write(tmp_path / f"{number:02d}.parquet", rows(500 + 5 * number, number), "parquet")
    found = survey("train", Source(path=str(tmp_path)), COLUMNS, 100)
    cut = units(Source(path=str(tmp_path)), COLUMNS, 100)
    assert not found.exact
    assert "10 of 40 files" in found.how
    assert found.rows == pytest.approx(sum(unit.rows for unit in cut), rel=0.05)
    assert found.units == pytest.approx(len(cut), rel=0.1)


@pytest.mark.parametrize("rows", [250, 300, 1000])
def test_where_rows_lie_in_small_files_does_not_matter(tmp_path, rows):
    """As many of the sample are from each part of the files, and not more from their ends."""
    for number in range(100):
        table = pa.table({"text": [str(row) for row in range(rows)], "label": ["x"] * rows})
        pq.write_table(table, tmp_path / f"part-{number:03}.parquet")
    found = survey("train", Source(path=str(tmp_path)), Columns("text", label="label"))
    places = np.array([int(text) for text in found.sample["text"].to_pylist()])
    counts = np.bincount(places * -(-rows // 250) // rows)
    assert counts.sum() > 2000 and counts.min() > 0.4 * counts.mean()
    assert not (counts % (rows // len(counts))).any()  # parts are met whole


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
def test_a_limit_counts_and_samples_the_first_rows(tmp_path, format):
    write(tmp_path / f"a.{format}", rows(3000), format)
    write(tmp_path / f"b.{format}", rows(3000), format)
    source = Source(path=str(tmp_path), limit=3500)
    found = survey("train", source, COLUMNS, 200)
    cut = units(source, COLUMNS, 200)
    assert (found.rows, found.units) == (3500, len(cut))
    whole_files = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert found.read_bytes(1) < 0.7 * survey("train", Source(path=str(tmp_path)), COLUMNS, 200).read_bytes(1)
    assert found.read_bytes(1) == pytest.approx(whole_files * 3500 / 6000, rel=0.3)
    whole = pa.concat_tables([Reader(COLUMNS).read(unit).rows for unit in cut])
    assert mean(found.sample) == pytest.approx(mean(whole), rel=0.1)


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    table = [{"text": None if i % 10 == 0 else "fine", "label": "a"} for i in range(5000)]
    found = survey("train", Source(path=str(write(tmp_path / "a.jsonl", table, "jsonl"))), COLUMNS)
    assert (found.looked, found.rejected) == (5000, 500)


def test_a_data_set_that_is_no_files_yet(tmp_path):
    import datasets

    datasets.Dataset.from_list(rows(6000)).save_to_disk(tmp_path / "saved")
    found = survey("train", Source(path=str(tmp_path / "saved")), COLUMNS, 100)
    assert (found.rows, found.units, found.exact) == (6000, 60, True)
    assert mean(found.sample) == pytest.approx(np.mean([len(row["text"]) for row in rows(6000)]), rel=0.05)


def test_bytes_that_are_read_again_and_again(tmp_path):
    """Every process passes over what others encode of a file that can only be read forwards."""
    text = write(tmp_path / "a.jsonl", rows(8000), "jsonl")
    found = survey("train", Source(path=str(text)), COLUMNS, 1000)
    assert found.read_bytes(1) == text.stat().st_size
    assert found.read_bytes(4) == 4 * text.stat().st_size
    assert found.read_bytes(100) == 8 * text.stat().st_size
    groups = write(tmp_path / "b.parquet", rows(8000), "parquet", row_group_size=1000)
    found = survey("train", Source(path=str(groups)), COLUMNS, 1000)
    assert found.read_bytes(100) == groups.stat().st_size


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ("", "a.jsonl", "holds no rows"),
        ('{"text": [1], "label": "a"}\n' * 3, "a.jsonl", "none of the 3 rows looked at can be used: text is a list"),
        ('{"words": "x"}\n', "a.jsonl", "has no column 'text'"),
        ("words\nx\n", "a.csv", "has no column 'text'"),
        ("no parquet", "a.parquet", "cannot be read"),
        ("words", "a.words", "the name does not tell the format"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, content, name, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=says) as error:
        survey("train", Source(path=str(tmp_path / name)), COLUMNS)
    assert "\n" not in str(error.value)


def test_a_record_larger_than_what_is_read_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BYTES", 1 << 16)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * (1 << 20), "label": "a"}) + "\n")
    with pytest.raises(SourceError, match="no record ends"):
        survey("train", Source(path=str(tmp_path / "a.jsonl")), COLUMNS)


def test_files_have_no_splits(tmp_path):
    write(tmp_path / "a.jsonl", rows(10), "jsonl")
    with pytest.raises(SpecError, match="split and config are for hub"):
        survey("train", Source(path=str(tmp_path / "a.jsonl"), split="train"), COLUMNS)


@pytest.mark.parametrize("format", ["csv", "json", "jsonl"])
def test_pieces_of_every_length_hold_whole_records(tmp_path, format):
    """Cut anywhere, a piece gives the first records as they are, and no half one."""
    table = [{"text": f'{i}, "a\nb" \u00e9]}}', "label": "a"} for i in range(12)]
    data = write(tmp_path / f"a.{format}", table, format).read_bytes()
    expected = Reader(COLUMNS).read(units(Source(path=str(tmp_path)), COLUMNS)[0]).rows["text"].to_pylist()
    counts = set()
    for length in range(0, len(data), 3):
        kept = whole_records(data[:length], format)
        if not kept or (format == "csv" and kept.count(b"\n") == 1):
            continue
        (tmp_path / "piece").mkdir(exist_ok=True)
        (tmp_path / "piece" / f"a.{format}").write_bytes(kept)
        source = Source(path=str(tmp_path / "piece"))
        texts = Reader(COLUMNS).read(units(source, COLUMNS)[0]).rows["text"].to_pylist()
        assert texts == expected[: len(texts)]
        counts.add(len(texts))
    assert counts >= set(range(1, 11))
