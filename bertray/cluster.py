"""The Ray cluster: joining or starting one, and what to take of it."""

import logging
import math
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TypeVar
from unittest.mock import patch

from bertray import solo
from bertray.errors import ClusterError
from bertray.progress import log
from bertray.spec import RaySizes
from bertray.storage import FileInfo, Location

T = TypeVar("T")

_CPUS_PER_WORKER = 4  # past that, a worker's threads gain less than another worker does
_ANSWER_SECONDS = 10.0  # until what does not answer is not there
_TASKS_PER_CPU = 8  # so that one with larger files does not hold up the others
_REACH_SECONDS = 60.0  # until a node that does not say what it sees is left to Ray


@dataclass(frozen=True)
class Workers:
    """How many encoder processes to run, and what each takes.

    num_gpus: of a process, a part of one where several share it.
    most: to how many their number may grow as nodes join; None is as many as there is room for.
    """

    count: int
    device: str
    threads: int
    num_cpus: float
    num_gpus: float
    most: int | None


@contextmanager
def connected(sizes: RaySizes, alone: bool = False) -> Iterator[None]:
    """Joins a Ray cluster, or starts one on this machine that ends with the block.

    A connection that is there already is used and left as it is.

    Args:
        alone: one that is started is for one job alone, and lacks what only shared ones need.

    Raises:
        ClusterError: there is no cluster at the address, or it refuses.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = None if sizes.address == "auto" else sizes.address
    _check_reachable(_named(sizes))
    try:
        with _quiet(), solo.starting(sizes.fit_workers > 0) if alone else nullcontext():
            ray.init(address, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:
        where = _named(sizes) or "this machine"
        raise ClusterError(f"Cannot use the Ray cluster at {where}: {_refusal(error)}") from error
    try:
        with _without_rays_own_words():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _without_rays_own_words() -> Iterator[None]:
    """Keeps Ray from printing what its nodes tell of processes that ended, on stdout and in many lines: what matters of
    it is in the summary. The function is private to Ray: where it is not there, Ray prints."""
    try:
        from ray._private import worker

        told = patch.object(worker, "print_to_stdstream", lambda data, **_: log.debug("ray: %s", data.get("lines")))
    except (ImportError, AttributeError):
        yield
        return
    with told:
        yield


def _refusal(error: Exception) -> str:
    """Why Ray does not connect, in one line. It raises many kinds: what it says tells them apart."""
    said = " ".join(str(error).split())
    if "Version mismatch" in said:
        return f"{said}. Install the cluster's versions here, or start it with these."
    if re.search("AuthenticationError|authentication token", f"{said} {error.__cause__}"):
        return (
            "it does not take the token given here, or none is given. Set RAY_AUTH_MODE=token here as there, and put "
            "its token into ~/.ray/auth_token (or RAY_AUTH_TOKEN)."
        )
    return said[:300]


def is_named(sizes: RaySizes) -> bool:
    """Whether a cluster is to be joined that was started before."""
    return _named(sizes) not in ("", "local")


def _named(sizes: RaySizes) -> str:
    """The address of the cluster that the spec or the environment names; empty where neither does."""
    return os.environ.get("RAY_ADDRESS", "") if sizes.address == "auto" else sizes.address


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return  # a word such as auto or local
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
                _check_speaks(connection)
    except OSError as error:
        raise ClusterError(
            f"Cannot use the Ray cluster at {address}: {error.strerror or error}. Start it (ray start --head), or "
            "correct ray.address (or RAY_ADDRESS)."
        ) from None


def _check_speaks(connection: socket.socket) -> None:
    """That what listens is a server of gRPC: those answer the start of HTTP/2 with their settings. Of anything else,
    such as the dashboard, Ray would wait for an answer, 40 seconds at a time.

    Raises:
        OSError: it is not.
    """
    settings = b"\x04"  # a frame's fourth byte, behind its length: here none
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + settings + bytes(5))
    try:
        answered = connection.recv(9)[3:4]
    except TimeoutError:
        answered = b""
    if answered != settings:
        raise OSError("something listens there that is not Ray (jobs join at port 6379, not at the dashboard's)")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Ray's C++ side from writing over the terminal: it knows no log level that is silent about itself."""
    if log.isEnabledFor(logging.DEBUG) or "RAY_BACKEND_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    terminal = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        del os.environ["RAY_BACKEND_LOG_LEVEL"]


def plan_workers(sizes: RaySizes, units: int, fewer: bool = False) -> Workers:
    """The encoder processes that the spec asks for, or that fit what the cluster has free.

    Args:
        fewer: whether there may be fewer than the spec asks for, as when nodes have gone.

    Raises:
        ClusterError: the cluster has not what the spec asks for.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources()
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if sizes.device == "cuda" and not gpus:
        raise ClusterError("ray.device is cuda, but the Ray cluster has no GPU. Set ray.device to auto or cpu.")
    device = "cuda" if gpus and sizes.device != "cpu" else "cpu"
    hosts = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    sharing = 1  # processes a GPU
    if device == "cuda":
        hosts = [(cpu, gpu) for cpu, gpu in hosts if gpu]
        sharing = 1 if sizes.workers == "auto" else max(1, math.ceil(int(sizes.workers) / gpus))
    threads = _threads(sizes, [(cpu, gpu * sharing) for cpu, gpu in hosts] if device == "cuda" else hosts, device, free)
    # A worker has to fit a node. For each, what has more room than CPUs is bounded by GPUs, if it takes any.
    room = sum(min(cpu // threads, gpu * sharing) if device == "cuda" else cpu // threads for cpu, gpu in hosts)
    most = int(sizes.workers) if sizes.workers != "auto" else room
    if sizes.workers == "auto" and device == "cpu":
        most = min(room, max(1, int(free.get("CPU", 0)) // threads))  # others may be at work there
    count = min(most, room) if fewer else most
    if not 0 < count <= room:
        wanted = "a worker" if sizes.workers == "auto" else f"ray.workers {most}"
        raise ClusterError(
            f"{wanted} of {threads} CPUs each is more than the Ray cluster has room for ("
            + ", ".join(f"a node of {cpu} CPUs and {gpu} GPUs" for cpu, gpu in hosts)
            + "). Lower ray.workers or ray.cpus_per_worker."
        )
    count, most = (min(number, max(1, units)) for number in (count, most))
    workers = Workers(
        count,
        device,
        threads,
        # Less than whole CPUs, so that whatever else runs there finds a place beside the actors.
        0.9 * threads,
        math.floor(1e4 / sharing) / 1e4 if device == "cuda" else 0.0,  # Ray counts in ten thousandths
        None if sizes.workers == "auto" and not solo.alone() else most,
    )
    for resource, need in (("CPU", workers.num_cpus), ("GPU", workers.num_gpus)):
        if need > free.get(resource, 0):
            log.warning("waiting for %g %s: the Ray cluster has %g free", need, resource, free.get(resource, 0))
    return workers


def _threads(sizes: RaySizes, hosts: list[tuple[int, int]], device: str, free: Mapping[str, float]) -> int:
    """CPUs of each worker: as the spec says, or a fair share of a node, up to where more threads gain little.

    Args:
        hosts: CPUs of each node, and how many processes its GPUs are for.
    """
    if sizes.cpus_per_worker != "auto":
        return int(sizes.cpus_per_worker)
    if device == "cuda":
        share = min(cpu // places for cpu, places in hosts)
    elif sizes.workers != "auto":
        fitting = (n for n in range(_CPUS_PER_WORKER, 0, -1) if sum(cpu // n for cpu, _ in hosts) >= int(sizes.workers))
        share = next(fitting, 1)
    else:
        share = min(int(free.get("CPU", 0)), max(cpu for cpu, _ in hosts))
    return max(1, min(_CPUS_PER_WORKER, share))


def is_full(workers: Workers) -> bool:
    """Whether the cluster has no room for another such process now."""
    import ray

    free = ray.available_resources()
    return workers.num_cpus > free.get("CPU", 0) or workers.num_gpus > free.get("GPU", 0)


def alive_nodes() -> set[str]:
    """Ray's ids of the nodes that are alive."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def check_reach(files: Sequence[str], folders: Sequence[str]) -> None:
    """Whether all nodes that may encode see the files that this process sees and can write into its folders, before
    any of them begins. Nodes that do not answer are left to Ray.

    Args:
        files: URLs; folders: URLs of folders.

    Raises:
        ClusterError: a node cannot, with what and why.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [
        (node["NodeID"], node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and {"CPU", "GPU"} & {*node["Resources"]}
    ]
    asked = {}
    for node, address in others:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        reach = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_missed)
        asked[reach.remote(list(files), list(folders), node)] = address
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_REACH_SECONDS) if asked else ([], [])
    for answer in answered:
        try:
            missed = ray.get(answer)
        except ray.exceptions.RayError:  # the node has gone meanwhile
            continue
        if missed:
            raise ClusterError(
                f"The node {asked[answer]} of the Ray cluster cannot be used: {missed}. Put files and output where all "
                "nodes see the same: on a shared file system, or in an object store."
            )


def _missed(files: Sequence[str], folders: Sequence[str], node: str) -> str:
    """Which of those this node cannot read or write, and why; empty if none."""
    for file in files:
        try:
            if not Location(file).exists():
                return f"it does not see {file}"
        except Exception as error:  # of whatever kind a store's client raises
            return f"it cannot read {file} ({' '.join(str(error).split())[:200]})"
    for folder in folders:
        try:
            probe = Location(folder) / f".reach-{node}"
            probe.write(b"")
            probe.delete()
        except Exception as error:
            return f"it cannot write into {folder} ({' '.join(str(error).split())[:200]})"
    return ""


def over_nodes(function: Callable[[FileInfo], T], files: Sequence[FileInfo]) -> list[T]:
    """What a function gives for each file, by tasks on the nodes of the connected cluster, those without GPUs first.
    Where there is only one node that runs tasks, by threads of this process.

    Raises:
        ClusterError: a node does not see the files.
        Exception: what the function raises.
    """
    import ray

    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    if sum(cpu >= 1 for cpu in cpus) < 2:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(function, files))
    check_reach([file.url for file in files[:1]], [])
    some = math.ceil(len(files) / (_TASKS_PER_CPU * sum(cpus)))
    task = ray.remote(num_cpus=1)(lambda part: list(map(function, part))).options(name="count rows")
    log.info("counting: the rows of %d files, by %g CPUs", len(files), sum(cpus))
    asked = [task.remote(files[start : start + some]) for start in range(0, len(files), some)]
    try:
        return [one for part in ray.get(asked) for one in part]
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ClusterError(f"The rows of {len(files)} files cannot be counted: {_refusal(error)}") from error


def end_process(node: str, pid: int, title: str) -> None:
    """Kill a process on a node of the cluster, if its title holds that word."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def end() -> None:
        with suppress(OSError), open(f"/proc/{pid}/cmdline") as line:  # it may have ended by itself
            if title in line.read():
                os.kill(pid, signal.SIGKILL)

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(end).remote()
