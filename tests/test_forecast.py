"""A forecast against what comes true: the same spec is embedded, and requests are counted at a real server."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MINILM, ROOT

import bertray
from bertray import checkpoints, survey
from bertray import forecast as module
from bertray.cluster import _CPUS_PER_WORKER
from bertray.errors import BertrayError
from bertray.forecast import forecast, lines
from bertray.rates import table
from bertray.spec import load_spec
from bertray.splits import plan_of, splits_of
from bertray.storage import Location

WORDS = np.array(["good", "bad", "weather", "train", "late", "happy", "seldom", "unbelievable", "so", "very"])


def rows(path, count, words=12, seed=0, **options):
    """A Parquet or JSON Lines file of so many texts, of some length in the mean."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 2 * words))) for _ in range(count)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "label": ["a", "b"] * (count // 2)}), path, **options)
    else:
        path.write_text(
            "".join(json.dumps({"text": text, "label": "ab"[i % 2]}) + "\n" for i, text in enumerate(texts))
        )
    return str(path)


def spec_of(tmp_path, train, model, **encoder):
    return {
        "data": {"train": train},
        "encoder": {"model": str(model), "pooling": "mean", **encoder},
        "output": str(tmp_path / "run"),
    }


def stored(folder):
    """Bytes of all shards."""
    return sum(file.size for file in Location(str(folder)).files() if file.name.endswith(".parquet"))


def test_what_is_told_comes_true(tmp_path, ray_cluster, monkeypatch):
    """Rows, units, tokens and storage within some per cent; the time of one process on CPUs within a factor of two, on
    a machine on which others may be at work."""
    monkeypatch.setattr(survey, "_BYTES", 1 << 18)  # less than the file: its rows are estimated
    spec = spec_of(tmp_path, rows(tmp_path / "rows.jsonl", 6000), MINILM, layers=(0, 1, 2))
    spec["data"]["unit_rows"] = 450
    before = forecast(spec, measure=True)
    summary = bertray.run(spec, until="embed")
    after = forecast(spec, measure=True)
    true, (part,) = summary["rows"]["train"], before["splits"]
    assert not part["counted"] and part["sampled_rows"] < true["rows"]
    assert before["rows"] == pytest.approx(true["rows"], rel=0.03)
    assert abs(before["units"] - len(list((tmp_path / "run").rglob("shards/*.parquet")))) <= 1
    assert before["tokens"] == pytest.approx(true["tokens"], rel=0.04)
    assert before["stored_bytes"] == pytest.approx(stored(tmp_path / "run" / "stores"), rel=0.04)
    told = [found["seconds"]["encoding"] for found in (before, after)]
    assert min(told) / 2 < summary["seconds"]["embed"] < 2 * max(told), (told, summary["seconds"])
    assert (before["workers"], before["rate"]["kind"]) == (1, "measured here")


@pytest.mark.parametrize("name", ["entities", "questions", "pairs"])
def test_all_kinds_of_tasks(tmp_path, name, monkeypatch, ray_cluster, tiny):
    monkeypatch.chdir(ROOT)
    changes = [f"output={tmp_path / 'run'}", f"encoder.model={tiny}", "encoder.layers=last"]
    found = forecast(f"jobs/specs/{name}.yaml", overrides=changes)
    summary = bertray.run(f"jobs/specs/{name}.yaml", overrides=changes, until="embed")
    siamese = load_spec(f"jobs/specs/{name}.yaml").encoder.pair == "siamese"
    for part in found["splits"]:
        true = summary["rows"][part["split"]]
        assert part["rows"] == true["rows"]
        if not siamese:
            assert part["tokens"] == pytest.approx(true["tokens"], rel=0.001)
    shards = stored(tmp_path / "run" / "stores")
    if siamese:  # texts that occur again are encoded once: it is told what it takes at most
        assert found["tokens"] >= summary["rows"]["texts"]["tokens"]
        assert found["stored_bytes"] > 0.9 * shards
    else:
        assert found["stored_bytes"] == pytest.approx(shards, rel=0.06)


def test_long_texts(tmp_path, tiny):
    train = rows(tmp_path / "rows.jsonl", 2000, words=30)
    whole, cut, windows = (
        forecast(spec_of(tmp_path, train, tiny, **settings))
        for settings in ({}, {"max_length": 16}, {"max_length": 16, "overlap": 4, "truncation": "window"})
    )
    assert whole["lengths"]["over"] == 0 and whole["lengths"]["tokens_kept"] == 1
    assert cut["lengths"]["mean"] == windows["lengths"]["mean"] == whole["lengths"]["mean"]
    assert 0.7 < cut["lengths"]["over"] < 0.9
    assert cut["tokens"] < whole["tokens"] < windows["tokens"]
    assert "cut" in " ".join(lines(cut)) and "encoded in windows" in " ".join(lines(windows))
    errors = forecast(spec_of(tmp_path, train, tiny, max_length=16, truncation="error"))
    assert errors["rows"] == round(2000 * (1 - cut["lengths"]["over"]))
    assert errors["splits"][0]["set_aside"] == 2000 - errors["rows"]


def test_the_hours_can_be_reckoned_from_what_is_told(tmp_path, tiny):
    train = rows(tmp_path / "rows.jsonl", 4000)
    found = forecast(spec_of(tmp_path, train, tiny), gpus=3, gpu="l4", price=0.8)
    seconds, workers = found["seconds"], found["workers"]
    rate = found["rate"]["tokens_per_second"]
    assert seconds["encoding"] == pytest.approx(found["tokens"] / rate / 3, rel=0.01, abs=0.002)
    pace = max(seconds[name] for name in ("encoding", "tokenizing", "rows", "store", "requests"))
    share = found["units"] / workers
    assert seconds["counting"] == pytest.approx((tmp_path / "rows.jsonl").stat().st_size / 125e6, abs=0.001)
    total = seconds["start"] + seconds["counting"] + pace * np.ceil(share) / share
    assert seconds["total"] == pytest.approx(total, rel=0.01)
    assert found["hours"] == pytest.approx(total / 3600, rel=0.01)
    assert found["cost"] == pytest.approx(0.8 * 3 * found["hours"])
    assert found["rate"]["kind"] == "estimate"
    text = "\n".join(lines(found))
    assert "start + counting + " in text
    assert "ESTIMATE" in text and "published: NVIDIA" in text
    for number in (f"{found['tokens']:,}", f"{found['rows']:,}", f"{found['units']:,} units"):
        assert number in text


def test_too_few_units_are_told_with_a_size_that_helps(tmp_path, tiny):
    train = rows(tmp_path / "rows.parquet", 6000)
    spec = spec_of(tmp_path, train, tiny)
    slow = {"gpus": 40, "gpu": "t4", "bandwidth": 0.001}  # so slow a store that the start is short
    found = forecast(spec, **slow)
    assert found["bottleneck"]["name"] == "units" and found["idle_share"] > 0.5
    spec["data"]["unit_rows"] = int(found["bottleneck"]["do"].rpartition(" ")[2])
    again = forecast(spec, **slow)
    assert again["idle_share"] < 0.1 and again["bottleneck"]["name"] != "units"


def test_each_bottleneck_can_be_met(tmp_path, tiny, monkeypatch):
    train = rows(tmp_path / "rows.jsonl", 4000)
    spec = spec_of(tmp_path, train, tiny)
    assert forecast(spec)["bottleneck"]["name"] == "start"
    monkeypatch.setitem(table()["start"], "seconds", 0.0)
    slow = forecast(spec, bandwidth=0.01, cpus=8)
    assert slow["bottleneck"]["name"] == "store"
    assert "read 2 times over" in slow["bottleneck"]["why"] or "fewer layers" in slow["bottleneck"]["do"]
    large = forecast(spec_of(tmp_path, train, MINILM))
    assert large["bottleneck"]["name"] == "encoding"
    # A tiny encoder on a large GPU waits for what prepares its rows.
    assert forecast(spec, gpus=1, gpu="h200", bandwidth=1e6)["bottleneck"]["name"] in ("tokenizing", "rows")


def test_requests_are_those_that_a_worker_makes(tmp_path, tiny, s3, monkeypatch):
    """Counted at the server: what one process asks of it for the units of two files, and nothing else."""
    import moto.moto_server.werkzeug_app as server

    from bertray.worker import Job, UnitEncoder

    asked = []
    answer = server.DomainDispatcherApplication.__call__

    def counted(self, environ, start):
        asked.append(environ["REQUEST_METHOD"])
        return answer(self, environ, start)

    for number in range(2):
        name = rows(tmp_path / f"{number}.parquet", 1000, seed=number)
        Location(f"{s3}/plan/{number}.parquet").write((tmp_path / name).read_bytes())
    spec = {**spec_of(tmp_path, f"{s3}/plan", tiny), "output": f"{s3}/planned"}
    spec["data"]["unit_rows"] = 100
    found = forecast(spec, cpus=1)
    assert found["units"] == 20
    loaded, checkpoint = load_spec(spec), checkpoints.find(str(tiny))
    (split,), _ = splits_of(loaded, checkpoint, Location(loaded.output), dict.fromkeys(("train", "dev", "test")))
    split.store.write_plan(plan_of(split, loaded.encoder, checkpoint, ()))
    columns, stores = {"train": split.columns}, {"train": split.store}
    worker = UnitEncoder(
        Job(checkpoint.name, "main", checkpoint.identity, loaded.encoder, (), columns, stores), "cpu", 1
    )
    monkeypatch.setattr(server.DomainDispatcherApplication, "__call__", counted)
    for unit in split.units:
        (answered,) = worker(pa.Table.from_pylist([{"units": [{"split": "train", **vars(unit)}]}])).to_pylist()
        assert not answered["error"], answered
    reads = sum(method in ("GET", "HEAD") for method in asked)
    assert found["requests"]["reads"] == pytest.approx(reads, rel=0.1)
    assert found["requests"]["writes"] == pytest.approx(len(asked) - reads, rel=0.1)
    assert found["stored_bytes"] == pytest.approx(stored(f"{s3}/planned"), rel=0.03)
    assert "reads and" in "\n".join(lines(found))
    few = forecast(spec, overrides=["data.unit_rows=1000"])
    assert few["requests"]["writes"] < found["requests"]["writes"] / 5


def test_the_command_tells_the_same_without_ray(tmp_path, tiny):
    train = rows(tmp_path / "rows.jsonl", 1000)
    (tmp_path / "spec.yaml").write_text(json.dumps(spec_of(tmp_path, train, tiny)))
    arguments = ["plan", str(tmp_path / "spec.yaml"), "--gpus", "64", "--gpu", "h200", "--price", "4.0"]
    code = "import sys; from bertray.cli import main; code = main(); assert 'ray' not in sys.modules; sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found, own = json.loads(done.stdout), forecast(tmp_path / "spec.yaml", gpus=64, gpu="h200", price=4.0)
    for name in ("rows", "units", "tokens", "stored_bytes", "lengths", "rate", "splits"):
        assert found[name] == own[name]
    assert not (tmp_path / "run").exists()


def test_processes_are_counted_as_the_cluster_does(tmp_path, tiny):
    train = rows(tmp_path / "rows.jsonl", 100)
    spec = spec_of(tmp_path, train, tiny)
    assert module._THREADS == _CPUS_PER_WORKER
    for options, expected in (
        ({"cpus": 64}, (64, 16, 4)),
        ({"cpus": 3}, (3, 1, 3)),
        ({"gpus": 8, "gpu": "l4"}, (8, 8, 4)),
        ({"gpus": 8, "gpu": "l4", "cpus": 16}, (8, 8, 2)),
        ({"gpu": "a100"}, (1, 1, 4)),
        ({"cpus": 64, "overrides": ["ray.cpus_per_worker=8"]}, (64, 8, 8)),
        ({"cpus": 64, "overrides": ["ray.workers=64"]}, (64, 64, 1)),
        ({"cpus": 64, "overrides": ["ray.workers=20"]}, (64, 20, 3)),
        ({"cpus": 64, "overrides": ["ray.workers=2"]}, (64, 2, 4)),
    ):
        found = forecast(spec, **options)
        assert (found["count"], found["workers"], found["threads"]) == expected, options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gpus": 64, "gpu": "h300"}, r"gpu must be one of h200, h100, .*Got 'h300' instead"),
        ({"gpus": 64}, r"gpus need a gpu: which of h200"),
        ({"gpus": 0, "gpu": "l4"}, r"gpus must be a number above 0. Got 0"),
        ({"gpus": -1, "gpu": "l4"}, r"gpus must be a number above 0. Got -1"),
        ({"cpus": 2, "overrides": ["ray.workers=3"]}, r"ray.workers 3 of 1 CPUs each are more than 2 CPUs"),
        ({"cpus": 0}, r"cpus must be a number above 0"),
        ({"price": -4.0}, r"price must be a number above 0. Got -4"),
        ({"price": float("nan")}, r"price must be a number above 0. Got nan"),
        ({"bandwidth": 0.0}, r"bandwidth must be a number above 0"),
        ({"gpus": 4, "gpu": "l4", "cpus": 2}, r"cpus must be at least as many as gpus \(4\)"),
        ({"overrides": ["data.train="]}, r"data.train must name a path"),
        ({"overrides": ["data.train=none.csv"]}, r"none.csv does not exist"),
        ({"overrides": ["data.text=words"]}, r"has no column 'words'"),
        ({"overrides": ["encoder.model=none"]}, r"encoder.model 'none'"),
        ({"overrides": ["encoder.max_length=3", "encoder.truncation=error"]}, r"all 2 rows looked at are longer"),
        ({"gpus": 1, "gpu": "l4", "overrides": ["ray.device=cpu"]}, r"ray.device is cpu in the spec"),
        ({"gpus": 1, "gpu": "l4", "overrides": ["encoder.precision=int8"]}, r"int8 cannot be had on a GPU"),
    ],
)
def test_what_a_user_can_mend_is_one_line(tmp_path, tiny, options, says):
    (tmp_path / "rows.jsonl").write_text('{"text": "two words", "label": "a"}\n' * 2)
    with pytest.raises(BertrayError, match=says) as error:
        forecast(spec_of(tmp_path, str(tmp_path / "rows.jsonl"), tiny), **options)
    assert "\n" not in str(error.value)


def test_without_a_gpu_none_is_measured(tmp_path, tiny):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    spec = spec_of(tmp_path, rows(tmp_path / "rows.jsonl", 100), tiny)
    with pytest.raises(BertrayError, match="this machine's device, but it has no GPU"):
        forecast(spec, gpus=2, measure=True)
