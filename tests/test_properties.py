"""What holds for any rows: units, order, ids and packs, by hypothesis."""

import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertray.checkpoints import find
from bertray.encoder import Encoder
from bertray.sources import Columns, Reader, units
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import Source
from bertray.store import Receipt, Store, with_vectors
from bertray.tokens import Tokens

COLUMNS = Columns("text", label="label")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
many_texts = st.lists(texts, min_size=1, max_size=60)
quick = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(folder, name, rows, groups=7):
    path = Path(folder) / name
    if name.endswith(".parquet"):
        table = pa.table({"text": pa.array(rows, pa.string()), "label": [i % 3 for i in range(len(rows))]})
        pq.write_table(table, path, row_group_size=groups)
    else:
        lines = (json.dumps({"text": text, "label": i % 3}, ensure_ascii=i % 2 == 0) for i, text in enumerate(rows))
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def covers(cut, count):
    """Whether units of one file hold each of its rows once, in order."""
    return [row for unit in cut for row in range(unit.start, unit.stop)] == list(range(count))


@quick
@given(many_texts, st.integers(1, 70), st.integers(1, 30), st.sampled_from(["rows.jsonl", "rows.parquet"]))
def test_units_hold_every_row_once_in_order_however_they_are_read(rows, unit_rows, groups, name):
    with tempfile.TemporaryDirectory() as folder:
        source = Source(path=str(write(folder, name, rows, groups)))
        cut = units(source, COLUMNS, unit_rows)
        assert covers(cut, len(rows))
        assert all(unit.stop - unit.start <= unit_rows for unit in cut)
        assert len({unit.key for unit in cut}) == len(cut)
        assert cut == units(source, COLUMNS, unit_rows)
        if name.endswith(".parquet"):  # within one row group, or whole ones
            for unit in cut:
                within = unit.start // groups == (unit.stop - 1) // groups
                assert within or (unit.start % groups == 0 and unit.stop % groups in (0, len(rows) % groups))
        reader, read = Reader(COLUMNS), {}
        for unit in random.Random(len(rows)).sample(cut, len(cut)):
            read[unit.start] = reader.read(unit).rows
        table = pa.concat_tables([read[start] for start in sorted(read)])
        assert table["text"].to_pylist() == rows
        assert table["id"].to_pylist() == [f"{name}:{i}" for i in range(len(rows))]


@quick
@given(st.lists(many_texts, min_size=1, max_size=4), many_texts, st.integers(1, 20), st.integers(0, 80))
def test_files_that_are_added_move_nothing_and_limits_hold(files, added, unit_rows, limit):
    with tempfile.TemporaryDirectory() as folder:
        for number, rows in enumerate(files):
            write(folder, f"{2 * number}.jsonl", rows)
        before = units(Source(path=folder), COLUMNS, unit_rows)
        limited = units(Source(path=folder, limit=limit), COLUMNS, unit_rows)
        total = sum(map(len, files))
        assert sum(unit.stop - unit.start for unit in limited) == (min(limit, total) if limit else total)
        assert {unit.key for unit in limited[:-1]} <= {unit.key for unit in before}
        write(folder, "1.jsonl", added)
        after = units(Source(path=folder), COLUMNS, unit_rows)
        assert [unit.key for unit in after if unit.name != "1.jsonl"] == [unit.key for unit in before]
        ids = [one for unit in after for one in Reader(COLUMNS).read(unit).rows["id"].to_pylist()]
        assert len(ids) == len(set(ids)) == total + len(added)


@quick
@given(st.lists(st.integers(1, 50), max_size=80), st.integers(1, 120), st.booleans())
def test_packs_hold_every_text_once_within_the_budget(lengths, budget, equal):
    lengths = sorted(lengths, reverse=True)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1])
    tokens = Tokens(ids, ids % 2, offsets, np.zeros(len(lengths), bool))
    packs = list(tokens.packs(budget, equal))
    assert [row for start, stop in packs for row in range(start, stop)] == list(range(len(lengths)))
    for start, stop in packs:
        assert stop - start == 1 or sum(lengths[start:stop]) <= budget
        assert not equal or len(set(lengths[start:stop])) == 1


@quick
@given(st.data())
def test_texts_are_taken_with_their_tokens(data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=30))
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=30))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1])
    taken = Tokens(ids, ids % 2, offsets, np.arange(len(lengths)) % 3 == 0).take(np.array(rows, np.int64))
    expected = [list(range(offsets[row], offsets[row + 1])) for row in rows]
    assert taken.ids.tolist() == [one for each in expected for one in each]
    assert taken.lengths.tolist() == [len(each) for each in expected]
    assert taken.truncated.tolist() == [row % 3 == 0 for row in rows]


@pytest.fixture(scope="module")
def encoder(tiny):
    return Encoder(
        find(str(tiny)), EncoderSpec(pooling="mean", precision="fp32", max_length=16, truncation="window", overlap=4)
    )


@quick
@given(many_texts, st.randoms(use_true_random=False))
def test_vectors_do_not_depend_on_order_or_neighbours(encoder, rows, rng):
    order = rng.sample(range(len(rows)), len(rows))
    whole, mixed = encoder.encode(rows), encoder.encode([rows[i] for i in order])
    np.testing.assert_allclose(mixed.vectors, whole.vectors[order], atol=1e-5)
    np.testing.assert_array_equal(mixed.tokens, whole.tokens[order])
    np.testing.assert_array_equal(mixed.windows, whole.windows[order])
    alone = encoder.encode(rows[:1])
    np.testing.assert_allclose(alone.vectors[0], whole.vectors[0], atol=1e-5)


@quick
@given(many_texts, st.sets(st.integers(0, 59)))
def test_rows_that_fail_leave_the_others_as_they_are(encoder, rows, bad):
    broken = ["\ud800" if i in bad else text for i, text in enumerate(rows)]
    encoded, failed = encoder.encode_rows(broken)
    assert set(failed) == {i for i in bad if i < len(rows)}
    good = [i for i in range(len(rows)) if i not in failed]
    if good:
        np.testing.assert_allclose(encoded.vectors[good], encoder.encode([rows[i] for i in good]).vectors, atol=1e-5)


@quick
@given(many_texts, st.integers(0, 2**32 - 1), st.data())
def test_a_shard_comes_back_as_it_was_and_no_flipped_bit_is_missed(rows, seed, data):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        vectors = np.random.default_rng(seed).normal(size=(len(rows), 3)).astype(np.float16)
        table = pa.table({"id": [str(i) for i in range(len(rows))], "text": rows, "label": rows})
        nothing = pa.table({"id": pa.array([], pa.string()), "reason": [], "preview": []})
        receipt = store.write_shard(
            Receipt("u", len(rows), 0, 0, 0, 0, 0.0, dict.fromkeys(rows, 1)), with_vectors(table, vectors), nothing
        )
        assert store.receipt("u") == receipt
        assert store.check(receipt).select(["id", "text", "label"]).equals(table)
        shard = Path(store.shard("u").path)
        content = bytearray(shard.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        shard.write_bytes(content)
        with pytest.raises(Exception, match="its shard"):
            store.check(receipt)
