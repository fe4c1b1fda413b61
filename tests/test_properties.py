"""What holds for any rows: every row once, in order, however files are cut, read and packed."""

import csv
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import with_vectors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bertray.errors import StoreError
from bertray.sources import Columns, Reader, units
from bertray.spec import Source
from bertray.store import Receipt, Store
from bertray.tokens import Tokens

few = settings(max_examples=60, deadline=None, derandomize=True)
LABELLED = Columns("text", label="label")
TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["", " ", "a\nb", "a\r\nb", "\x85\u2028", '"', "\ufeff", "\x00"])
)
LABELS = st.one_of(st.text(min_size=1, max_size=3), st.sampled_from(["0", "1"]))
ROWS = st.lists(st.fixed_dictionaries({"text": TEXTS, "label": LABELS}), min_size=1, max_size=40)
BAD = st.one_of(st.none(), st.booleans(), st.lists(st.integers(), max_size=2), st.just({"a": 1}), st.just("\ud800"))
RECORDS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"text": TEXTS, "label": st.one_of(LABELS, st.integers(), st.booleans(), st.floats())}),
        st.fixed_dictionaries({"text": BAD, "label": LABELS}),
        st.fixed_dictionaries({"text": TEXTS}),
        BAD,
        st.sampled_from([b"oops", b'{"text": "cut', b"", b"\xff", b"[" * 5000]),
    ),
    max_size=30,
)
UNIT_ROWS = st.one_of(st.integers(1, 15), st.just("auto"))


def write(folder, format, rows, group=7, name="rows"):
    path = Path(folder) / f"{name}.{format}"
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    elif format == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif format == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        out = io.StringIO(newline="")
        lines = csv.writer(out, delimiter="\t" if format == "tsv" else ",", quoting=csv.QUOTE_ALL, lineterminator="\n")
        lines.writerows([["text", "label"], *([row["text"], row["label"]] for row in rows)])
        path.write_bytes(out.getvalue().encode())
    return path


def covers(cut, rows):
    """Whether units are all rows from 0 on, in order, each once, and have names of their own."""
    edges = [(unit.start, unit.stop) for unit in cut]
    assert all(start < stop for start, stop in edges)
    assert [start for start, _ in edges] == [0, *(stop for _, stop in edges[:-1])]
    assert edges[-1][1] == rows
    assert len({unit.key for unit in cut}) == len(cut)
    return True


@pytest.mark.parametrize("format", ["parquet", "csv", "tsv", "jsonl", "json"])
@few
@given(rows=ROWS, unit_rows=UNIT_ROWS, group=st.integers(1, 20), random=st.randoms())
def test_units_cover_every_row_once_in_any_order_of_reading(format, rows, unit_rows, group, random):
    with TemporaryDirectory() as folder:
        source = Source(path=str(write(folder, format, rows, group)))
        cut = units(source, LABELLED, unit_rows)
        assert covers(cut, len(rows))
        assert unit_rows == "auto" or all(unit.stop - unit.start <= unit_rows for unit in cut)
        assert [unit.key for unit in units(source, LABELLED, unit_rows)] == [unit.key for unit in cut]
        reader, found = Reader(LABELLED), {}
        for unit in random.sample(cut, len(cut)):
            found[unit.start] = reader.read(unit)
        assert not any(batch.rejects.num_rows for batch in found.values())
        table = pa.concat_tables([found[unit.start].rows for unit in cut])
        assert table["text"].to_pylist() == [row["text"] for row in rows]
        assert table["label"].to_pylist() == [row["label"] for row in rows]
        assert table["id"].to_pylist() == [f"rows.{format}:{i}" for i in range(len(rows))]


@few
@given(rows=ROWS, group=st.integers(1, 20), unit_rows=st.integers(1, 15))
def test_no_unit_spans_parts_of_two_row_groups(rows, group, unit_rows):
    with TemporaryDirectory() as folder:
        cut = units(Source(path=str(write(folder, "parquet", rows, group))), LABELLED, unit_rows)
        for unit in cut:
            whole = unit.start % group == 0 and (unit.stop % group == 0 or unit.stop == len(rows))
            assert whole or unit.start // group == (unit.stop - 1) // group


@few
@given(records=RECORDS, unit_rows=UNIT_ROWS)
@example(records=[{"text": "a", "label": 1.5}, {"text": "b", "label": True}], unit_rows=1)
def test_bad_records_are_set_aside_alike_at_any_cut(records, unit_rows):
    """A good one stands first: with none, the file is refused."""
    lines = [json.dumps({"text": "first", "label": "x"}).encode()]
    lines += [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        source = Source(path=str(path))
        whole = Reader(LABELLED).read(units(source, LABELLED)[0])
        parts = [Reader(LABELLED).read(unit) for unit in units(source, LABELLED, unit_rows)]
        assert whole.rows.num_rows + whole.rejects.num_rows == len(lines)
        assert [row for part in parts for row in part.rows.to_pylist()] == whole.rows.to_pylist()
        assert [row for part in parts for row in part.rejects.to_pylist()] == whole.rejects.to_pylist()
        ids = whole.rows["id"].to_pylist() + whole.rejects["id"].to_pylist()
        assert sorted(ids) == sorted(f"rows.jsonl:{i}" for i in range(len(lines)))
        kept = {i for i, record in enumerate(records, 1) if is_good(record)}
        assert {int(i.rpartition(":")[2]) for i in whole.rows["id"].to_pylist()} == {0, *kept}


def is_good(record):
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or record["text"] == "\ud800":
        return False
    label = record.get("label")
    return label is not None and (not isinstance(label, float) or (label.is_integer() and abs(label) < 2**63))


@few
@given(
    sizes=st.lists(st.integers(0, 25), min_size=2, max_size=5).filter(any),
    unit_rows=UNIT_ROWS,
    limit=st.integers(0, 130),
    format=st.sampled_from(["csv", "parquet"]),
)
def test_units_depend_on_their_file_alone_and_a_limit_holds(sizes, unit_rows, limit, format):
    rows = [{"text": f"t{i}", "label": "x"} for i in range(25)]
    with TemporaryDirectory() as folder:
        files = [write(folder, format, rows[:size], name=f"f{i}") for i, size in enumerate(sizes) if size]
        alone = [unit for file in files for unit in units(Source(path=str(file)), LABELLED, unit_rows)]
        together = units(Source(path=folder), LABELLED, unit_rows)
        assert together == alone
        assert len({unit.key for unit in together}) == len(together)
        limited = units(Source(path=folder, limit=limit), LABELLED, unit_rows)
        texts = [text for unit in limited for text in Reader(LABELLED).read(unit).rows["text"].to_pylist()]
        every = [row["text"] for size in sizes for row in rows[:size]]
        assert texts == (every[:limit] if limit else every)


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


def of_lengths(lengths):
    """Texts of those many tokens, no two tokens alike."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1])
    return Tokens(ids, ids % 2, offsets, np.arange(len(lengths)) % 3 == 0)


@few
@given(lengths=LENGTHS, random=st.randoms())
def test_taken_tokens_are_those_of_the_texts_taken(lengths, random):
    tokens = of_lengths(lengths)
    order = np.array(random.choices(range(len(lengths)), k=random.randrange(2 * len(lengths))), np.int64)
    taken = tokens.take(order)
    assert taken.lengths.tolist() == [lengths[i] for i in order]
    assert taken.truncated.tolist() == tokens.truncated[order].tolist()
    for place, i in enumerate(order):
        here, there = (slice(*t.offsets[j : j + 2]) for t, j in ((taken, place), (tokens, i)))
        assert taken.ids[here].tolist() == tokens.ids[there].tolist()
        assert taken.types[here].tolist() == tokens.types[there].tolist()


@few
@given(lengths=LENGTHS, budget=st.integers(1, 200), equal=st.booleans())
def test_packs_hold_every_text_once_within_the_budget(lengths, budget, equal):
    tokens = of_lengths(sorted(lengths, reverse=True) if equal else lengths)
    packs = list(tokens.packs(budget, equal))
    assert [start for start, _ in packs] == [0, *(end for _, end in packs[:-1])]
    assert packs[-1][1] == len(lengths)
    for start, end in packs:
        assert end - start == 1 or tokens.offsets[end] - tokens.offsets[start] <= budget
        assert end == tokens.pack_end(start, budget, equal)
        inside = tokens.lengths[start:end]
        assert not equal or len(set(inside.tolist())) == 1
        if end < len(lengths):  # none that would have fitted is left out
            more = tokens.offsets[end + 1] - tokens.offsets[start]
            assert more > budget or (equal and tokens.lengths[end] != inside[0])


@pytest.fixture(scope="module")
def encoder(tiny):
    from bertray.checkpoints import find
    from bertray.encoder import Encoder
    from bertray.spec import Encoder as EncoderSpec

    return Encoder(find(str(tiny)), EncoderSpec(pooling="mean", precision="fp32"))


@settings(few, max_examples=25)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=20), random=st.randoms())
def test_vectors_of_shuffled_texts_are_the_shuffled_vectors(encoder, texts, random):
    order = random.sample(range(len(texts)), len(texts))
    straight, shuffled = encoder.encode(texts), encoder.encode([texts[i] for i in order])
    assert np.isfinite(straight.vectors).all()
    np.testing.assert_allclose(shuffled.vectors, straight.vectors[order], atol=1e-5)
    assert shuffled.tokens.tolist() == straight.tokens[order].tolist()


@few
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=40), st.data())
def test_a_shard_comes_back_as_it_was_and_no_flipped_bit_is_missed(texts, data):
    with TemporaryDirectory() as folder:
        store = Store(folder)
        vectors = np.random.default_rng(len(texts)).normal(size=(len(texts), 3)).astype(np.float16)
        rows = pa.table({"id": [str(i) for i in range(len(texts))], "text": texts, "label": texts})
        nothing = pa.table({"id": pa.array([], pa.string()), "reason": [], "preview": []})
        receipt = Receipt("unit", len(texts), 0, 0, 0, 0, 0.0, dict.fromkeys(texts, 1))
        receipt = store.write_shard(receipt, with_vectors(rows, vectors), nothing)
        assert store.receipt("unit") == receipt
        assert store.check(receipt).select(["id", "text", "label"]).equals(rows)
        shard = Path(store.shard("unit").path)
        content = bytearray(shard.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        shard.write_bytes(content)
        with pytest.raises(StoreError, match="its shard"):
            store.check(receipt)
