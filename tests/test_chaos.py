"""Kills at random moments. The long form: make chaos (BERTRAY_KILLS, BERTRAY_SEED)."""

import json
import os
import signal
import time

import numpy as np
import pytest
from chaos import bertray, contents, embed_spec, find, kill_at_random
from conftest import MINILM, SHARED

from bertray import audit

KILLS = int(os.environ.get("BERTRAY_KILLS", "3"))
SEED = int(os.environ.get("BERTRAY_SEED", "0"))
ROWS = 6_000 if KILLS < 10 else 27_481
UNIT = 250
AT_ONCE = 4  # units in flight of an encoder process


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Tweets, or where they are not at hand, sentences of random words."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    if SHARED.is_dir():
        lines = (SHARED / "tweets" / "train.jsonl").read_text(encoding="utf-8").split("\n")[:ROWS]
    else:
        rng = np.random.default_rng(0)
        words = ("rain", "sun", "bus", "late", "sad", "never", "always", "the", "a", "we", "music", "!", ":)", "...")
        lines = [
            json.dumps({"id": str(i), "text": " ".join(rng.choice(words, rng.integers(3, 30))), "label": i % 3})
            for i in range(ROWS)
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def spec(folder, rows):
    folder.mkdir()
    return embed_spec(
        folder,
        data={"train": str(rows), "id": "id", "unit_rows": UNIT},
        encoder={"model": MINILM, "pooling": "mean"},
    )


@pytest.fixture(scope="module")
def undisturbed(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "a"
    process = bertray("embed", spec(folder, rows))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return contents(folder / "run")


@pytest.mark.timeout(3600 if KILLS > 3 else 400)
@pytest.mark.parametrize("seed", range(SEED, SEED + max(1, KILLS // 8)))
def test_killed_at_random_moments_every_row_is_there_once(seed, rows, undisturbed, tmp_path):
    kills = KILLS if KILLS < 8 else 8
    file, run = spec(tmp_path / "b", rows), tmp_path / "b" / "run"
    killed = kill_at_random(
        lambda: bertray("embed", file), run, ROWS // UNIT, kills, seed, pause=(0.5, 6.0) if KILLS < 10 else (1, 9)
    )
    assert len(killed) == kills
    ids, texts, vectors, manifest = contents(run)
    assert len(ids) == len(set(ids)) == ROWS
    assert ids == undisturbed[0]
    assert texts == undisturbed[1]
    assert np.array_equal(vectors, undisturbed[2])
    assert audit.verify(str(run))["ok"]
    lost = manifest.total("lost")
    print(f"seed {seed}: {kills} kills, {lost} of {len(manifest.units)} units were begun again")
    assert lost <= AT_ONCE * kills


@pytest.mark.timeout(400)
@pytest.mark.skipif(KILLS < 10, reason="Ray waits a minute for a head that is gone: it is in make chaos")
def test_when_the_head_is_gone_the_same_command_goes_on(rows, undisturbed, tmp_path):
    file, run = spec(tmp_path / "c", rows), tmp_path / "c" / "run"
    process = bertray("embed", file)
    while not list(run.rglob("shards/*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    os.kill(find(process.pid, "gcs"), signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode != 0
    assert errors.strip().splitlines()[-1].startswith("bertray: ended from outside")
    process = bertray("embed", file)
    assert process.communicate(timeout=200) and process.returncode == 0
    assert contents(run)[0] == undisturbed[0]
    assert np.array_equal(contents(run)[2], undisturbed[2])
