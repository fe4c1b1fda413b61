"""The command in processes of its own: exit codes, what goes where, Ctrl-C, small clusters."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

BERTRAY = [sys.executable, "-m", "bertray.cli"]
# Each starts a Ray of its own, as a user's command does: not the one of the other tests.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def run(*arguments, cwd=ROOT, timeout=120):
    return subprocess.run(
        [*BERTRAY, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny):
    """A spec of few rows and a tiny encoder."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "rows.csv").write_text("text,label\n" + "so good,yes\nso bad,no\n" * 20)
    (folder / "spec.yaml").write_text(
        f"data: {{train: {folder}/rows.csv, test: {folder}/rows.csv}}\nencoder: {{model: {tiny}}}\n"
        f"ray: {{address: local}}\noutput: {folder}/run\n"
    )
    return folder


def test_json_is_all_there_is_on_stdout(demo):
    arguments = ("run", "jobs/specs/demo.yaml", "--output", demo["output"])
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == demo
    assert done.stdout.count("\n") == 1
    plain = run(*arguments)
    assert "embedding: done already" in plain.stderr
    for line in ("accuracy", "report", "bundle", "bertray serve"):
        assert line in plain.stdout


def test_one_cpu_is_enough(small, tmp_path):
    """With Ray Train too; the other tests' Ray has two."""
    code = (
        "import ray, bertray; ray.init(num_cpus=1, include_dashboard=False);"
        f"s = bertray.run({str(small / 'spec.yaml')!r}, overrides=['output={tmp_path}', 'ray.fit_workers=1']);"
        "print(s['metrics']['test']['rows'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("40")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "The spec none.yaml cannot be read: No such file"),
        (["run", "jobs/specs/demo.yaml", "--set", "encoder.pooling=avg"], "--set encoder.pooling must be one of"),
        (["run", "jobs/specs/demo.yaml", "--set", "data.train=none.csv"], "none.csv does not exist"),
        (["run", "jobs/specs/demo.yaml", "--set", "data.text=words"], "has no column 'words'"),
        (["fit", "jobs/specs/tweets.yaml"], "google-bert/bert-base-uncased"),
        (["predict", "jobs", "jobs/data/demo-test.csv", "--output", "x"], "jobs is not a bundle"),
        (["serve", "jobs"], "jobs is not a bundle"),
        (
            ["run", "jobs/specs/demo.yaml", "--set", "ray.address=127.0.0.1:1"],
            "Cannot use the Ray cluster at 127.0.0.1:1",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    if arguments[0] in ("run", "fit"):
        arguments = [*arguments, "--output", tmp_path]
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_a_taken_port_is_one_line(demo):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", demo["bundle"], "--port", taken.getsockname()[1])
    assert done.returncode == 2
    assert "Cannot listen on 127.0.0.1:" in done.stderr


def test_debug_shows_the_traceback():
    done = run("run", "none.yaml", "--debug")
    assert "Traceback" in done.stderr
    assert "SpecError" in done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["run"], ["predict", "a", "b"], ["serve", "x", "--replicas", "0"]]
)
def test_wrong_usage_is_exit_code_2_with_help(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "usage: bertray" in done.stderr


def test_help_is_quick_and_spec_prints_all_keys():
    started = time.perf_counter()
    done = run("--help")
    assert time.perf_counter() - started < 1.5  # a busy machine; alone it takes 0.1 s
    assert "predict" in done.stdout
    assert "data:" in run("spec").stdout
    assert json.loads(run("spec", "--json").stdout)["head"]["epochs"] == 10


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(tiny, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + f"{'good ' * 200},yes\n{'bad ' * 200},no\n" * 1000)
    command = [
        *("run", tmp_path / "rows.yaml", "--output", tmp_path / "run"),
        *("--set", "data.unit_rows=50", "--set", "ray.address=local"),
    ]
    (tmp_path / "rows.yaml").write_text(f"data: {{train: {tmp_path}/rows.csv}}\nencoder: {{model: {tiny}}}\n")
    process = subprocess.Popen(
        [*BERTRAY, *map(str, command)], env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not list(tmp_path.rglob("*.parquet")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the whole group
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Stopped. The same command goes on from here." in errors
    assert "Traceback" not in errors
    done = len(list(tmp_path.rglob("*.parquet")))
    assert 0 < done < 40
    assert not list(tmp_path.rglob("manifest.json"))
    again = run(*command, timeout=150)
    assert again.returncode == 0, again.stderr
    assert "rows are done already" in again.stderr
    assert len(list(tmp_path.rglob("shards/*.parquet"))) == 40
