"""Serving: bundles over HTTP on Ray Serve.

Two deployments. `Encoders` hold the frozen BERT, on whatever nodes and GPUs there are; Ray Serve watches them and
brings them back. One `Gate` speaks HTTP, packs texts of many requests into batches for them, and applies the heads.
A request to Ray costs milliseconds, so only batches travel through it; `bertray serve` runs the gate in its own
process, without Ray's proxies before it, and calls encoders of its own machine by lines of its own; `serve deploy` runs
it as a deployment behind Ray's proxies.
"""

import asyncio
import gc
import logging
import math
import os
import re
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import orjson

from bertray import bundle as bundles
from bertray import lines
from bertray.batcher import AT_ONCE, Batcher, Input, Lost, Read
from bertray.cluster import connected, plan_workers
from bertray.errors import BertrayError, ClusterError, where
from bertray.explorer import OF_TEXTS, Explorer, plain
from bertray.features import Feature, parse
from bertray.lines import Line, Lines
from bertray.monitor import Monitor
from bertray.predict import checkpoint_of, encoder_spec
from bertray.progress import log
from bertray.registry import NAME, Reading, Registry
from bertray.service import Limits, Service
from bertray.spec import RaySizes
from bertray.storage import Location

_ENCODERS = "Encoders"
_LOOK_SECONDS = 1.0  # between looks at how many encoders there are
_READINGS = 16  # ways of reading that an encoder process remembers
_FORGIVEN = 30  # looks at which a line may be missing
_BACK_OFF = 0.2  # seconds, after an encoder was lost
_MANY = 1 << 20
_KEYS = "BERTRAY_API_KEYS"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Ray Serve without threads of its own, and without a write to its log, between the gate and an encoder: a sixth of a
# lone text's time. Its gRPC would save as much again, but tries for ever what an encoder ended over.
_QUICK = {
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}


@dataclass(frozen=True)
class Settings:
    """How a service is reached. heads: the folder that bundles may be put from; keys: a file of API keys, one a line;
    origins: of pages that may call it."""

    host: str = "127.0.0.1"
    port: int = 8000
    heads: str = ""
    keys: str = ""
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


def _keep() -> None:
    """Have Python's collector of garbage pass over all that there is by now. It would look through the modules again
    every second or so under load, and hold up every request for 150 ms."""
    gc.collect()
    gc.freeze()


# --- encoders ---------------------------------------------------------------------------------------------


class Encoders:
    """A process that encodes: texts of a reading to their vectors."""

    def __init__(self, encoder: Mapping[str, Any], device: str, threads: int, folder: str = "") -> None:
        """Load the encoder.

        Args:
            encoder: that section of a bundle.
            folder: of the gate's lines, if it is on the gate's machine.

        Raises:
            BundleError: this node has another checkpoint under its name.
        """
        from bertray.encoder import Encoder

        checkpoint = checkpoint_of(encoder)
        self._spec = encoder_spec(encoder)
        every = [Feature("mean", checkpoint.layers)]
        self._encoder = Encoder(checkpoint, self._spec, device, threads, "text", every)
        self._readings: dict[Reading, Any] = {}
        self._explorer = Explorer(checkpoint)
        self._loading, self._exploring = threading.Lock(), ThreadPoolExecutor(1, "bertray-explore")
        if folder and Path(folder).is_dir():
            with suppress(OSError):  # its path is longer than a socket's may be: then Ray Serve's calls do
                lines.listen(Path(folder), self._encode)
        _keep()

    async def encode(self, reading: Reading, inputs: Sequence[Input]) -> tuple[Any, ...]:
        """Vectors, spans, tokens, whether cut (see `Encoded`) of inputs, and for each that failed the reason."""
        return await asyncio.to_thread(self._encode, reading, inputs)

    def _encode(self, reading: Reading, inputs: Sequence[Input]) -> tuple[Any, ...]:
        encoder = self._reading(reading)
        pairs = None if inputs[0].pair is None else [given.pair or "" for given in inputs]
        try:
            found, failed = encoder.encode_rows([given.text for given in inputs], pairs)
        except Exception as error:  # what is no text's fault: Ray Serve starts another process, and the texts go there
            log.error("serve: an encoder is broken, and ends: %s", where(error))
            os._exit(1)
        return found.vectors, found.spans, found.tokens, found.truncated, failed

    def _reading(self, reading: Reading) -> Any:
        if found := self._readings.get(reading):
            return found
        with self._loading:  # others are read with meanwhile
            if reading not in self._readings:
                spec = self._spec.model_copy(
                    update={name: getattr(reading, name) for name in ("max_length", "truncation", "overlap")}
                )
                wanted = list(map(parse, reading.features))
                while len(self._readings) >= _READINGS:
                    del self._readings[next(iter(self._readings))]
                self._readings[reading] = self._encoder.reading(spec, reading.part, wanted)
            return self._readings[reading]

    async def explore(self, given: Input, show: Sequence[str], dims: int) -> bytes | Exception:
        """What `explorer.explore` gives of this process's checkpoint, as JSON, or what went wrong, which is not taken
        for the end of the process. In a thread of its own, one text after another: what is encoded does not wait for
        it, and what nobody waits for any more is not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._exploring, self._explore, given, show, dims)

    def _explore(self, given: Input, show: Sequence[str], dims: int) -> bytes | Exception:
        sections = [name for name in OF_TEXTS if name in show or not show]
        try:
            return orjson.dumps(plain(self._explorer.look(given.text, given.pair, sections, dims)))
        except Exception as error:
            return error


def _encoders(
    encoder: Mapping[str, Any],
    replicas: int,
    device: str,
    threads: int,
    num_cpus: float,
    folder: str = "",
    environment: Mapping[str, Any] | None = None,
) -> Any:
    """Their deployment. environment: Ray's runtime environment, without which they have that of who started Serve."""
    from ray import serve

    environment = environment or {}
    deployment = serve.deployment(
        name=_ENCODERS,
        num_replicas=replicas,
        max_ongoing_requests=AT_ONCE + 2,  # what is in flight when an answer is on its way back
        health_check_period_s=2,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={
            "num_cpus": num_cpus,
            "num_gpus": 1.0 if device == "cuda" else 0.0,
            "runtime_env": {**environment, "env_vars": {**environment.get("env_vars", {}), **_QUICK}},
        },
    )(Encoders)
    return deployment.bind(dict(encoder), device, threads, folder)


class _Fleet:
    """The encoders of an application, as the gate sees them."""

    def __init__(self, handle: Any, app: str, folder: str) -> None:
        """folder: that encoders of this machine listen in; empty if none do."""
        self._handle, self._app = handle, app
        self._lines = Lines(Path(folder), AT_ONCE) if folder else None
        self._elsewhere = _FORGIVEN  # looks in a row at which there were more encoders than lines lead to
        self.running = 0
        self._watching: asyncio.Task[None] | None = None

    def places(self) -> int:
        """How many batches they take at once. With none at all one waits there for the first to come back."""
        return max(1, AT_ONCE * (self._lines.processes if self._lines and self._near else self.running))

    async def watch(self) -> None:
        """Look after how many there are, from now on."""
        await self._look()
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self._look()

    async def _look(self) -> None:
        with suppress(Exception):  # the controller restarts, too
            self.running = await asyncio.to_thread(_running, self._app)
            if self._lines:
                await self._lines.look()
                self._elsewhere = 0 if self._lines.processes >= self.running else self._elsewhere + 1

    async def encode(self, reading: Reading, inputs: Sequence[Input]) -> list[Read]:
        """As `batcher.Encode`."""
        line = self._line()
        try:
            call = line.call if line else self._handle.encode.remote
            vectors, spans, tokens, truncated, failed = await self._asked(call, reading, list(inputs))
        finally:
            if self._lines and line:
                self._lines.give(line)
        return [
            Read(np.array(vector), span if span is None else np.array(span), int(count), bool(cut), failed.get(i, ""))
            for i, (vector, span, count, cut) in enumerate(zip(vectors, spans, tokens, truncated, strict=True))
        ]

    @property
    def _near(self) -> bool:
        """Whether all encoders are on this machine. One that has ended counts for Ray Serve until it notices."""
        return self._elsewhere < _FORGIVEN

    def _line(self) -> Line | None:
        """A line to an encoder, where all of them are near; else Ray Serve finds one."""
        return self._lines.take() if self._lines and self._near else None

    async def explore(self, given: Input, show: Sequence[str], dims: int) -> bytes:
        """As `service.Explore`."""
        found = await self._asked(self._handle.explore.remote, given, list(show), dims)
        if isinstance(found, Exception):
            raise found
        return bytes(found)

    async def _asked(self, call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        try:
            return await call(*arguments)
        except BertrayError as error:
            raise getattr(error, "cause", error) from None  # without Ray's account of where it happened
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            raise Lost("cancelled") from None  # by Ray Serve, which cancels what an encoder has not begun
        except Exception as error:
            log.warning("serve: an encoder was lost: %s", " ".join(str(error).split())[:200])
            await asyncio.sleep(_BACK_OFF)
            raise Lost(type(error).__name__) from None


def _running(app: str) -> int:
    from ray import serve

    found = serve.status().applications[app].deployments[_ENCODERS].replica_states
    return sum(count for state, count in found.items() if getattr(state, "value", state) == "RUNNING")


# --- the gate ---------------------------------------------------------------------------------------------


class Gate:
    """A service before the encoders of an application."""

    def __init__(
        self, encoders: Any, app: str, encoder: Mapping[str, Any], settings: Settings, folder: str = ""
    ) -> None:
        """A gate without heads.

        Args:
            encoders: their handle.
            encoder: that section of a bundle.
            folder: that encoders of this machine listen in.
        """
        self._encoder, self._settings = encoder, settings
        self._fleet, self._monitor = _Fleet(encoders, app, folder), Monitor()
        limits = settings.limits
        batcher = Batcher(self._fleet.encode, self._fleet.places, self._monitor, limits.queue, limits.cache)
        heads = Location(settings.heads) if settings.heads else None
        self.service = Service(Registry(encoder), batcher, self._fleet.explore, limits, heads)

    async def open(self, heads: Mapping[str, str]) -> None:
        """Serve those heads, from now on."""
        await self._fleet.watch()
        while not self._fleet.running:  # they may have packages to install and a model to fetch
            await asyncio.sleep(_LOOK_SECONDS)
        await self.service.replace(heads)
        _keep()

    def asgi(self, local: bool = False) -> Any:
        """What speaks HTTP. local: on this machine alone, and without keys by no other name: a site may have its own
        name lead here, and then be taken for a page of the service."""
        from bertray.api import application

        told = {name: self._encoder[name] for name in ("model", "revision", "precision")}
        told["fingerprint"] = self._encoder["identity"]["weights"][:16]
        keys, origins = read_keys(self._settings.keys), self._settings.origins
        hosts = _LOOPBACK if local and not keys else ()
        return application(self.service, self._monitor, told, lambda: self._fleet.running > 0, keys, origins, hosts)


class DeployedGate:
    """The gate as a deployment behind Ray Serve's proxies. Its heads are those of the config's `user_config`; others
    that are put live until its next config, or the end of its process."""

    async def __init__(  # type: ignore[misc]
        self, encoders: Any, encoder: Mapping[str, Any], heads: Mapping[str, str], settings: Settings
    ) -> None:
        from ray import serve

        self._gate = Gate(encoders, serve.get_replica_context().app_name, encoder, settings)
        await self._gate.open(heads)

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve the heads of a config, {"heads": {NAME: FOLDER}}, from now on."""
        if heads := config.get("heads"):
            await self._gate.service.replace({name: Location(path).url for name, path in heads.items()})

    def __serve_build_asgi_app__(self) -> Any:
        return self._gate.asgi()


def build(config: Mapping[str, Any]) -> Any:
    """The application that a config of `serve deploy` asks for (see jobs/serve.yaml).

    Args:
        config: heads, {NAME: FOLDER}; and as wanted replicas, threads, num_cpus, device; allow (the folder that
            bundles may be put from), keys, origins, limits.
    """
    from ray import serve

    known = {"heads", "replicas", "threads", "num_cpus", "device", "allow", "keys", "origins", "limits"}
    if unknown := {*config} - known:
        raise BertrayError(f"args of bertray.serve:build: {min(unknown)} is not known. Known are {sorted(known)}.")
    heads = {name: Location(path).url for name, path in config["heads"].items()}
    encoder = _shared(heads)
    settings = Settings(
        heads=config.get("allow", ""),
        keys=config.get("keys", ""),
        origins=tuple(config.get("origins", ())),
        limits=limits_of(config.get("limits", {})),
    )
    threads, device = int(config.get("threads", 4)), config.get("device", "cpu")
    encoders = _encoders(encoder, config.get("replicas", 1), device, threads, float(config.get("num_cpus", threads)))
    gate = serve.deployment(
        name="Gate",
        num_replicas=1,  # its cache, its queue and the heads that are put are those of one process
        max_ongoing_requests=settings.limits.queue,
        graceful_shutdown_timeout_s=settings.limits.deadline,
        ray_actor_options={"num_cpus": 0.5, "runtime_env": {"env_vars": _QUICK}},
    )(serve.ingress()(DeployedGate))
    return gate.bind(encoders, encoder, heads, settings)


def _shared(urls: Mapping[str, str]) -> dict[str, Any]:
    """The encoder that bundles have in common.

    Raises:
        BundleError: there is no such bundle, or they have none.
        CheckpointError: the encoder cannot be had.
    """
    found = {name: bundles.load(url) for name, url in urls.items()}
    first = next(iter(found.values()))
    checkpoint_of(first.encoder)
    registry = Registry(first.encoder)
    for name, bundle in found.items():
        registry.check(bundle, urls[name])
    return first.encoder


def read_keys(path: str) -> tuple[str, ...]:
    """API keys of a file, one a line (# for comments), and of the environment (BERTRAY_API_KEYS, with commas).

    Raises:
        BertrayError: the file cannot be read, or holds none.
    """
    found = [key.strip() for key in os.environ.get(_KEYS, "").split(",")]
    if path:
        try:
            written = Location(path).read().decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BertrayError(f"The file of keys {path} cannot be read: {error}.") from None
        in_file = [line.strip() for line in written if line.strip() and not line.strip().startswith("#")]
        if not in_file:
            raise BertrayError(f"The file of keys {path} holds none. Write one a line.")
        found += in_file
    return tuple(dict.fromkeys(key for key in found if key))


def limits_of(given: Mapping[str, Any]) -> Limits:
    """Limits with some of them given, as numbers or text.

    Raises:
        BertrayError: there is no such limit, or it is no number.
    """
    known = asdict(Limits())
    for name, value in given.items():
        if name not in known:
            raise BertrayError(f"There is no limit {name!r}. There are {', '.join(known)}.")
        try:
            known[name] = type(known[name])(value)
        except (OverflowError, TypeError, ValueError):
            raise BertrayError(f"The limit {name} must be a number. Got {value!r} instead.") from None
        if not 0 <= known[name] < math.inf or (known[name] < 1 and type(known[name]) is int and name != "cache"):
            raise BertrayError(f"The limit {name} must be at least 1. Got {value} instead.")
    return Limits(**known)


# --- bertray serve ----------------------------------------------------------------------------------------


def named(given: Sequence[str]) -> dict[str, str]:
    """Heads of the command line: name -> URL of NAME=FOLDER, or of a folder, which is called like its run.

    Raises:
        BertrayError: two have one name, or a name is none.
    """
    found: dict[str, str] = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not equals or "/" in name:
            parts = [part for part in Location(item).url.split("/") if part]
            name, path = parts[-2] if parts[-1] == "head" and len(parts) > 1 else parts[-1], item
        if not re.fullmatch(NAME, name):
            raise BertrayError(f"{name!r} cannot be a head's name. Give one: NAME={path}.")
        if name in found:
            raise BertrayError(f"Two heads are called {name}. Give them names: NAME={path}.")
        found[name] = Location(path).url
    return found


def run(heads: Mapping[str, str], settings: Settings, sizes: RaySizes) -> None:
    """Serve bundles until interrupted or terminated; then what is begun is answered first.

    Raises:
        BertrayError: there is no such bundle, or the port is taken.
    """
    signal.signal(signal.SIGTERM, _terminated)
    os.environ.update(_QUICK)  # read when Ray Serve is imported
    encoder = _shared(heads)  # what is wrong shows before Ray starts
    keys = read_keys(settings.keys)
    if settings.host not in _LOOPBACK and not keys:
        log.warning("Anyone who reaches %s may use this: there are no keys (--keys FILE).", settings.host)
    with _listening(settings.host, settings.port) as listening, connected(sizes):
        _run(heads, encoder, settings, sizes, listening)


def _terminated(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)  # on the way out all that was started is stopped


def _run(
    heads: Mapping[str, str], encoder: Mapping[str, Any], settings: Settings, sizes: RaySizes, listening: socket.socket
) -> None:
    import ray
    from ray import serve

    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    workers = plan_workers(sizes, _MANY)
    app = f"bertray-{settings.port}"  # others may serve on the same cluster
    serve.start(http_options={"location": "NoServer"})
    with TemporaryDirectory(prefix="bertray-", ignore_cleanup_errors=True) as folder:  # none but this user enters it
        environment = ray.get_runtime_context().runtime_env.to_dict()  # the packages that a job brings along
        encoders = _encoders(
            encoder, workers.count, workers.device, workers.threads, workers.num_cpus, folder, environment
        )
        try:
            handle = serve.run(encoders, name=app, route_prefix=None)
        except BaseException as error:
            asyncio.run(_stop(app))
            if isinstance(error, Exception):
                raise ClusterError(f"The encoder does not start: {' '.join(str(error).split())[:300]}") from None
            raise
        _serve(Gate(handle, app, encoder, settings, folder), app, heads, settings, listening)


async def _stop(app: str) -> None:
    """End an application, in the event loop that it was called from, and Ray Serve with its last one."""
    from ray import serve

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is on its way
    await asyncio.to_thread(serve.delete, app)
    if not (await asyncio.to_thread(serve.status)).applications:
        await serve.shutdown_async()


def _unheard(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Ray Serve asks encoders that have ended how busy they are, hundreds of times, and leaves it at the error."""
    from ray.exceptions import RayError

    if isinstance(context.get("exception"), RayError):
        log.debug("serve: %s", context["exception"])
    else:
        loop.default_exception_handler(context)


def _serve(gate: Gate, app: str, heads: Mapping[str, str], settings: Settings, listening: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Ends when it is told to, by SIGTERM or Ctrl-C, once what is begun is answered; at a second Ctrl-C at once."""

        interrupted = False

        @contextmanager
        def capture_signals(self) -> Any:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.handle_exit, number, None)
            yield

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
            self.interrupted |= sig == signal.SIGINT

    async def serving() -> bool:
        asyncio.get_running_loop().set_exception_handler(_unheard)
        try:
            return await until_told()
        finally:
            await _stop(app)

    async def until_told() -> bool:
        await gate.open(heads)
        config = uvicorn.Config(
            gate.asgi(local=settings.host in _LOOPBACK),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(settings.limits.deadline) + 1,
        )
        server = Server(config)
        _greet(heads, settings)
        await server.serve([listening])
        return server.interrupted

    loops: Callable[[], Any] | None = None
    with suppress(ImportError):
        import uvloop

        loops = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loops) as runner:
        if runner.run(serving()):
            raise KeyboardInterrupt


def _greet(heads: Mapping[str, str], settings: Settings) -> None:
    address = f"http://{settings.host}:{settings.port}"
    print(
        f"Serving {', '.join(heads)} at {address} (Ctrl-C stops it). Open it in a browser, or try:\n"
        f'  curl {address}/predict -d \'{{"inputs": "so happy"}}\'',
        flush=True,
    )


@contextmanager
def _listening(host: str, port: int) -> Any:
    """A socket that listens there.

    Raises:
        BertrayError: it cannot.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise BertrayError(f"Cannot listen on {host}:{port}: {error}. Give another --host or --port.") from None
    with listening:
        yield listening
