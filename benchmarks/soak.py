"""A soak: minutes of mixed load on `bertray serve` while a head is swapped and the encoder killed; all answers checked.

Texts are new in nearly every request, so that the encoder has to work. What is answered is kept, and held at the end
against what bertray answers in Python with the bundle that the answer's version stands for.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine, processes, results, services
from benchmarks.wire import Connection

# Two bundles on one encoder that answer differently, and what `spec.Head` is for each.
HEADS: dict[str, dict[str, Any]] = {"a": {"seed": 0}, "b": {"seed": 1, "l2": 0.1}}
PRECISION = "fp32"  # each process chooses anew what `auto` is, and scores then differ by up to 0.02
SWAPPED, STEADY = "mood", "steady"
RIGHT, WRONG, OLD, REFUSED, LOST = "right", "wrong", "of an older version", "error 429 or 5xx", "lost"
_WORKERS, _PAUSE = 8, 0.1  # connections; seconds that each waits at most between requests
_SWAP = 3.0  # seconds between changes of a head
_KILLS = (0.1, 0.2)  # of the time
_SETTLED = 0.6  # of the time, from when memory should not grow any more
_DEADLINE = 60.0  # seconds until a request counts as lost
_LIST = 32
_TOLD = 10  # of each outcome but the right one
_SCORE, _COSINE = 0.001, 0.9999


@dataclass(frozen=True)
class Request:
    """kind: for the table; judge: what is to be held against Python of a status and the content of an answer; raises
    UnfitError."""

    kind: str
    path: str
    body: bytes
    judge: "Callable[[int, Any], list[Owed]]"
    method: str = "POST"


@dataclass(frozen=True)
class Owed:
    """An answer that is held against Python at the end. bundle: key of HEADS, empty for vectors; values: label -> score
    for each text, or a vector; old: of a version that should not be served any more."""

    texts: list[str]
    bundle: str
    values: list[Any]
    old: bool = False


class UnfitError(Exception):
    """An answer is not what it should be; says why."""


@dataclass
class Versions:
    """Which bundle each version of the swapped head stands for, and which versions an answer may be of.

    order: versions in the order in which they were put; acknowledged: place of the last one that is surely served.
    """

    bundles: dict[int, str] = field(default_factory=lambda: {1: "a"})
    order: list[int] = field(default_factory=lambda: [1])
    acknowledged: int = 0

    @property
    def served(self) -> int:
        return self.order[self.acknowledged]

    def expect(self, version: int) -> None:
        """From now on answers may be of that version too."""
        self.order.append(version)

    def acknowledge(self, version: int) -> None:
        """Requests from now on are answered by that version."""
        if self.order[-1] != version:
            self.order.append(version)
        self.acknowledged = len(self.order) - 1


def section(heads: Mapping[str, str], scratch: Path, corpus: Sequence[str], seconds: float) -> str:
    """Serve, do all of it for some seconds, and tell what came of it.

    Args:
        heads: folders of the bundles in HEADS, all below scratch/heads.
    """
    port, folder = services.free_port(), scratch / "heads"
    names = [f"{STEADY}={heads['a']}", f"{SWAPPED}={heads['a']}"]
    command = services.bertray_command(names, port, "--heads", str(folder))
    with services.started("soak", command, port, scratch) as process:
        limits = services.call(f"http://127.0.0.1:{port}/info")["limits"]
        paths = {key: os.path.relpath(path, folder) for key, path in heads.items()}
        soak = Soak(port, process.pid, corpus, paths, limits, seconds)
        asyncio.run(soak.run())
    apart = soak.settle(heads)
    return report(soak, apart)


class Soak:
    """Load, changes and harm on one service, and what was seen."""

    def __init__(
        self,
        port: int,
        pid: int,
        corpus: Sequence[str],
        paths: Mapping[str, str],
        limits: Mapping[str, Any],
        seconds: float,
    ) -> None:
        self.seconds = seconds
        self.tally: Counter[tuple[str, str]] = Counter()
        self.memory: list[dict[str, float]] = []  # of each moment: `seconds`, and bytes of each part of the service
        self.silences: list[float] = []
        self.swaps = self.rollbacks = 0
        self._port, self._pid, self._corpus, self._paths, self._limits = port, pid, corpus, paths, limits
        self._rng, self._count = random.Random(0), 0
        self._versions, self._owed = Versions(), list[tuple[str, str, list[Owed]]]()
        self._answered: list[float] = []
        self._began = time.monotonic()

    async def run(self) -> None:
        """All of it, for the seconds given."""
        self._began = time.monotonic()
        tasks = [self._load() for _ in range(_WORKERS)]
        await asyncio.gather(*tasks, self._swap(), self._kill(), self._watch())

    @property
    def _passed(self) -> float:
        return time.monotonic() - self._began

    # --- load ---------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        connection = Connection(self._port)
        while self._passed < self.seconds:
            make = self._rng.choices(_KINDS, _WEIGHTS)[0]
            for request in make(self):
                await self._send(connection, request)
            await asyncio.sleep(self._rng.uniform(0, _PAUSE))
        connection.close()

    async def _send(self, connection: Connection, request: Request) -> Any:
        """Send a request and count what comes; its content if that is what it should be."""
        try:
            status, headers, content = await connection.ask(request.method, request.path, request.body, _DEADLINE)
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError) as error:
            self._note(request.kind, LOST, f"{type(error).__name__} {error}")
            await asyncio.sleep(0.2)
            return None
        try:
            answer = json.loads(content)
        except ValueError:
            self._note(request.kind, WRONG, f"{status} {content[:100]!r}")
            return None
        if status >= 500 or status == 429:
            self._note(request.kind, REFUSED if _is_error(answer) else WRONG, f"{status} {answer}", headers)
            return None
        try:
            owed = request.judge(status, answer)
        except UnfitError as reason:
            self._note(request.kind, WRONG, f"{status} {reason}: {str(answer)[:200]}")
            return None
        outcome = OLD if any(one.old for one in owed) else RIGHT
        self._note(request.kind, outcome)
        self._owed.append((request.kind, outcome, owed))
        if status == 200:
            self._answered.append(self._passed)
        return answer

    def _note(self, kind: str, outcome: str, words: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Count it; the first of each outcome are also told."""
        self.tally[kind, outcome] += 1
        if words and sum(count for (_, its), count in self.tally.items() if its == outcome) <= _TOLD:
            wait = f" (to be tried again after {headers['retry-after']} s)" if "retry-after" in (headers or {}) else ""
            print(f"{self._passed:.1f} s: {kind}: {outcome}: {words}{wait}", file=sys.stderr)

    def _texts(self, count: int) -> list[str]:
        """New texts, and now and then one that was sent before."""
        found = []
        for _ in range(count):
            self._count += 1
            number = self._count if self._rng.random() < 0.9 else self._rng.randrange(self._count)
            found.append(f"{self._corpus[number % len(self._corpus)]} {number}")
        return found

    def _one(self) -> list[Request]:
        return [self._predict("one text", self._texts(1), self._rng.choice((SWAPPED, SWAPPED, STEADY)))]

    def _listed(self) -> list[Request]:
        return [self._predict(f"{_LIST} texts", self._texts(_LIST), SWAPPED)]

    def _predict(self, kind: str, texts: list[str], name: str) -> Request:
        acknowledged = self._versions.acknowledged
        body = {"inputs": texts if len(texts) > 1 else texts[0]}

        def judge(status: int, answer: Any) -> list[Owed]:
            _check(status == 200, "200 was due")
            return [self._owed_by(answer, name, texts, acknowledged)]

        return Request(kind, f"/v1/heads/{name}/predict", _json(body), judge)

    def _owed_by(self, answer: Any, name: str, texts: list[str], acknowledged: int) -> Owed:
        """What is to be held against Python of a head's answer.

        Raises:
            UnfitError: it is wrong, as far as can be told without the bundle.
        """
        try:
            version, predictions = answer["version"], answer["predictions"]
            values = [{one["label"]: one["score"] for one in found["scores"]} for found in predictions]
            sure = all(found["label"] == found["scores"][0]["label"] for found in predictions)
        except (TypeError, KeyError, IndexError):
            raise UnfitError("another form") from None
        _check(answer["head"] == name and len(values) == len(texts), "another head or number of answers")
        _check(sure, "another label than the likeliest")
        if name == STEADY:
            _check(version == 1, "another version")
            return Owed(texts, "a", values)
        _check(version in self._versions.bundles, "a version that was never put")
        old = version not in self._versions.order[acknowledged:]
        return Owed(texts, self._versions.bundles[version], values, old)

    def _several(self) -> list[Request]:
        """A text for both heads in one request."""
        texts, acknowledged = self._texts(1), self._versions.acknowledged

        def judge(status: int, answer: Any) -> list[Owed]:
            heads = answer.get("heads") if isinstance(answer, dict) else None
            _check(status == 200 and isinstance(heads, dict) and {*heads} == {STEADY, SWAPPED}, "another form")
            return [self._owed_by(part, name, texts, acknowledged) for name, part in heads.items()]

        body = {"inputs": texts[0], "heads": [STEADY, SWAPPED]}
        return [Request("one text, two heads", "/predict", _json(body), judge)]

    def _default(self) -> list[Request]:
        """The default head, in the form of text-embeddings-inference."""
        texts = self._texts(1)

        def judge(status: int, answer: Any) -> list[Owed]:
            try:
                value = {one["label"]: one["score"] for one in answer}
            except (TypeError, KeyError):
                raise UnfitError("another form") from None
            _check(status == 200, "200 was due")
            return [Owed(texts, "a", [value])]

        return [Request("/predict", "/predict", _json({"inputs": texts[0]}), judge)]

    def _embed(self) -> list[Request]:
        texts = self._texts(3)
        return [_of_vectors("/embed", {"inputs": texts}, texts, lambda answer: answer)]

    def _openai(self) -> list[Request]:
        texts = self._texts(3)
        body = {"input": texts, "model": STEADY}
        return [_of_vectors("/v1/embeddings", body, texts, lambda answer: [one["embedding"] for one in answer["data"]])]

    def _bad(self) -> list[Request]:
        """A request that must be refused, and on the same connection one that must not suffer from it."""
        path = f"/v1/heads/{SWAPPED}/predict"
        most, characters = self._limits["texts"], self._limits["characters"]
        words, wanted, method, where, body = self._rng.choice(
            [
                ("not JSON", 400, "POST", path, b'{"inputs": '),
                ("not JSON", 400, "POST", "/embed", b"\xff"),
                ("another form", 422, "POST", path, b'{"inputs": 5}'),
                ("another form", 422, "POST", path, b'{"texts": "a"}'),
                ("another form", 422, "POST", "/predict", b"[]"),
                ("another form", 422, "POST", path, b'{"inputs": ["a", null]}'),
                ("another form", 422, "POST", "/v1/embeddings", b'{"input": {"a": 1}, "model": "steady"}'),
                ("too much", 413, "POST", path, _json({"inputs": ["a"] * (most + 1)})),
                ("too much", 413, "POST", path, _json({"inputs": "a" * (characters + 1)})),
                ("unknown head or path", 404, "POST", "/v1/heads/nothing/predict", b'{"inputs": "a"}'),
                ("unknown head or path", 404, "GET", "/v1/nothing", b""),
                ("another method", 405, "GET", path, b""),
            ]
        )

        def judge(status: int, answer: Any) -> list[Owed]:
            _check(status == wanted and _is_error(answer), f"{wanted} with an error was due for {body[:40]!r}")
            return []

        after = self._predict("one text after a bad request", self._texts(1), SWAPPED)
        return [Request(f"bad: {words}", where, body, judge, method), after]

    # --- changes and harm ---------------------------------------------------------------------------------

    async def _swap(self) -> None:
        """Put the other bundle every few seconds; every fifth time go back a version instead."""
        connection, turn = Connection(self._port), 0
        while self._passed < self.seconds:
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * _SWAP)
            turn += 1
            if turn % 5:
                await self._put(connection)
            else:
                await self._roll_back(connection)
        connection.close()

    async def _put(self, connection: Connection) -> None:
        versions = self._versions
        other = "b" if versions.bundles[versions.served] == "a" else "a"
        version = max(versions.bundles) + 1
        versions.bundles[version] = other
        versions.expect(version)
        body = _json({"bundle": self._paths[other]})
        done = await self._send(connection, Request("PUT", f"/v1/heads/{SWAPPED}", body, _judge_change, "PUT"))
        self.swaps += done is not None
        await self._ask_served(connection, version if done is not None else None)

    async def _roll_back(self, connection: Connection) -> None:
        head = await self._head(connection)
        if head is None or head["previous"] is None:
            return
        self._versions.expect(head["previous"])
        path = f"/v1/heads/{SWAPPED}/rollback"
        done = await self._send(connection, Request("rollback", path, b"{}", _judge_change))
        self.rollbacks += done is not None
        await self._ask_served(connection, head["previous"] if done is not None else None)

    async def _ask_served(self, connection: Connection, wanted: int | None) -> None:
        """Which version is served after a change; None is wanted where it is not known whether it took place."""
        while self._passed < self.seconds + _DEADLINE:
            head = await self._head(connection, wanted)
            if head is not None:
                self._versions.acknowledge(head["version"])
                return
            if wanted is not None:
                self._versions.acknowledge(wanted)
                return
            await asyncio.sleep(0.2)

    async def _head(self, connection: Connection, wanted: int | None = None) -> Any:
        def judge(status: int, answer: Any) -> list[Owed]:
            head = _found(answer)
            _check(head is not None, "another form")
            _check(head["version"] in self._versions.bundles, "a version that was never put")
            _check(wanted in (None, head["version"]), f"version {wanted} was put")
            return []

        answer = await self._send(connection, Request("GET /v1/heads", "/v1/heads", b"", judge, "GET"))
        return None if answer is None else _found(answer)

    async def _kill(self) -> None:
        """End the process that encodes, without a word, a few times."""
        for share in _KILLS:
            await asyncio.sleep(max(0, share * self.seconds - self._passed))
            while (pid := _encoder(self._pid)) is None:  # the one before has not come back yet
                if self._passed > self.seconds:
                    return
                await asyncio.sleep(0.2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            print(f"{self._passed:.1f} s: process {pid} was killed", file=sys.stderr)
            self.silences.append(self._passed)

    async def _watch(self) -> None:
        step = min(10.0, self.seconds / 12)
        while self._passed < self.seconds:
            self.memory.append({"seconds": self._passed} | _held(self._pid))
            await asyncio.sleep(step)

    # --- at the end ---------------------------------------------------------------------------------------

    def settle(self, heads: Mapping[str, str]) -> float:
        """Hold what was answered against Python: what differs is not right, but wrong. Gives the share of texts on
        which the two bundles can be told apart."""
        import bertray

        texts = list({text: None for *_, several in self._owed for owed in several for text in owed.texts})
        print(f"{len(texts)} texts are encoded to compare", file=sys.stderr)
        predictors = {key: bertray.load(path, "cpu") for key, path in heads.items()}
        vectors = np.asarray(predictors["a"].encoder.encode(texts).vectors, np.float32)
        scores = {key: predictor.bundle.head.probabilities(vectors) for key, predictor in predictors.items()}
        place = {text: i for i, text in enumerate(texts)}
        labels = predictors["a"].bundle.labels
        for kind, outcome, several in self._owed:
            for owed in several:
                rows = [place[text] for text in owed.texts]
                if owed.bundle:
                    most = _most_apart(scores[owed.bundle][rows], owed.values, labels)
                    wrong = f"scores differ by {most:.2g} from bundle {owed.bundle}" if most >= _SCORE else ""
                else:
                    wrong = "" if _same_vectors(vectors[rows], owed.values) else "vectors differ"
                if wrong:
                    self.tally[kind, outcome] -= 1
                    self._note(kind, WRONG, wrong)
                    break
        return float((np.abs(scores["a"] - scores["b"]).max(axis=1) > 2 * _SCORE).mean()) if texts else 0.0

    def longest_silences(self) -> list[float]:
        """After each kill, the longest time without an answer before the next one."""
        found = []
        for began, ended in zip(self.silences, [*self.silences[1:], self.seconds], strict=True):
            within = [began, *(at for at in self._answered if began < at < ended), ended]
            found.append(max(b - a for a, b in itertools.pairwise(within)))
        return found


_MIX: dict[Callable[[Soak], list[Request]], float] = {
    Soak._one: 10,
    Soak._listed: 1,
    Soak._several: 2,
    Soak._default: 2,
    Soak._embed: 1,
    Soak._openai: 1,
    Soak._bad: 4,
}
_KINDS, _WEIGHTS = list(_MIX), list(_MIX.values())


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _check(right: bool, otherwise: str) -> None:
    if not right:
        raise UnfitError(otherwise)


def _judge_change(status: int, answer: Any) -> list[Owed]:
    _check(200 <= status < 300, "200 was due")
    return []


def _of_vectors(path: str, body: dict[str, Any], texts: list[str], read: Callable[[Any], Any]) -> Request:
    def judge(status: int, answer: Any) -> list[Owed]:
        try:
            vectors = [np.asarray(vector, np.float32) for vector in read(answer)]
        except (TypeError, KeyError, ValueError):
            raise UnfitError("another form") from None
        _check(status == 200 and len(vectors) == len(texts), "another number of vectors")
        return [Owed(texts, "", vectors)]

    return Request(path, path, _json(body), judge)


def _is_error(answer: Any) -> bool:
    """Whether it is an error in one line, in the form of text-embeddings-inference or of OpenAI."""
    error = answer.get("error") if isinstance(answer, dict) else None
    words = error.get("message") if isinstance(error, dict) else error
    return isinstance(words, str) and 0 < len(words) < 1000 and "\n" not in words and "Traceback" not in words


def _found(answer: Any) -> Any:
    """The swapped head in a list of all; None if the list has another form."""
    try:
        return next(head for head in answer["heads"] if head["name"] == SWAPPED and head["version"] > 0)
    except (TypeError, KeyError, StopIteration):
        return None


def _encoder(pid: int) -> int | None:
    """The process that encodes; None while it starts."""
    return next(iter(processes.titled(pid, "Encoders")), None)


def _most_apart(expected: NDArray[np.float32], values: Sequence[Mapping[str, float]], labels: Sequence[str]) -> float:
    """The most by which a score differs from what is expected; a missing one by 1."""
    found = np.array([[value.get(label, -1.0) for label in labels] for value in values])
    return float(np.abs(found - expected).max())


def _same_vectors(expected: NDArray[np.float32], values: Sequence[NDArray[np.float32]]) -> bool:
    return all(
        found.shape == row.shape
        and float(found @ row) >= _COSINE * float(np.linalg.norm(row))
        and abs(float(np.linalg.norm(found)) - 1) < 1e-3
        for row, found in zip(expected, values, strict=True)
    )


def report(soak: Soak, apart: float) -> str:
    """The section: a line a kind of request, and memory."""
    outcomes = (RIGHT, WRONG, OLD, REFUSED, LOST)
    kinds = sorted({kind for kind, _ in soak.tally})
    lines = [{"request": kind} | {name: f"{soak.tally[kind, name]:,}" for name in outcomes} for kind in kinds]
    lines.append({"request": "all"} | {name: f"{sum(soak.tally[kind, name] for kind in kinds):,}" for name in outcomes})
    silences = ", ".join(f"{seconds:.1f}" for seconds in soak.longest_silences()) or "-"
    return "\n\n".join(
        [
            "## A soak",
            f"{soak.seconds / 60:g} minutes of mixed load over {_WORKERS} connections on `bertray serve`, in "
            f"{PRECISION}. Meanwhile a head was swapped {soak.swaps:,} times between two bundles and taken back a "
            f"version {soak.rollbacks:,} times, and the process that encodes was killed (SIGKILL) {len(soak.silences)} "
            f"times; the longest time without an answer after that: {silences} seconds. *Right*: form and status as "
            f"they should be, and scores within {_SCORE} (vectors within a cosine of {_COSINE}) of what bertray "
            "answers in Python with the bundle of the version that the answer names. The two bundles can be told apart "
            f"on {apart:.0%} of the texts. *Of an older version*: right, but of a version that had been replaced "
            "before the request was sent. *Lost*: the connection broke, or no answer in a minute.",
            results.table(lines),
            results.table([_grown(soak.memory, part, soak.seconds) for part in soak.memory[0] if part != "seconds"]),
            "\n".join(f"- {name}: {fact}" for name, fact in machine.describe().items()),
        ]
    )


def _held(pid: int) -> dict[str, int]:
    """Bytes that each part of a service holds."""
    encoders = [one for found in processes.titled(pid, "Encoders") for one in processes.below(found)]
    parts = {"the gate": [pid], "the encoder": encoders}
    parts["Ray's own"] = [one for one in processes.below(pid) if one != pid and one not in encoders]
    held = {part: sum(map(processes.memory, found)) for part, found in parts.items()}
    return held | {"all": sum(held.values())}


def _grown(memory: Sequence[Mapping[str, float]], part: str, seconds: float) -> dict[str, str]:
    settled = [one for one in memory if one["seconds"] >= _SETTLED * seconds]
    held = [one[part] / 1e6 for one in memory]
    return {
        "memory, MB": part,
        "at the start": f"{held[0]:,.0f}",
        f"at {_SETTLED:.0%} of the time": f"{settled[0][part] / 1e6:,.0f}" if settled else "-",
        "at the end": f"{held[-1]:,.0f}",
        "most": f"{max(held):,.0f}",
        f"slope after {_SETTLED:.0%}, a minute": f"{_slope(settled, part):+.1f}",
    }


def _slope(memory: Sequence[Mapping[str, float]], part: str) -> float:
    if len(memory) < 2:
        return 0.0
    minutes, held = np.array([(one["seconds"] / 60, one[part] / 1e6) for one in memory]).T
    return float(np.polyfit(minutes, held, 1)[0])
