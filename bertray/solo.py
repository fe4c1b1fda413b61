"""A Ray for one job alone: what bertray starts for itself, without what only shared clusters need.

Ray's own start brings a dashboard, an autoscaler's monitor, a log monitor, two agents and three helper actors of Ray
Data, each a Python process: on a laptop they cost more than a small job. Nobody looks at a cluster that ends with the
command, it cannot grow, and its logs lie in files. What is left out is left out by Ray's own parts, which are private
to Ray: any other version than the one that this was tested with starts as it is. Knows nothing of what runs on it.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

_TESTED = "2.60.0"
# Raylets do not wait for the agents' ports when they are written down already; -1 is Ray's word for a port not in use.
_PORTS = ("METRICS_AGENT_PORT_NAME", "METRICS_EXPORT_PORT_NAME", "DASHBOARD_AGENT_LISTEN_PORT_NAME")
_AGENTS_LIBRARIES = "ray.dashboard.optional_deps"
# A process that costs nothing, takes any arguments, and ends with the raylet, whose pipe it reads.
_NOTHING = ["sh", "-c", "exec cat"]
# Ray holds the first driver back until a worker for each CPU has started.
_CONFIG = {"prestart_worker_first_driver": False}


@contextmanager
def starting(environments: bool) -> Iterator[None]:
    """While this is entered, a cluster that `ray.init` starts lacks what one job does not need.

    Args:
        environments: whether the job uses runtime environments, as Ray Train does.
    """
    try:
        import ray

        if sys.platform != "linux" or ray.__version__ != _TESTED:  # elsewhere agents have no pipe to the raylet
            raise ImportError
        from ray._private import node

        replacement = _node(environments)
    except (ImportError, AttributeError):
        yield
        return
    with patch.object(node, "Node", replacement):
        yield


def _node(environments: bool) -> type:
    from ray._private import node, ray_constants, services

    raylet = importlib.import_module("ray._raylet")
    ports = [getattr(raylet, name) for name in _PORTS]
    if not environments:
        ports.append(raylet.RUNTIME_ENV_AGENT_PORT_NAME)
    start = services.start_ray_process
    command = services._build_python_executable_command_memory_profileable
    left_out = {ray_constants.PROCESS_TYPE_DASHBOARD_AGENT}
    if not environments:
        left_out.add(ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT)

    def agent(component: str, *arguments: Any, **options: Any) -> list[str]:
        return _NOTHING if component in left_out else command(component, *arguments, **options)

    def without_prestart(command: list[str], *arguments: Any, **options: Any) -> Any:
        """Processes for tasks, which a job of actors does not have."""
        kept = [part for part in command if not part.startswith("--num_prestart_python_workers")]
        return start(kept, *arguments, **options)

    class Node(node.Node):
        def __init__(self, ray_params: Any, head: bool = False, **options: Any) -> None:
            self.alone = head
            if head:
                ray_params._system_config = {**(ray_params._system_config or {}), **_CONFIG}
            super().__init__(ray_params, head, **options)

        def start_monitor(self) -> None:
            pass

        def start_log_monitor(self) -> None:
            pass

        def start_api_server(self, **options: Any) -> None:
            self._webui_url = ""

        def start_raylet(self, *arguments: Any, **options: Any) -> None:
            for port in ports:
                raylet.persist_port(self._session_dir, self._node_id, port, -1)
            # Ray imports the agent's libraries here, to see whether it could run: None stops that.
            sys.modules.setdefault(_AGENTS_LIBRARIES, None)  # type: ignore[arg-type]
            try:
                with (
                    patch.object(services, "_build_python_executable_command_memory_profileable", agent),
                    patch.object(services, "start_ray_process", without_prestart),
                ):
                    super().start_raylet(*arguments, **options)
            finally:
                if sys.modules[_AGENTS_LIBRARIES] is None:
                    del sys.modules[_AGENTS_LIBRARIES]

    return Node


@contextmanager
def running() -> Iterator[None]:
    """While this is entered, Ray Data runs without its helper actors on a cluster that was started for one job: one
    counts for a dashboard, one tells where actors are, one shares the cluster among jobs."""
    with ExitStack() as stack:
        try:
            for module, name, stand_in in _stand_ins():
                stack.enter_context(patch.object(module, name, lambda *_, stand_in=stand_in: stand_in))
        except (ImportError, AttributeError):
            stack.close()
        yield


def alone() -> bool:
    """Whether this process runs on a cluster that was started so."""
    try:
        from ray._private import worker
    except ImportError:
        return False
    return bool(getattr(getattr(worker, "_global_node", None), "alone", False))


def _stand_ins() -> list[tuple[Any, str, "_Absent"]]:
    import ray

    if not alone():
        return []
    from ray.data._internal import stats
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
    from ray.data._internal.execution.operators import actor_pool_map_operator as pool
    from ray.data._internal.utils import cached_ray_internals as cached

    tracker = _Absent({"get_actor_locations": {}})
    everything = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return [
        (stats, "get_or_create_stats_actor", _Absent({})),
        (pool, "get_or_create_actor_location_tracker", tracker),
        (cached, "get_or_create_actor_location_tracker", tracker),
        (coordinator, "get_or_create_autoscaling_coordinator", _Absent({"get_reserved_resources": everything})),
    ]


class _Absent:
    """Stands in for an actor: takes every call, and answers some. Travels to workers."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Call(self._answers.get(name))


class _Call:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def remote(self, *arguments: Any, **options: Any) -> Any:
        import ray

        return ray.put(self._answer)
