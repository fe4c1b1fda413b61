"""A whole job on several nodes over an S3 server: one dies on the way, another comes; a node that sees other files."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import machines
import numpy as np
import pytest
from chaos import ENVIRONMENT, bertray
from conftest import MINILM, ON_MACHINES, demo_rows, serving
from pyarrow.fs import FileSelector
from test_faults import WORDS, ended, wait_for

import bertray as library
from benchmarks import nodes
from bertray import bundle
from bertray.storage import Location
from bertray.store import Store

pytestmark = pytest.mark.timeout(400)
ROWS, UNIT = 1_500, 50
long = pytest.mark.skipif("BERTRAY_CLUSTER" not in os.environ, reason="long: make test-cluster")
CLUSTER = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = []
while word := input():
    if word == "add":
        nodes.append(cluster.add_node(num_cpus=1))
        cluster.wait_for_nodes()
    if word == "kill":
        cluster.remove_node(nodes[0], allow_graceful=False)
    print("DONE", cluster.address, *(node.node_id for node in nodes), flush=True)
cluster.shutdown()
"""


@pytest.fixture
def cluster(s3, monkeypatch):
    """A cluster whose head runs nothing, by Ray's own utility or of machines: a function that adds a node of one CPU
    (`add`) or kills the first one (`kill`), and gives the address and the nodes."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.setitem(ENVIRONMENT, name, os.environ[name])
    program = [machines.__file__] if ON_MACHINES else ["-c", CLUSTER]
    process = subprocess.Popen(
        [sys.executable, *program], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def order(word):
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
        return next(line.split()[1:] for line in process.stdout if line.startswith("DONE"))

    yield order
    process.communicate("\n", timeout=60)


def spec(folder, source, output, **parts):
    data = {"train": source, "id": "id", "unit_rows": UNIT}
    encoder = {"model": MINILM, "pooling": "mean", "precision": "fp32"}
    path = folder / "spec.json"
    path.write_text(json.dumps({"data": data, "encoder": encoder, "output": output, **parts}))
    return path


def rows(count):
    return [{"id": f"r{i}", "text": f"{i} {WORDS}", "label": "ab"[i % 2]} for i in range(count)]


def vectors_in(run):
    """id -> vector of a run's store of training rows, wherever it is."""
    stores = Location(run) / "stores"
    (name,) = (name for name in stores.folders() if name.startswith("train-"))
    store = Store((stores / name).url)
    vectors, _ = store.load()
    ids = [one for table in store.tables(["id"]) for one in table["id"].to_pylist()]
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, vectors, strict=True))


def at_work_on(run, node):
    """The processes of a node that encode units at this moment."""
    stores = [Store((Location(run) / "stores" / name).url) for name in (Location(run) / "stores").folders()]
    units = [(store, file.name.removesuffix(".json")) for store in stores for file in store.attempts()]
    notes = [store.attempt(unit) for store, unit in units if unit.startswith("rows")]
    return {note.pid for note in notes if note and note.node == node}


def whole_job(s3, tmp_path, count, **sizes):
    """A running job over S3, and its folder."""
    lines = "".join(json.dumps(row) + "\n" for row in rows(count))
    Location(f"{s3}/nodes/rows.jsonl").write(lines.encode())
    (tmp_path / "rows.jsonl").write_text(lines)
    run = f"{s3}/nodes/run"
    sizes |= {"cpus_per_worker": 1, "patience": 8}
    return bertray("run", spec(tmp_path, f"{s3}/nodes/rows.jsonl", run, ray=sizes), "--json"), run


def kill(cluster, pids):
    cluster("kill")
    for pid in pids:  # as a machine takes its processes along
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def check_undisturbed(found, tmp_path):
    """Whether vectors are those of a run that nothing happened to."""
    alone = tmp_path / "alone"
    process = bertray("embed", spec(tmp_path, str(tmp_path / "rows.jsonl"), str(alone), ray={"address": "local"}))
    assert ended(process, 240)[0] == 0
    undisturbed = vectors_in(str(alone))
    assert found.keys() == undisturbed.keys()
    assert all(np.array_equal(found[name], undisturbed[name]) for name in found)


def test_a_node_dies_and_another_comes_and_every_row_is_there_once(cluster, s3, tmp_path):
    cluster("add")
    address, first, _ = cluster("add")
    process, run = whole_job(s3, tmp_path, ROWS, address=address, workers=2)
    kill(cluster, wait_for(lambda: at_work_on(run, first), process))
    cluster("add")
    code, output, errors = ended(process, 240)
    assert code == 0, errors
    assert json.loads(output)["faults"]["units_begun_again"] >= 1
    check_undisturbed(vectors_in(run), tmp_path)


@long
@pytest.mark.skipif(not machines.allowed(), reason="only root may make networks")
def test_the_same_with_nodes_of_separate_addresses():
    """In networks of their own: what listens on loopback is out of reach, and a node that dies says nothing."""
    name = f"{__file__}::{test_a_node_dies_and_another_comes_and_every_row_is_there_once.__name__}"
    command = machines.isolated(sys.executable, "-m", "pytest", "-rp", "-p", "no:cacheprovider", name)
    environment = ENVIRONMENT | {"BERTRAY_MACHINES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout


@long
def test_a_pool_grows_by_a_node_that_comes_and_shrinks_without_loss(cluster, s3, tmp_path):
    address, first = cluster("add")
    process, run = whole_job(s3, tmp_path, 4 * ROWS, address=address)
    wait_for(lambda: at_work_on(run, first), process)
    second = cluster("add")[-1]
    wait_for(lambda: at_work_on(run, second), process)
    kill(cluster, wait_for(lambda: at_work_on(run, first), process))
    code, _, errors = ended(process, 240)
    assert code == 0, errors
    assert "embedding: 120 units on 1 cpu worker(s)" in errors
    check_undisturbed(vectors_in(run), tmp_path)


@long
def test_a_node_dies_while_the_head_is_fitted_and_the_fit_goes_on_with_fewer(cluster, s3, tmp_path):
    """Checkpoints lie in the store, where all nodes see them: the head is the one of a fit that nothing happened to."""
    cluster("add")
    address, first, _ = cluster("add")
    head = {"epochs": 6_000, "batch_size": 100}
    data = "".join(json.dumps(row) + "\n" for row in rows(300))
    Location(f"{s3}/nodes/rows.jsonl").write(data.encode())
    run, sizes = f"{s3}/nodes/run", {"address": address, "fit_workers": 2, "cpus_per_worker": 1}
    process = bertray("fit", spec(tmp_path, f"{s3}/nodes/rows.jsonl", run, ray=sizes, head=head), "--json")

    def fitting():
        """The process of the first node that fits, once there is a checkpoint."""
        kept = (Location(run) / ".fitting").fs.get_file_info(
            FileSelector((Location(run) / ".fitting").path, recursive=True, allow_not_found=True)
        )
        return any(file.base_name == "state.pt" for file in kept) and processes_of("RayTrainWorker", address, first)

    kill(cluster, wait_for(fitting, process, 150))
    code, _, errors = ended(process, 240)
    assert code == 0, errors
    assert not (Location(run) / ".fitting").exists()
    local = spec(tmp_path, f"{s3}/nodes/rows.jsonl", str(tmp_path / "run"), ray={"address": "local"}, head=head)
    assert ended(bertray("fit", local), 240)[0] == 0
    ours, theirs = bundle.load(f"{run}/head"), bundle.load(str(tmp_path / "run" / "head"))
    assert len(ours.losses) == head["epochs"]
    np.testing.assert_allclose(ours.head.weight, theirs.head.weight, atol=2e-3)


@long
def test_a_node_dies_under_load_and_every_request_is_answered(cluster, demo):
    cluster("add")
    address, first, _ = cluster("add")
    texts = [row["text"] for row in demo_rows("test")]
    labels, _ = library.load(demo["bundle"]).predict(texts)
    answered, stop = Counter(), threading.Event()

    def ask(service, number):
        for turn in itertools.count(number * 31):
            if stop.is_set():
                return
            place = turn % len(texts)
            # Blanks, so that what is remembered does not answer.
            inputs = texts[place] + " " * (turn // len(texts))
            body = json.dumps({"inputs": inputs}).encode()
            with urllib.request.urlopen(f"{service.address}/predict", body, timeout=60) as answer:
                answered[json.load(answer)[0]["label"] == labels[place]] += 1

    with (
        serving(f"mood={demo['bundle']}", "--replicas", "2", environment={"RAY_ADDRESS": address}) as service,
        ThreadPoolExecutor(8) as pool,
    ):
        askers = [pool.submit(ask, service, number) for number in range(8)]

        def more(than):
            for asker in askers:  # no request had another answer than 200
                if asker.done():
                    asker.result()
            return answered[True] > than

        try:
            pids = wait_for(lambda: processes_of("ServeReplica", address, first), timeout=90)
            wait_for(lambda: more(500))
            kill(cluster, pids)
            killed_at = answered[True]
            wait_for(lambda: more(killed_at + 2_000), timeout=120)
            third = cluster("add")[-1]  # and the encoder that is missing comes back there
            wait_for(lambda: processes_of("ServeReplica", address, third), timeout=120)
        finally:
            stop.set()
        for asker in askers:
            asker.result(60)
    assert answered[False] < 0.01 * answered[True]  # blanks leave the tokens, each process chooses its own precision


def processes_of(name, address, node):
    """The processes on a node of actors whose class begins so."""
    ask = (
        "import json, sys, ray; from ray._private import state; ray.init(sys.argv[1], log_to_driver=False); "
        "print('PIDS', json.dumps([each['Pid'] for each in state.actors().values() if each['State'] == 'ALIVE' "
        "and each['ActorClassName'].startswith(sys.argv[3]) and each['Address']['NodeID'] == sys.argv[2]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask, address, node, name], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    return json.loads(done.stdout.partition("PIDS ")[2] or "[]")


@pytest.fixture
def node_without():
    """A function that adds a node to a cluster which sees an empty folder in place of one: in a mount namespace of its
    own."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    started = []

    def add(address, folder):
        ray = f"{sys.executable} -m ray.scripts.scripts start --block --address={address} --num-cpus=1"
        command = f"mount -t tmpfs none {folder} && exec {ray} --disable-usage-stats"
        started.append(subprocess.Popen(["unshare", "--mount", "sh", "-c", command], env=ENVIRONMENT))

    yield add
    for process in started:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("kind", ["rows", "run"])
def test_a_node_that_does_not_see_the_files_is_told_before_anything_is_encoded(cluster, node_without, tmp_path, kind):
    for name in ("rows", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(200)))
    address = cluster("add")[0]
    node_without(address, tmp_path / kind)
    count = f"import ray; ray.init({address!r}, log_to_driver=False); print('NODES', len(ray.nodes()))"

    def joined():
        done = subprocess.run(
            [sys.executable, "-c", count], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
        )
        return "NODES 3" in done.stdout

    wait_for(joined)
    file = spec(tmp_path, str(tmp_path / "rows" / "rows.jsonl"), str(tmp_path / "run"), ray={"address": address})
    code, _, errors = ended(bertray("embed", file))
    assert code == 2, errors
    assert re.search(rf"The node \S+ of the Ray cluster cannot be used: it does not see \S*/{kind}/", errors), errors
    assert "Traceback" not in errors and not list(tmp_path.rglob("*.parquet"))


COUNTED = """
import sys, ray
from bertray import cli, cluster, pipeline, sources
sources._FAR_BYTES = 0  # as if the files were large
on_nodes = cluster.over_nodes
def told(function, files):
    where = on_nodes(lambda file: ray.get_runtime_context().get_node_id(), files)
    print("NODES", *where, file=sys.stderr)
    return on_nodes(function, files)
pipeline.over_nodes = told
cli.command(sys.argv[1:])
"""


def test_large_files_are_counted_on_the_nodes(cluster, s3, tmp_path):
    cluster("add")
    address, *nodes = cluster("add")
    for i in range(4):
        lines = [json.dumps(row) + "\n" for row in rows(200)[50 * i : 50 * (i + 1)]]
        Location(f"{s3}/counted/{i}.jsonl").write("".join(lines).encode())
    run = f"{s3}/counted-run"
    file = spec(tmp_path, f"{s3}/counted/*.jsonl", run, ray={"address": address, "cpus_per_worker": 1})

    def embed():
        command = [sys.executable, "-c", COUNTED, "embed", str(file)]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)

    done = embed()
    assert done.returncode == 0, done.stderr
    assert "counting: the rows of 4 files, by 2 CPUs" in done.stderr
    assert {*re.search("NODES (.*)", done.stderr)[1].split()} <= {*nodes}
    assert {*vectors_in(run)} == {row["id"] for row in rows(200)}
    Location(f"{s3}/counted/2.jsonl").write(b"\xff\xfea\x00")
    done = embed()
    assert done.returncode == 2
    assert f"{s3}/counted/2.jsonl is UTF-16 text" in done.stderr and "Traceback" not in done.stderr


@long
def test_the_benchmark_of_nodes_tells_efficiency_and_what_a_dead_node_costs(capsys):
    nodes.main(["--rows", "6000", "--nodes", "1", "--rounds", "1"])
    told = capsys.readouterr().out
    assert re.search(r"\| 1 +\| +\d+ \(\d+ to \d+\) \| .* %", told)
    assert re.search(r"\| a node killed, another added \| .* [1-9]\d* \|", told)
