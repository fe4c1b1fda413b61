"""Batches: texts that wait for an encoder, packed by tokens. Knows nothing of HTTP, of heads or of Ray.

Texts are cut loose from the requests they came in. Each has a place in time: when it would be done if the encoder
worked on its request alone, from the moment it arrived (start-time fair queueing, Goyal et al. 1996). The least goes
first, so a short text passes a long one and a single text passes the tail of a list of thousands, but none waits for
ever. A batch takes as many tokens as the encoder does in `_SECONDS`; while it is encoded the next texts gather, so
that batches grow with the load, and without load nothing waits.
"""

import asyncio
import contextvars
import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bertray.errors import BertrayError

AT_ONCE = 2  # batches an encoder: while one is encoded, the next is tokenized
_SECONDS = 0.03  # that a batch takes
_LEAST, _MOST = 256, 65_536  # tokens of a batch
_TRIES = 3  # encoders that may end while they encode a text
_SPECIAL = 2  # tokens of a text besides its own
_PLAIN = 2_000  # characters of texts that tell how dense texts are; longer ones may be blanks


class Overloaded(BertrayError):
    """Too much waits already. seconds: after which to try again."""

    def __init__(self, waiting: int, seconds: float) -> None:
        super().__init__(f"{waiting} texts wait already. Try again in {seconds:.0f} s.")
        self.seconds = seconds


class Late(BertrayError):
    """A request was not answered in its time."""


class Unavailable(BertrayError):
    """There is no encoder that lives long enough to encode a text."""


class Lost(Exception):
    """Raised by what encodes: the encoder ended, or broke, before it answered."""


class Kind(Protocol, Hashable):
    """What texts must have in common to be encoded together."""

    @property
    def max_length(self) -> int: ...
    @property
    def truncation(self) -> str: ...


class Input(NamedTuple):
    """A text, and the second text of a pair."""

    text: str
    pair: str | None = None


@dataclass(frozen=True)
class Read:
    """What encoding gives a text: its vector [width], or those of its words [words, width] with their spans in
    characters; how many tokens it has; whether it was cut. Or the reason why it cannot be encoded."""

    vectors: NDArray[Any]
    spans: NDArray[np.int64] | None
    tokens: int
    truncated: bool
    reason: str = ""


class Watch(Protocol):
    """What is told of what happens, for metrics."""

    def encoded(self, texts: int, tokens: int, seconds: float) -> None: ...
    def looked_up(self, found: int, missed: int) -> None: ...
    def tried_again(self, texts: int) -> None: ...


@dataclass(eq=False)
class _Request:
    """reads: [n] what came so far; missing: how many did not."""

    reads: list[Any]
    missing: int
    done: "asyncio.Future[None]"


@dataclass(eq=False)
class _Waiting:
    """A text that waits, for some requests at their places."""

    key: tuple[Any, Input]
    tokens: float
    askers: list[tuple[_Request, int]] = field(default_factory=list)
    tries: int = 0

    @property
    def wanted(self) -> bool:
        return any(not request.done.done() for request, _ in self.askers)

    def settle(self, read: Read | None, error: Exception | None = None) -> None:
        for request, place in self.askers:
            if request.done.done():
                continue
            if error is not None:
                request.done.set_exception(error)
                continue
            request.reads[place] = read
            request.missing -= 1
            if not request.missing:
                request.done.set_result(None)


class Cache:
    """What was read lately, up to a number of bytes.

    Kept as plain tuples of plain values, which Python's collector of garbage leaves alone: it would look through all
    else that is kept again and again, and hold up every request meanwhile.
    """

    def __init__(self, size: int) -> None:
        """size: bytes; 0 keeps nothing."""
        self.size, self.held = size, 0
        self._kinds: dict[Any, int] = {}
        self._reads: OrderedDict[tuple[Any, ...], tuple[Any, ...]] = OrderedDict()

    def get(self, key: tuple[Any, Input]) -> Read | None:
        """What a text was read as, if it is kept."""
        plain = self._plain(key)
        found = self._reads.get(plain)
        if found is None:
            return None
        self._reads.move_to_end(plain)
        return Read(*found[1:])

    def put(self, key: tuple[Any, Input], read: Read) -> None:
        """Keep what a text was read as; what was asked for longest ago goes."""
        size = 500 + read.vectors.nbytes + 4 * _size(key[1])
        size += 0 if read.spans is None else read.spans.nbytes
        if size > self.size // 8:
            return
        plain = self._plain(key)
        self.held += size - self._reads.pop(plain, (0,))[0]
        self._reads[plain] = size, read.vectors, read.spans, read.tokens, read.truncated, read.reason
        while self.held > self.size:
            self.held -= self._reads.popitem(last=False)[1][0]

    def _plain(self, key: tuple[Any, Input]) -> tuple[Any, ...]:
        kind, given = key
        return self._kinds.setdefault(kind, len(self._kinds)), given.text, given.pair


class _Ratio:
    """One thing by another, as sums of which the latest count most. (A mean of ratios would make much of answers that
    happen to come at once.)"""

    def __init__(self, above: float, below: float, share: float) -> None:
        """share: how much the latest counts."""
        self._above, self._below, self._share = above, below, share

    def add(self, above: float, below: float) -> None:
        self._above += self._share * (above - self._above)
        self._below += self._share * (below - self._below)

    @property
    def value(self) -> float:
        return self._above / max(self._below, 1e-9)


# What encodes texts that are of one kind, all or none of them pairs; may raise Lost.
Encode = Callable[[Any, Sequence[Input]], Awaitable[Sequence[Read]]]


class Batcher:
    """Texts of many requests to one or several encoders. All of it happens in one event loop."""

    def __init__(self, encode: Encode, places: Callable[[], int], watch: Watch, queue: int, cache: int) -> None:
        """A batcher without texts.

        Args:
            places: how many batches may be encoded at once, at this moment.
            queue: how many texts may wait; a request that finds none waiting is taken whatever its size.
            cache: bytes of vectors to keep.
        """
        self._encode, self._places, self._watch, self._limit = encode, places, watch, queue
        self._cache = Cache(cache)
        self._queues: dict[tuple[Any, bool], list[tuple[float, int, _Waiting]]] = {}
        self._pending: dict[tuple[Any, Input], _Waiting] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._woken = False
        self._alone = False  # whether a batch is encoded that others must not suffer from
        self._finished = 0.0
        self._speed = _Ratio(50.0, 0.01, 0.1)  # tokens a second
        self._density = _Ratio(30.0, 100.0, 0.02)  # tokens a character
        self._tokens = 0.0  # that wait
        self.waiting = 0

    @property
    def seconds(self) -> float:
        """In which what waits now will probably be done."""
        return self._tokens / self._speed.value

    @property
    def at_work(self) -> int:
        """How many batches are being encoded."""
        return len(self._tasks)

    async def read(self, kind: Kind, inputs: Sequence[Input], seconds: float) -> list[Read]:
        """What encoding gives inputs, in their order. Those that nobody waits for any longer are not encoded.

        Args:
            seconds: after which it gives up.

        Raises:
            Overloaded: too many wait already.
            Late: the time is over.
            Unavailable: no encoder lived long enough.
        """
        reads: list[Any] = [self._cache.get((kind, given)) for given in inputs]
        missing = [place for place, read in enumerate(reads) if read is None]
        self._watch.looked_up(len(inputs) - len(missing), len(missing))
        if not missing:
            return reads
        if self.waiting and self.waiting + len(missing) > self._limit:
            raise Overloaded(self.waiting, max(1.0, self.seconds))
        request = _Request(reads, len(missing), asyncio.get_running_loop().create_future())
        self._queue(kind, inputs, missing, request)
        try:
            async with asyncio.timeout(seconds):
                await request.done
        except TimeoutError:
            raise Late(f"Not answered within {seconds:g} s. Try again, or send fewer texts at once.") from None
        finally:
            request.done.cancel()
        return reads

    def _queue(self, kind: Kind, inputs: Sequence[Input], missing: Sequence[int], request: _Request) -> None:
        due = time.monotonic()
        for place in missing:
            given = inputs[place]
            key = kind, given
            waiting = self._pending.get(key)
            if waiting is None or not waiting.wanted:
                waiting = _Waiting(key, self._estimated(kind, given))
                self._pending[key] = waiting
                due += waiting.tokens / self._speed.value
                self._push(waiting, due)
            waiting.askers.append((request, place))
        self._wake()

    def _estimated(self, kind: Kind, given: Input) -> float:
        tokens = _size(given) * self._density.value + _SPECIAL
        return tokens if kind.truncation == "window" else min(kind.max_length, tokens)

    def _push(self, waiting: _Waiting, due: float) -> None:
        kind, given = waiting.key
        queue = self._queues.setdefault((kind, given.pair is not None), [])
        heapq.heappush(queue, (due, next(self._numbers), waiting))
        self.waiting += 1
        self._tokens += waiting.tokens

    def _wake(self) -> None:
        """Look for work once all that arrived in this turn of the loop is in its queue."""
        if not self._woken:
            self._woken = True
            # Not in the context of the request that happens to wake it: Ray Serve would end with that request what is
            # asked of an encoder for others.
            asyncio.get_running_loop().call_soon(self._start, context=contextvars.Context())

    def _start(self) -> None:
        self._woken = False
        while not self._alone and len(self._tasks) < self._places() and (batch := self._batch()):
            self._alone = batch[0].tries > 1
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._alone = False
        self._wake()

    def _batch(self) -> list[_Waiting]:
        """The texts that are due first, of one kind; none if nothing waits, or must wait until no other is encoded."""
        share = max(1.0, self._places() / AT_ONCE)  # the speed is that of all encoders together
        budget = min(max(self._speed.value * _SECONDS / share, _LEAST), _MOST)
        while self._queues:
            key = min(self._queues, key=lambda key: self._queues[key][0])
            queue, tokens = self._queues[key], 0.0
            if self._tasks and queue[0][2].tries > 1:
                return []  # what two encoders ended over goes alone
            batch: list[_Waiting] = []
            while queue and (not batch or tokens + queue[0][2].tokens <= budget):
                if batch and (batch[0].tries > 1 or queue[0][2].tries > 1):
                    break
                waiting = self._pop(queue)
                if waiting.wanted:
                    batch.append(waiting)
                    tokens += waiting.tokens
                else:
                    self._forget(waiting)
            if not queue:
                del self._queues[key]
            if batch:
                return batch
        return []

    def _pop(self, queue: list[tuple[float, int, _Waiting]]) -> _Waiting:
        waiting = heapq.heappop(queue)[2]
        self.waiting -= 1
        self._tokens -= waiting.tokens
        return waiting

    def _forget(self, waiting: _Waiting) -> None:
        if self._pending.get(waiting.key) is waiting:
            del self._pending[waiting.key]

    async def _run(self, batch: list[_Waiting]) -> None:
        begun = time.monotonic()
        try:
            reads = await self._encode(batch[0].key[0], [waiting.key[1] for waiting in batch])
        except Lost as error:
            self._again(batch, error)
            return
        except Exception as error:
            self._settle(batch, [None] * len(batch), error)
            return
        self._measure(batch, reads, begun)
        for waiting, read in zip(batch, reads, strict=True):
            if not read.reason:
                self._cache.put(waiting.key, read)
        self._settle(batch, reads)

    def _settle(self, batch: Sequence[_Waiting], reads: Sequence[Read | None], error: Exception | None = None) -> None:
        for waiting, read in zip(batch, reads, strict=True):
            self._forget(waiting)
            waiting.settle(read, error)

    def _again(self, batch: Sequence[_Waiting], error: Lost) -> None:
        """Give another encoder what one ended over; if it was a text's fault, its neighbours get by without it."""
        self._watch.tried_again(len(batch))
        for waiting in batch:
            waiting.tries += 1
            if waiting.tries >= _TRIES:
                gone = Unavailable(f"{_TRIES} encoders ended while they encoded this text ({error}). Try again later.")
                self._settle([waiting], [None], gone)
            else:
                self._push(waiting, time.monotonic())
        self._wake()

    def _measure(self, batch: Sequence[_Waiting], reads: Sequence[Read], begun: float) -> None:
        """Note how fast the encoders are: one batch counts from when the one before it ended."""
        now = time.monotonic()
        tokens = sum(read.tokens for read in reads)
        self._watch.encoded(len(batch), tokens, now - begun)
        seconds, self._finished = now - max(begun, self._finished), now
        if tokens >= _LEAST // 2:
            self._speed.add(tokens, seconds)
        for waiting, read in zip(batch, reads, strict=True):
            size = _size(waiting.key[1])
            if not read.truncated and not read.reason and size <= _PLAIN:
                self._density.add(max(0, read.tokens - _SPECIAL), size)


def _size(given: Input) -> int:
    return len(given.text) + len(given.pair or "")
