"""What is taken of a cluster: how many processes, of what size. On Ray's own clusters of several nodes."""

import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from chaos import ENVIRONMENT

from bertray import cluster
from bertray.errors import ClusterError

PLANS = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from bertray.cluster import plan_workers
from bertray.errors import ClusterError
from bertray.spec import RaySizes

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
for node in json.loads(sys.argv[1]):
    cluster.add_node(**node)
ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
cluster.wait_for_nodes()
plans = []
for sizes in json.loads(sys.argv[2]):
    try:
        plan = plan_workers(RaySizes(**sizes), 1_000)
        plans.append([plan.count, plan.device, plan.threads, plan.num_gpus, plan.most])
    except ClusterError as error:
        plans.append(str(error))
print("PLANS", json.dumps(plans))
ray.shutdown()
cluster.shutdown()
"""


def plans(nodes, *sizes):
    command = [sys.executable, "-c", PLANS, json.dumps(nodes), json.dumps(sizes)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("PLANS ")[2])


@pytest.mark.timeout(200)
def test_processes_fit_the_gpus_and_cpus_that_are_found():
    # A node without a GPU, and two of other sizes with some.
    found = plans(
        [{"num_cpus": 16}, {"num_cpus": 8, "num_gpus": 1}, {"num_cpus": 12, "num_gpus": 2}],
        {},
        {"workers": 2},
        {"workers": 3},
        {"workers": 5},
        {"workers": 6, "cpus_per_worker": 2},
        {"workers": 6, "cpus_per_worker": 4},
        {"device": "cpu"},
        {"device": "cpu", "workers": 2},
    )
    assert found[:4] == [
        [3, "cuda", 4, 1.0, None],  # as many as there are GPUs, and more as nodes join
        [2, "cuda", 4, 1.0, 2],
        [3, "cuda", 4, 1.0, 3],
        [5, "cuda", 3, 0.5, 5],  # two share a GPU, and the CPUs beside it
    ]
    assert found[4] == [6, "cuda", 2, 0.5, 6]
    assert "ray.workers 6 of 4 CPUs each is more than the Ray cluster has room for" in found[5]
    assert found[6:] == [[9, "cpu", 4, 0.0, None], [2, "cpu", 4, 0.0, 2]]


def refused(port, monkeypatch):
    monkeypatch.setattr(cluster, "_ANSWER_SECONDS", 0.5)
    with pytest.raises(ClusterError) as told:
        cluster._check_reachable(f"127.0.0.1:{port}")  # `connected` would take the tests' own cluster
    return str(told.value)


def test_what_listens_and_is_not_ray_is_told_at_once(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web, socket.create_server(("127.0.0.1", 0)) as deaf:
        threading.Thread(target=web.handle_request, daemon=True).start()
        for port in (web.server_port, deaf.getsockname()[1]):
            line = refused(port, monkeypatch)
            assert line.startswith(
                f"Cannot use the Ray cluster at 127.0.0.1:{port}: something listens there that is not"
            )
            assert "correct ray.address" in line
