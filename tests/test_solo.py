"""A Ray for one job alone, in processes of its own, beside the one of the other tests."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
START = """
import os, sys
from bertray.cluster import connected
from bertray.spec import RaySizes
with connected(RaySizes(address="local", fit_workers={fit_workers}), alone={alone}):
    import ray
    from bertray import solo
    session = ray._private.worker._global_node.get_session_dir_path()
    print("session", session, ray.get(ray.remote(lambda: 40 + 2).remote()), flush=True)
    {code}
"""


def run(code, alone=True, fit_workers=0, **options):
    script = START.format(code=code, alone=alone, fit_workers=fit_workers)
    return subprocess.Popen(
        [sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, **options
    )


def processes(session):
    """The command lines of all processes of a Ray session; a worker's own title has its session in its environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if session in command or session.encode() in (process / "environ").read_bytes():
                found[int(process.name)] = command
        except OSError:
            continue
    return found


def first_line(process):
    word, session, answer = process.stdout.readline().split()
    assert (word, answer) == ("session", "42")
    return session


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Ray starts as it is")
@pytest.mark.parametrize("end", ["it ends", "it is killed"])
def test_it_lacks_what_one_job_does_not_need_and_leaves_nothing(end):
    process = run("sys.stdin.readline()", stdin=subprocess.PIPE)
    session = first_line(process)
    commands = " ".join(processes(session).values())
    assert "gcs_server" in commands
    assert "raylet" in commands
    for absent in ("dashboard/dashboard.py", "monitor.py", "log_monitor.py", "DashboardAgent", "RuntimeEnvAgent"):
        assert absent not in commands
    if end == "it ends":
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    else:
        process.kill()
        process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while processes(session) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes(session)


def test_runtime_environments_work_where_they_are_needed():
    code = (
        'print(ray.get(ray.remote(lambda: os.environ["X"]).options(runtime_env={{"env_vars": {{"X": "y"}}}}).remote()))'
    )
    output, _ = run(code.replace("{{", "{").replace("}}", "}"), fit_workers=1).communicate(timeout=90)
    assert output.splitlines()[-1] == "y"


@pytest.mark.parametrize("alone", [True, False])
def test_ray_data_runs_with_and_without_helpers(alone):
    code = """
    import ray.data
    class Double:
        def __call__(self, batch):
            return {"item": batch["item"] * 2}
    with solo.running():
        pool = ray.data.ActorPoolStrategy(size=1)
        rows = ray.data.from_items([1, 2, 3]).map_batches(Double, compute=pool, num_cpus=0.5)
        print(sorted(row["item"] for row in rows.iter_rows()))
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    print("AutoscalingCoordinator" in names)
    """
    output, _ = run(code.strip(), alone=alone).communicate(timeout=120)
    assert output.splitlines()[1:] == ["[2, 4, 6]", str(not alone)]


def test_a_ray_without_those_private_parts_starts_as_it_is():
    script = (
        "import ray._private.services as services, ray._private.node as node\n"
        "from bertray import solo\n"
        "del services._build_python_executable_command_memory_profileable\n"
        "before = node.Node\n"
        "with solo.starting(False): print(node.Node is before)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr
