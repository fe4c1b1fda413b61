"""Every command of the README is run, here or in the test named."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import bertray
from bertray.spec import load_spec

README = (ROOT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = {
    "make demo": "run by hand from a clean clone: it installs",
    "make serve": "serve: test_serve",
    "make test": "this",
    "python3 -m venv": "run by hand from a clean clone",
    ". .venv/bin/activate": "run by hand from a clean clone",
    "pip install": "run by hand from a clean clone",
    "ray start --head": "test_jobs",
    "ray job submit": "test_jobs",
    "ray stop": "test_jobs stops by process id, since others may run beside it",
    "ray get-auth-token --generate": "test_jobs",
    "export RAY_AUTH_MODE=token": "test_jobs",
    "bertray serve": "test_serve",
    "curl http": "test_serve",
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands():
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    lines += [line.strip() for line in README.splitlines() if re.match(r"    make ", line)]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the README's commands use, so that they write nothing into the project."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    return folder


def test_commands_run_in_their_order(checkout):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    ran = 0
    for command in commands():
        if any(command.startswith(start) for start in ELSEWHERE):
            continue
        done = subprocess.run(
            command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        if not ran:  # progress, where there is no terminal
            assert re.search(r"embedding: 906 of 906 rows, \d+ rows/s, ETA 00:00, \d+ tokens/s", done.stderr)
            assert re.search(r"fitting: 10 of 10 epochs, .*loss 0\.\d+", done.stderr)
            assert "\r" not in done.stderr
        ran += 1
    assert ran == 14
    assert (checkout / "runs" / "labelled.csv").read_text().count("\n") == 181


def test_the_spec_in_the_readme_is_right(tmp_path):
    (block,) = blocks("yaml")
    (tmp_path / "spec.yaml").write_text(block)
    spec = load_spec(tmp_path / "spec.yaml")
    assert spec.model_dump()["head"]["optimizer"] == "lbfgs"
    assert set(yaml.safe_load(block)) <= set(spec.model_dump())


def test_the_python_in_the_readme_runs(demo, monkeypatch, ray_cluster):
    block, _ = blocks("python")
    monkeypatch.chdir(ROOT)
    names = {}
    with_output = '"jobs/specs/demo.yaml", overrides=["output=' + demo["output"] + '"]'
    exec(block.replace('"jobs/specs/demo.yaml"', with_output), names)
    assert names["labels"] == ["positive"]


def test_the_nearest_texts_in_the_readme_are_found(demo, monkeypatch, tmp_path, ray_cluster):
    pytest.importorskip("lancedb", reason="needs the extra `lance`")
    _, block = blocks("python")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(demo["output"])
    monkeypatch.chdir(tmp_path)
    bertray.publish("runs/demo", "runs/vectors/demo.lance")
    names = {}
    exec(block, names)
    assert len(names["nearest"]) == 3
    assert names["nearest"][0]["label"] == "positive"


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
