"""Runs published into tables of Lance: to the bit, each row once, whatever happens meanwhile."""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from chaos import ENVIRONMENT
from chaos import bertray as command
from conftest import MINILM, wait_until

import bertray
from bertray.errors import BertrayError
from bertray.lease import held
from bertray.storage import Location
from bertray.store import Store

lance = pytest.importorskip("lance", reason="needs the extra `lance`")
lancedb = pytest.importorskip("lancedb", reason="needs the extra `lance`")

WIDTH = 32


def rows(count, start=0):
    return [{"id": f"r{i % 50 + start}", "text": f"text number {i}", "label": "ab"[i % 2]} for i in range(count)]


def write(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def spec_of(folder, model, **encoder):
    """60 training rows, of which ten ids occur twice, and 20 test rows that share ids with them."""
    return {
        "data": {
            "train": write(folder / "train.jsonl", rows(60)),
            "test": write(folder / "test.jsonl", rows(20)),
            "id": "id",
            "unit_rows": 10,
        },
        "encoder": {"model": str(model), "pooling": ["mean", "cls"]} | encoder,
        "output": str(folder / "run"),
    }


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory, ray_cluster):
    """That run, embedded once."""
    folder = tmp_path_factory.mktemp("sinks")
    bertray.run(spec_of(folder, tiny), until="embed")
    return folder / "run"


@pytest.fixture
def table(tmp_path):
    return tmp_path / "db" / "texts.lance"


def stores(run):
    return {Store(str(path)).plan()["split"]: Store(str(path)) for path in (run / "stores").iterdir()}


def stored(run, splits, features):
    """How often each row is in the stores, with the bytes of its vectors."""
    return Counter(
        row
        for split in splits
        for part in stores(run)[split].tables(["id", "text", "label", *features])
        for row in as_rows(part, split, features)
    )


def published(table, features, name="run"):
    """The same of a table, of the rows of one run."""
    found = lance.dataset(str(table)).to_table(filter=f"run = '{name}'")
    return Counter(
        row
        for split in set(found["split"].to_pylist())
        for row in as_rows(found.filter(pc.equal(found["split"], split)), split, features)
    )


def as_rows(part, split, features):
    vectors = [part[feature].combine_chunks() for feature in features]
    bits = [np.asarray(each.flatten()).reshape(len(each), -1) for each in vectors]
    for i, texts in enumerate(zip(*(part[name].to_pylist() for name in ("id", "text", "label")), strict=True)):
        yield split, *texts, *((each.dtype.name, each[i].tobytes()) for each in bits)


def count(table):
    return lance.dataset(str(table)).count_rows()


def test_every_row_is_there_once_to_the_bit_however_often_it_is_published(made, table):
    truth = stored(made, ["train", "test"], ["mean_2", "cls_2"])
    for _ in range(3):
        told = bertray.publish(str(made), str(table))
        assert published(table, ["mean_2", "cls_2"]) == truth
    bertray.publish(str(made), str(table), ["cls_2", "mean_2"])
    assert published(table, ["mean_2", "cls_2"]) == truth
    assert sum(truth.values()) == told["rows"] == told["table_rows"] == 80
    assert told["splits"] == {"test": 20, "train": 60}
    assert told["features"] == ["mean_2", "cls_2"]
    schema = lance.dataset(str(table)).schema
    assert schema.names == ["run", "split", "id", "text", "label", "mean_2", "cls_2"]
    assert pa.types.is_fixed_size_list(schema.field("mean_2").type)
    assert schema.field("mean_2").type.list_size == WIDTH


def test_rows_of_others_stay_and_those_that_are_gone_go(made, tiny, tmp_path, table, ray_cluster):
    bertray.publish(str(made), str(table), features=["mean_2"])
    theirs = lancedb.connect(str(table.parent)).open_table("texts")
    own = {"id": "mine", "text": "a row of the application", "mean_2": np.zeros(WIDTH, np.float16)}
    theirs.add(pa.Table.from_pylist([own], schema=pa.schema([theirs.schema.field(name) for name in own])))
    spec = spec_of(tmp_path, tiny)
    write(tmp_path / "train.jsonl", rows(15, 7))
    bertray.run(spec, until="embed")
    bertray.publish(spec["output"], str(table), ["mean_2"], name="it's another")
    assert count(table) == 80 + 1 + 35
    bertray.publish(spec["output"], str(table), ["mean_2"], ["train"])  # in place of the training rows of `run`
    assert count(table) == 15 + 20 + 1 + 35
    assert published(table, ["mean_2"]) == stored(tmp_path / "run", ["train", "test"], ["mean_2"])
    told = bertray.publish(spec["output"], str(table), ["mean_2"])
    assert told["table_rows"] == count(table) == 35 + 1 + 35
    theirs.checkout_latest()
    assert [row["id"] for row in theirs.search().where("run IS NULL").to_list()] == ["mine"]


@pytest.mark.parametrize("harm", ["delete", "compact", "add"])
def test_a_table_that_others_change_meanwhile(made, table, monkeypatch, harm):
    bertray.publish(str(made), str(table))
    commit, harmed = lance.LanceDataset.commit, []

    def after_others(*arguments, **options):
        if not harmed:
            harmed.append(harm)
            other = lance.dataset(str(table))
            if harm == "delete":
                other.delete("id = 'r3'")
            elif harm == "compact":
                assert other.optimize.compact_files().fragments_removed > 1
            else:
                lance.write_dataset(other.head(1).drop_columns(["run"]), str(table), mode="append")
        return commit(*arguments, **options)

    monkeypatch.setattr(lance.LanceDataset, "commit", after_others)
    bertray.publish(str(made), str(table))
    assert harmed
    assert published(table, ["mean_2"]) == stored(made, ["train", "test"], ["mean_2"])
    assert count(table) == 80 + (harm == "add")


def test_upserts_at_once_would_not_do(made, table):
    """Why rows are not merged by id: two calls that know nothing of each other put the same new rows in twice."""
    db = lancedb.connect(str(table.parent))
    one = next(stores(made)["test"].tables(["id", "text", "mean_2"]))
    both = db.create_table("upserts", schema=one.schema), db.open_table("upserts")
    for each in both:
        each.merge_insert(["id"]).when_matched_update_all().when_not_matched_insert_all().execute(one)
    assert db.open_table("upserts").count_rows() == 2 * one.num_rows


def test_the_nearest_texts_by_lancedbs_own_client(demo, table):
    told = bertray.publish(demo["output"], str(table), name="demo")
    assert told["splits"] == {"test": 180, "train": 720}
    predictor = bertray.load(demo["bundle"])
    texts = lancedb.connect(str(table.parent)).open_table("texts")
    (one,) = texts.search().where("split = 'train'").limit(1).to_list()
    query = predictor.vectors([one["text"]])[0]
    first, *others = texts.search(query, vector_column_name="mean_6").distance_type("cosine").limit(5).to_list()
    assert first["id"] == one["id"]
    assert first["_distance"] < 1e-3 < others[0]["_distance"] < others[-1]["_distance"]
    everything = texts.to_arrow()
    vectors = np.asarray(everything["mean_6"].combine_chunks().flatten(), np.float32).reshape(900, -1)
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    best = np.argsort(-cosines)[:5]
    assert [row["id"] for row in (first, *others)] == [everything["id"][int(i)].as_py() for i in best]


# --- killed -----------------------------------------------------------------------------------------------


def kill_amid_writing(run, table):
    process = command("publish", run, table)
    wait_until(lambda: list(table.glob("data/*.lance")), 90, process.stderr.read, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)


def test_killed_amid_writing_nothing_shows_and_the_same_command_does_it(tiny, tmp_path, table, ray_cluster):
    spec = spec_of(tmp_path, tiny)
    spec["data"] |= {"train": write(tmp_path / "train.jsonl", rows(4_000)), "unit_rows": 100}
    bertray.run(spec, until="embed")
    for _ in range(5):
        kill_amid_writing(spec["output"], table)
        if not count(table):
            break
        shutil.rmtree(table)  # it was too quick
    assert not count(table)
    process = command("publish", spec["output"], table, "--json")
    answer, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert json.loads(answer)["table_rows"] == 4_020
    truth = stored(tmp_path / "run", ["train", "test"], ["mean_2", "cls_2"])
    assert published(table, ["mean_2", "cls_2"]) == truth
    files = set(table.glob("data/*.lance"))
    assert len(files) > len(lance.dataset(str(table)).get_fragments())
    theirs = lancedb.connect(str(table.parent)).open_table("texts")
    with pytest.warns(UserWarning, match="cleanup_older_than=0"):
        theirs.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
    assert len(set(table.glob("data/*.lance")) - files) == len(lance.dataset(str(table)).get_fragments())
    assert not files & set(table.glob("data/*.lance"))
    assert published(table, ["mean_2", "cls_2"]) == truth


def test_an_index_stays(demo, table):
    bertray.publish(demo["output"], str(table))
    texts = lancedb.connect(str(table.parent)).open_table("texts")
    texts.create_index(
        "mean_6", config=lancedb.index.IvfPq(distance_type="cosine", num_partitions=2, num_sub_vectors=16)
    )
    (index,) = texts.list_indices()
    bertray.publish(demo["output"], str(table))
    texts = lancedb.connect(str(table.parent)).open_table("texts")
    assert texts.index_stats(index.name).num_unindexed_rows == 900
    texts.optimize()
    assert texts.index_stats(index.name).num_indexed_rows == 900


def test_on_an_object_store(made, s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.setitem(ENVIRONMENT, name, os.environ[name])
    for _ in range(2):
        process = command(
            "publish", made, f"{s3}/db/texts.lance", "--splits", "train", "--features", "mean_2", "--json"
        )
        answer, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        assert json.loads(answer)["table_rows"] == 60
    options = {"allow_http": "true"}
    found = lancedb.connect(f"{s3}/db", storage_options=options).open_table("texts")
    assert found.count_rows() == 60


# --- what can be mended -----------------------------------------------------------------------------------


def refused(*arguments, **options):
    with pytest.raises(BertrayError) as caught:
        bertray.publish(*map(str, arguments), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_refused_before_anything_is_written(made, tmp_path, table):
    assert "is not the folder of a run" in refused(tmp_path, table)
    assert "must end in .lance" in refused(made, tmp_path / "texts")
    assert "has no split 'dev'. It has test, train." in refused(made, table, splits=["dev"])
    assert "has no feature mean_1. It has mean_2, cls_2." in refused(made, table, features=["mean_1"])
    assert not table.exists()


def test_a_run_that_is_not_complete(made, tmp_path, table):
    run = shutil.copytree(made, tmp_path / "run")
    (manifest,) = run.glob("stores/test-*/manifest.json")
    manifest.unlink()
    assert f"test of {run} is not complete" in refused(run, table)
    assert bertray.publish(str(run), str(table), splits=["train"])["rows"] == 60


def test_a_damaged_shard_stops_it_and_changes_nothing(made, tmp_path, table):
    run = shutil.copytree(made, tmp_path / "run")
    before = bertray.publish(str(run), str(table))
    shard = sorted(run.glob("stores/train-*/shards/*.parquet"))[2]
    broken = bytearray(shard.read_bytes())
    broken[len(broken) // 2] ^= 1
    shard.write_bytes(broken)
    line = refused(run, table)
    assert shard.name in line and "verify --repair" in line
    assert lance.dataset(str(table)).version == before["version"]


def test_a_table_of_other_columns_or_of_another_encoder(made, tiny, tmp_path, table, ray_cluster):
    import torch
    from transformers import BertModel

    bertray.publish(str(made), str(table), features=["mean_2"])
    assert "it differs in cls_2. Delete it, or give another destination" in refused(made, table)
    other = shutil.copytree(tiny, tmp_path / "other")
    model = BertModel.from_pretrained(other)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight += 1
    model.save_pretrained(other)
    bertray.run(spec_of(tmp_path, other), until="embed")
    line = refused(tmp_path / "run", table, features=["mean_2"], name="theirs")
    assert "holds vectors of another encoder in mean_2" in line
    (tmp_path / "wide").mkdir()
    bertray.run(spec_of(tmp_path / "wide", MINILM, layers=[2], precision="fp32"), until="embed")
    wide = tmp_path / "wide" / "run"
    assert "it differs in mean_2" in refused(wide, table, features=["mean_2"])
    assert count(table) == 80
    bertray.publish(str(wide), str(tmp_path / "wide.lance"))
    assert published(tmp_path / "wide.lance", ["mean_2"]) == stored(wide, ["train", "test"], ["mean_2"])
    assert lance.dataset(str(tmp_path / "wide.lance")).schema.field("mean_2").type == pa.list_(pa.float32(), 384)


def test_of_several_stores_of_a_split_that_of_the_head_is_taken(demo, tmp_path, table):
    run = shutil.copytree(demo["output"], tmp_path / "run")
    (train,) = run.glob("stores/train-*")
    shutil.copytree(train, run / "stores" / "train-of-another-precision")
    plan = json.loads((run / "stores" / "train-of-another-precision" / "plan.json").read_text())
    plan["encoder"]["precision"] = "fp32"
    (run / "stores" / "train-of-another-precision" / "plan.json").write_text(json.dumps(plan))
    assert bertray.publish(str(run), str(table))["splits"] == {"test": 180, "train": 720}
    shutil.rmtree(run / "head")
    assert f"Give one of {train.name}, train-of-another-precision as the split" in refused(run, table)
    assert bertray.publish(str(run), str(table), splits=[train.name])["rows"] == 720
    assert "are stores of one split" in refused(run, table, splits=[train.name, "train-of-another-precision"])


def test_vectors_of_words_and_of_pairs(tiny, tmp_path, table, ray_cluster):
    words = [{"text": ["a", "word"], "label": ["O", "B-x"]}] * 4
    spec = {
        "task": "token-classification",
        "data": {"train": write(tmp_path / "words.jsonl", words)},
        "encoder": {"model": str(tiny), "pooling": "first"},
        "output": str(tmp_path / "words"),
    }
    bertray.run(spec, until="embed")
    assert "has vectors of words" in refused(spec["output"], table)
    pairs = [{"text": f"one {i % 3}", "other": f"two {i % 2}", "label": "ab"[i % 2]} for i in range(6)]
    spec = {
        "data": {"train": write(tmp_path / "pairs.jsonl", pairs), "text_pair": "other"},
        "encoder": {"model": str(tiny), "pooling": "mean", "pair": "siamese"},
        "output": str(tmp_path / "pairs"),
    }
    bertray.run(spec, until="embed")
    assert "give the split texts" in refused(spec["output"], table, splits=["train"])
    assert bertray.publish(spec["output"], str(table))["splits"] == {"texts": 5}
    texts = lance.dataset(str(table)).to_table(["text"])["text"].to_pylist()
    assert sorted(texts) == ["one 0", "one 1", "one 2", "two 0", "two 1"]


def test_without_lance_or_while_another_publishes(made, table, monkeypatch):
    with held(Location(str(table))):
        assert "Another run" in refused(made, table)
    monkeypatch.setitem(sys.modules, "lance", None)
    assert "pip install 'bertray[lance]'" in refused(made, table)


def test_the_commands_line(made, tmp_path):
    process = command("publish", made, tmp_path / "texts")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("bertray: ") and errors.count("\n") == 1
