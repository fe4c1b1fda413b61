"""Nodes of a Ray cluster that are like machines: each has a network of its own, with an address, and is joined to the
others by a bridge; and a folder of its own for what Ray writes.

Run as a program, in a network that `isolated` made, it adds and kills nodes as it is told by lines; see test_nodes.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

HEAD = "10.203.0.1"
_NODE = "10.203.0.1{}"
_PRIVATE = "mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && ip link set lo up"
_BRIDGE = f"ip link add nodes type bridge && ip addr add {HEAD}/24 dev nodes && ip link set nodes up"
_RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=200000000"]


def isolated(*command):
    """A command as one that runs in a network of its own, which has a bridge for nodes and this machine's address. With
    it all end that it started."""
    unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*unshare, "sh", "-c", f'{_PRIVATE} && {_BRIDGE} && exec "$@"', "sh", *command]


def allowed():
    """Whether this user may do that."""
    with suppress(FileNotFoundError):
        return subprocess.run(isolated("true"), capture_output=True).returncode == 0
    return False


def _network(pid):
    return os.readlink(f"/proc/{pid}/ns/net")


def _add(number, address):
    """A node with a network of its own; returns its process and IP address."""
    ip = _NODE.format(number)
    script = f'read go && {_PRIVATE} && ip addr add {ip}/24 dev eth0 && ip link set eth0 up && exec "$@"'
    ray = [*_RAY, f"--address={address}", f"--node-ip-address={ip}", "--num-cpus=1"]
    process = subprocess.Popen(
        ["unshare", "--net", "--mount", "sh", "-c", script, "sh", *ray],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while _network(process.pid) == _network("self"):
        time.sleep(0.01)
    link = f"ip link add node{number} type veth peer name eth0 netns {process.pid}"
    subprocess.run(f"{link} && ip link set node{number} master nodes up", shell=True, check=True)
    process.stdin.write("go\n")
    process.stdin.flush()
    return process, ip


def _kill(process):
    """End all that runs on a node, as when a machine loses power."""
    network = _network(process.pid)
    for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        with suppress(OSError):
            if _network(pid) == network:
                os.kill(pid, signal.SIGKILL)
    process.wait()


def _await(ip):
    """The id of the node at an address, once it has joined."""
    import ray

    while True:
        for node in ray.nodes():
            if node["Alive"] and node["NodeManagerAddress"] == ip:
                return node["NodeID"]
        time.sleep(0.1)


def main():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    address = f"{HEAD}:6379"
    head = [*_RAY, "--head", "--port=6379", f"--node-ip-address={HEAD}", "--num-cpus=0", "--include-dashboard=false"]
    started, nodes = [subprocess.Popen(head, stdout=subprocess.DEVNULL)], {}
    while subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "health-check", f"--address={address}"], capture_output=True
    ).returncode:
        time.sleep(0.1)
    ray.init(address, log_to_driver=False)
    try:
        while word := input():
            if word == "add":
                process, ip = _add(len(nodes), address)
                started.append(process)
                nodes[_await(ip)] = process
            if word == "kill":
                _kill(next(iter(nodes.values())))
            print("DONE", address, *nodes, flush=True)
    finally:
        ray.shutdown()
        for process in reversed(started[1:]):
            if process.poll() is None:
                _kill(process)
        started[0].terminate()
        started[0].wait(30)


if __name__ == "__main__":
    main()
