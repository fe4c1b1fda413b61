"""How texts of many requests become batches, with a made-up encoder in one event loop."""

import asyncio
import contextvars
import gc
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from bertray import batcher
from bertray.batcher import Batcher, Cache, Input, Late, Lost, Overloaded, Read, Unavailable

pytestmark = pytest.mark.timeout(30)


class Kind(NamedTuple):
    name: str
    max_length: int = 512
    truncation: str = "right"


A, B = Kind("a"), Kind("b")


def tokens_of(given):
    return len(given.text.split()) + len((given.pair or "").split()) + 2


def read_of(given):
    return Read(np.array([hash((given.text, given.pair)) % 1000], np.float32), None, tokens_of(given), False)


@dataclass
class Bench:
    """A batcher, an encoder that waits until it is let, and what both were told."""

    places: int = 1
    queue: int = 1_000
    cache: int = 0
    batches: list = field(default_factory=list)
    told: list = field(default_factory=list)
    fails: object = lambda inputs: None  # an error for inputs

    def __post_init__(self):
        self.go = asyncio.Event()
        self.go.set()
        self.batcher = Batcher(self.encode, lambda: self.places, self, self.queue, self.cache)

    async def encode(self, kind, inputs):
        self.batches.append((kind, [given.text for given in inputs]))
        await asyncio.sleep(0)
        await self.go.wait()
        if error := self.fails(inputs):
            raise error
        return [read_of(given) for given in inputs]

    def encoded(self, texts, tokens, seconds):
        self.told.append(("encoded", texts, tokens))

    def looked_up(self, found, missed):
        self.told.append(("looked_up", found, missed))

    def tried_again(self, texts):
        self.told.append(("tried_again", texts))

    def ask(self, *texts, kind=A, seconds=20.0):
        """A request for texts (or pairs of them), begun."""
        inputs = [Input(text) if isinstance(text, str) else Input(*text) for text in texts]
        return asyncio.ensure_future(self.batcher.read(kind, inputs, seconds))

    async def held(self, *texts, kind=A):
        """A request whose batch is at the encoder, which waits: what comes next has to queue."""
        self.go.clear()
        self.batches.clear()
        request = self.ask(*(texts or ("held",)), kind=kind)
        await until(lambda: self.batches)
        self.batches.clear()
        return request

    def steady(self, rate):
        """Take the encoder for one of so many tokens a second, and texts for a token in five characters, whatever is
        measured."""
        self.batcher._speed, self.batcher._density = SimpleNamespace(value=rate), SimpleNamespace(value=0.2)
        self.batcher._measure = lambda *_: None
        return self

    @property
    def texts(self):
        """What was encoded, in order."""
        return [text for _, batch in self.batches for text in batch]


async def until(is_true):
    async with asyncio.timeout(10):
        while not is_true():
            await asyncio.sleep(0)


def scenario(test):
    """A test that runs in an event loop."""

    def run(**arguments):
        asyncio.run(test(**arguments))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def right(reads, *texts):
    return [read.vectors.tolist() for read in reads] == [read_of(Input(text)).vectors.tolist() for text in texts]


# --- batches ----------------------------------------------------------------------------------------------


@scenario
async def test_without_load_nothing_waits():
    bench = Bench()
    for text in ("one", "two"):
        assert right(await bench.ask(text), text)
    assert bench.batches == [(A, ["one"]), (A, ["two"])]
    assert bench.batcher.waiting == 0
    assert bench.batcher.seconds == 0
    await until(lambda: bench.batcher.at_work == 0)


@scenario
async def test_what_comes_in_one_turn_goes_together():
    bench = Bench()
    requests = [bench.ask(f"text {n}") for n in range(20)]
    for n, reads in enumerate(await asyncio.gather(*requests)):
        assert right(reads, f"text {n}")
    assert [len(texts) for _, texts in bench.batches] == [20]


@scenario
async def test_what_comes_while_a_batch_is_encoded_makes_the_next():
    bench = Bench()
    first = await bench.held()
    others = [bench.ask(f"text {n}") for n in range(20)]
    await asyncio.sleep(0.01)
    assert bench.batches == []
    assert bench.batcher.waiting == 20
    assert bench.batcher.at_work == 1
    bench.go.set()
    await asyncio.gather(first, *others)
    assert [len(texts) for _, texts in bench.batches] == [20]


@scenario
async def test_a_batch_holds_so_many_tokens():
    """256 at least: what an encoder that is not known to be fast is given at once."""
    bench = Bench()
    bench.steady(100.0)
    texts = [f"{n:03} " + "lore " * 30 for n in range(40)]  # some 31 tokens, and 2
    await bench.ask(*texts)
    sizes = [len(batch) for _, batch in bench.batches]
    assert sum(sizes) == 40
    assert set(sizes[:-1]) == {7}
    bench.steady(1e9)
    bench.batches.clear()
    await bench.ask(*texts)
    assert [len(batch) for _, batch in bench.batches] == [40]


@scenario
async def test_batches_of_several_encoders_take_no_longer_than_those_of_one():
    """The speed is that of all together."""
    bench = Bench(places=8).steady(100_000)  # 3,000 tokens in 0.03 s, 750 of them in each of four encoders
    held = await bench.held()
    rest = [bench.ask(f"{n} " + "x" * 989) for n in range(20)]  # 200 tokens each
    await until(lambda: len(bench.batches) >= 6)
    bench.go.set()
    await asyncio.gather(held, *rest)
    assert max(len(texts) for _, texts in bench.batches) == 3


@scenario
async def test_all_windows_of_a_text_count():
    bench = Bench().steady(100_000)
    held = await bench.held()
    cut, whole = Kind("cut"), Kind("whole", truncation="window")
    requests = [bench.ask("x" * 100_000, kind=kind) for kind in (cut, whole)]
    await asyncio.sleep(0)
    assert bench.batcher._tokens == pytest.approx(512 + 20_002)
    bench.go.set()
    await asyncio.gather(held, *requests)


@scenario
async def test_a_text_longer_than_a_batch_goes_alone():
    bench = Bench()
    bench.steady(100.0)
    long = "lore " * 500
    await bench.ask("short", long, "other")
    assert ["short" in batch and long in batch for _, batch in bench.batches].count(True) == 0
    assert sorted(bench.texts) == sorted(["short", long, "other"])


@scenario
async def test_as_many_batches_as_there_are_places():
    bench = Bench(places=3)
    bench.steady(100.0)
    bench.go.clear()
    request = bench.ask(*(f"{n} " + "lore " * 100 for n in range(50)))
    await until(lambda: bench.batcher.at_work == 3)
    await asyncio.sleep(0.01)
    assert len(bench.batches) == 3
    bench.places = 5  # more come
    other = bench.ask("wakes it up")
    await until(lambda: bench.batcher.at_work == 5)
    bench.go.set()
    await asyncio.gather(request, other)
    assert len(bench.texts) == 51


@scenario
async def test_kinds_and_pairs_are_not_mixed():
    bench = Bench()
    first = await bench.held()
    requests = [
        bench.ask("a1", kind=A),
        bench.ask("b1", kind=B),
        bench.ask(("a", "pair"), kind=A),
        bench.ask("a2", kind=A),
        bench.ask(("b", "pair"), "b2", kind=B),
        bench.ask("a1", kind=B),
    ]
    bench.go.set()
    reads = await asyncio.gather(first, *requests)
    assert sorted((kind.name, sorted(batch)) for kind, batch in bench.batches) == [
        ("a", ["a"]),
        ("a", ["a1", "a2"]),
        ("b", ["a1", "b1", "b2"]),
        ("b", ["b"]),
    ]
    assert reads[3][0].vectors.tolist() == read_of(Input("a", "pair")).vectors.tolist()
    assert [read.vectors.tolist() for read in reads[5]] == [
        read_of(given).vectors.tolist() for given in (Input("b", "pair"), Input("b2"))
    ]


# --- order ------------------------------------------------------------------------------------------------


@scenario
async def test_a_short_text_passes_a_long_one():
    bench = Bench()
    bench.steady(100.0)
    first = await bench.held()
    long, short = bench.ask("lore " * 400), bench.ask("short")
    bench.go.set()
    await asyncio.gather(first, long, short)
    assert [len(text) for text in bench.texts] == [5, 2000]


@scenario
async def test_a_single_text_passes_the_tail_of_a_list_but_not_its_head():
    bench = Bench(queue=10_000)
    bench.steady(1_000.0)
    bulk = bench.ask(*(f"{n} " + "lore " * 20 for n in range(1_000)))
    await until(lambda: len(bench.batches) > 3)
    before = len(bench.texts)
    await bench.ask("single")
    assert bench.texts.index("single") < before + 100
    assert not bulk.done()
    await bulk
    assert len(bench.texts) == 1_001


@scenario
async def test_lists_of_two_clients_share_the_encoder():
    bench = Bench(queue=10_000)
    bench.steady(1_000.0)
    first = await bench.held()
    one, other = (bench.ask(*(f"{name}{n} " + "lore " * 20 for n in range(300))) for name in "xy")
    bench.go.set()
    await asyncio.gather(first, one, other)
    halves = [text[0] for text in bench.texts[:300]]
    assert 100 < halves.count("x") < 200


@scenario
async def test_no_text_waits_for_ever():
    """A long one among a stream of short ones that never ends."""
    bench = Bench()
    bench.steady(20_000.0)
    done = asyncio.Event()

    async def stream(name):
        n = 0
        while not done.is_set():
            n += 1
            await bench.ask(f"{name} {n}")

    streams = [asyncio.ensure_future(stream(name)) for name in range(50)]
    await until(lambda: len(bench.batches) > 5)
    begun = len(bench.batches)
    reads = await bench.ask("lore " * 480)
    assert len(reads) == 1
    assert len(bench.batches) > begun
    done.set()
    await asyncio.gather(*streams)


@scenario
async def test_answers_come_in_the_order_of_the_request():
    bench = Bench(places=2)
    bench.steady(100.0)
    texts = [f"{n} " + "lore " * (n * 37 % 120) for n in range(200)]
    assert right(await bench.ask(*texts), *texts)


# --- once, and remembered ---------------------------------------------------------------------------------


@scenario
async def test_a_text_is_encoded_once_for_all_who_wait():
    bench = Bench()
    first = await bench.held()
    requests = [bench.ask("same", "same"), bench.ask("same"), bench.ask("other", "same")]
    await asyncio.sleep(0.01)
    bench.go.set()
    reads = await asyncio.gather(first, *requests)
    assert sorted(bench.texts) == ["other", "same"]
    assert right(reads[1], "same", "same")
    assert right(reads[3], "other", "same")


@scenario
async def test_who_comes_while_a_text_is_encoded_shares_it():
    bench = Bench()
    bench.go.clear()
    one = bench.ask("same")
    await until(lambda: bench.batches)
    other = bench.ask("same")
    await asyncio.sleep(0.01)
    bench.go.set()
    assert right(await one, "same")
    assert right(await other, "same")
    assert bench.texts == ["same"]


@scenario
async def test_what_was_read_is_remembered():
    bench = Bench(cache=100_000)
    await bench.ask("one", "two")
    await bench.ask("two", "three")
    await bench.ask("one", kind=B)
    assert bench.texts == ["one", "two", "three", "one"]
    assert [told for told in bench.told if told[0] == "looked_up"] == [
        ("looked_up", 0, 2),
        ("looked_up", 1, 1),
        ("looked_up", 0, 1),
    ]


@scenario
async def test_what_cannot_be_encoded_is_told_and_not_remembered():
    bench = Bench(cache=100_000)

    async def encode(kind, inputs):
        bench.batches.append((kind, [given.text for given in inputs]))
        return [Read(np.zeros(1, np.float32), None, 0, False, "it is bad") for _ in inputs]

    bench.batcher._encode = encode
    for _ in range(2):
        (read,) = await bench.ask("bad")
        assert read.reason == "it is bad"
    assert bench.texts == ["bad", "bad"]


def test_the_cache_is_bounded_by_bytes():
    cache = Cache(100_000)
    reads = {n: Read(np.zeros(1_000, np.float32), None, 5, False) for n in range(100)}
    for n, read in reads.items():
        cache.put((A, Input(f"{n}")), read)
        assert cache.held <= 100_000
        cache.get((A, Input("0")))  # is looked for again and again, and stays
    kept = [n for n in reads if cache.get((A, Input(f"{n}"))) is not None]
    assert kept == [0, *range(100 - len(kept) + 1, 100)]
    assert 18 < len(kept) < 25
    cache.put((A, Input("0")), reads[1])  # again
    assert cache.get((A, Input("0"))).vectors is reads[1].vectors
    before = cache.held
    cache.put((A, Input("1")), Read(np.zeros(10_000, np.float32), None, 5, False))  # too large by itself
    assert cache.held == before
    cache.put((A, Input("2" * 3_000)), reads[2])  # what a text takes counts, too
    assert cache.held > before - 5_000
    assert cache.held <= 100_000


def test_what_is_kept_is_nothing_that_the_collector_of_garbage_looks_through():
    """It held up requests by 50 ms and more, every other second, with 20,000 texts in the cache."""
    cache = Cache(100_000_000)
    gc.collect()
    before = len(gc.get_objects())
    for n in range(1_000):
        cache.put((A, Input(f"{n}", "a pair")), Read(np.zeros(384, np.float32), np.zeros((3, 2), np.int64), 5, False))
    gc.collect()
    assert len(gc.get_objects()) < before + 100
    assert cache.get((A, Input("7", "a pair"))).spans.shape == (3, 2)


def test_a_cache_tells_kinds_and_pairs_apart():
    cache, inputs = Cache(100_000), [(A, Input("x")), (B, Input("x")), (A, Input("x", "")), (A, Input("x", "y"))]
    for n, key in enumerate(inputs):
        cache.put(key, Read(np.full(2, n, np.float32), None, n, n > 1, ""))
    assert [cache.get(key).tokens for key in inputs] == [0, 1, 2, 3]
    assert cache.get((B, Input("x", "y"))) is None


def test_a_cache_of_nothing_keeps_nothing():
    cache = Cache(0)
    cache.put((A, Input("a")), read_of(Input("a")))
    assert cache.get((A, Input("a"))) is None
    assert cache.held == 0


# --- what nobody waits for --------------------------------------------------------------------------------


@scenario
async def test_what_nobody_waits_for_is_not_encoded():
    bench = Bench()
    first = await bench.held()
    gone, stays = bench.ask("gone", "shared"), bench.ask("shared", "stays")
    await asyncio.sleep(0.01)
    gone.cancel()
    bench.go.set()
    assert right((await asyncio.gather(first, stays))[1], "shared", "stays")
    assert sorted(bench.texts) == ["shared", "stays"]
    assert bench.batcher.waiting == 0
    assert bench.batcher._pending == {}
    assert bench.batcher._tokens == pytest.approx(0)
    with pytest.raises(asyncio.CancelledError):
        await gone


@scenario
async def test_a_text_that_nobody_waited_for_is_encoded_for_the_next_who_asks():
    bench = Bench()
    first = await bench.held()
    gone = bench.ask("text")
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.sleep(0.01)
    again = bench.ask("text")
    await asyncio.sleep(0.01)
    bench.go.set()
    await first
    assert right(await again, "text")
    assert bench.texts == ["text"]


@scenario
async def test_who_comes_when_all_have_gone_from_a_text_that_is_encoded():
    bench = Bench(places=2)
    bench.go.clear()
    gone = bench.ask("text")
    await until(lambda: bench.batches)
    gone.cancel()
    await asyncio.sleep(0.01)
    again = bench.ask("text")
    await asyncio.sleep(0.01)
    bench.go.set()
    assert right(await again, "text")


@scenario
async def test_what_is_late_is_given_up_and_not_encoded():
    bench = Bench()
    first = await bench.held()
    begun = time.monotonic()
    with pytest.raises(Late, match=r"Not answered within 0\.05 s"):
        await bench.ask("late", seconds=0.05)
    assert 0.04 < time.monotonic() - begun < 5
    bench.go.set()
    await first
    assert right(await bench.ask("next"), "next")
    assert bench.texts == ["next"]


# --- too much ---------------------------------------------------------------------------------------------


@scenario
async def test_no_more_wait_than_may():
    bench = Bench(queue=10)
    first = await bench.held()
    waits = bench.ask(*(f"text {n}" for n in range(8)))
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded, match="8 texts wait already. Try again in 1 s") as caught:
        await bench.ask("a", "b", "c")
    assert caught.value.seconds >= 1
    fits = bench.ask("a", "b")
    bench.go.set()
    await asyncio.gather(first, waits, fits)
    assert len(bench.texts) == 10


@scenario
async def test_a_request_that_finds_none_waiting_is_taken_whatever_its_size():
    bench = Bench(queue=10)
    assert len(await bench.ask(*(f"text {n}" for n in range(500)))) == 500


@scenario
async def test_what_is_remembered_is_answered_under_any_load():
    bench = Bench(queue=1, cache=100_000)
    await bench.ask("known")
    first = await bench.held("held")
    waits = bench.ask("x", "y")
    await asyncio.sleep(0)
    assert right(await bench.ask("known"), "known")
    bench.go.set()
    await asyncio.gather(first, waits)


@scenario
async def test_what_nobody_waits_for_fills_no_queue_once_there_is_room():
    bench = Bench(queue=10)
    first = await bench.held()
    gone = bench.ask(*(f"text {n}" for n in range(10)))
    await asyncio.sleep(0.01)
    gone.cancel()
    bench.go.set()
    await first
    await until(lambda: bench.batcher.waiting == 0)
    await bench.ask(*(f"other {n}" for n in range(10)))
    assert not any(text.startswith("text") for text in bench.texts)


# --- encoders that end ------------------------------------------------------------------------------------


@scenario
async def test_what_a_lost_encoder_had_is_given_to_another():
    bench = Bench()
    bench.fails = lambda inputs: Lost("it ended") if len(bench.batches) == 1 else None
    texts = [f"text {n}" for n in range(5)]
    assert right(await bench.ask(*texts), *texts)
    assert [len(batch) for _, batch in bench.batches] == [5, 5]
    assert ("tried_again", 5) in bench.told
    assert bench.batcher.waiting == 0


@scenario
async def test_a_text_that_ends_every_encoder_fails_alone():
    bench = Bench()
    bench.fails = lambda inputs: Lost("it ended") if "poison" in [given.text for given in inputs] else None
    neighbours = [f"text {n}" for n in range(5)]
    poison, good = bench.ask("poison"), [bench.ask(text) for text in neighbours]
    with pytest.raises(Unavailable, match=r"3 encoders ended while they encoded this text \(it ended\)"):
        await poison
    for text, request in zip(neighbours, good, strict=True):
        assert right(await request, text)
    assert [batch for _, batch in bench.batches].count(["poison"]) == 1
    assert sum("poison" in batch for _, batch in bench.batches) == 3
    assert bench.batcher._pending == {}
    assert right(await bench.ask("next"), "next")


@scenario
async def test_a_text_that_ended_encoders_shares_none_with_others():
    """With two places in one encoder, what is beside such a text would end with it, though it did no harm."""
    bench = Bench(places=2)
    at_once = []

    async def encode(kind, inputs, original=bench.batcher._encode):
        texts = {given.text for given in inputs}
        at_once.append(texts)
        await asyncio.sleep(0.01)
        together = set.union(*at_once)
        at_once.remove(texts)
        if "poison" in together:
            raise Lost("it ended")
        return await original(kind, inputs)

    bench.batcher._encode = encode
    poison, beside = bench.ask("poison", "beside"), bench.ask("beside")
    with pytest.raises(Unavailable):
        await poison
    assert right(await beside, "beside")


@scenario
async def test_an_encoder_is_asked_in_no_requests_own_context():
    """Ray Serve ends with a request what was asked in its context."""
    whose, seen = contextvars.ContextVar("whose", default="nobody's"), []
    bench = Bench(fails=lambda inputs: seen.append(whose.get()))
    whose.set("a client's")
    await asyncio.gather(bench.ask("one"), bench.ask("two"))
    await bench.ask("three")
    assert set(seen) == {"nobody's"}


@scenario
async def test_a_request_fails_with_its_poison_and_its_other_texts_do_no_harm():
    bench = Bench()
    bench.fails = lambda inputs: Lost("it ended") if "poison" in [given.text for given in inputs] else None
    both, shared = bench.ask("good", "poison"), bench.ask("good")
    with pytest.raises(Unavailable):
        await both
    assert right(await shared, "good")


@scenario
async def test_what_nobody_waits_for_is_not_tried_again():
    bench = Bench()
    bench.fails = lambda inputs: Lost("it ended")
    bench.go.clear()
    gone = bench.ask("gone")
    await until(lambda: bench.batches)
    gone.cancel()
    bench.go.set()
    await until(lambda: bench.batcher.at_work == 0 and bench.batcher.waiting == 0)
    await asyncio.sleep(0.01)
    assert bench.texts == ["gone"]


@scenario
async def test_an_error_reaches_exactly_those_who_asked():
    bench = Bench()
    bench.steady(100.0)
    first = await bench.held()
    bench.fails = lambda inputs: ValueError("broken") if any(given.text.startswith("bad") for given in inputs) else None
    bad = [bench.ask("bad text " + "lore " * 100), bench.ask("bad text " + "lore " * 100)]
    good = bench.ask("good", kind=B)
    bench.go.set()
    for request in bad:
        with pytest.raises(ValueError, match="broken"):
            await request
    assert right(await good, "good")
    await first
    assert bench.batcher._pending == {}
    assert sum(text.startswith("bad") for text in bench.texts) == 1  # it was asked for twice, and no encoder was lost
    bench.fails = lambda inputs: None
    assert len(await bench.ask("bad text")) == 1


# --- what it learns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2])
def test_how_fast_encoders_are_and_how_dense_texts_is_learned(monkeypatch, at_once):
    """Also where answers of several encoders come at the same moment."""
    now = 0.0
    monkeypatch.setattr(batcher, "time", SimpleNamespace(monotonic=lambda: now))

    async def scenario():
        bench, begun = Bench(places=at_once), []

        async def encode(kind, inputs):
            nonlocal now
            reads = [read_of(given) for given in inputs]
            begun.append(sum(read.tokens for read in reads))
            await asyncio.sleep(0)  # until all have begun
            await asyncio.sleep(0)
            now += sum(begun) / 50_000
            begun.clear()
            return reads

        bench.batcher._encode = encode
        for n in range(300):
            await bench.ask(*(f"{n} {m} " + "abcdefghi " * 50 for m in range(20)))  # a token in ten characters
            await bench.ask("one")  # says little of how fast they are
            await bench.ask(" " * 90_000)  # or of how dense texts are
        return bench.batcher

    learned = asyncio.run(scenario())
    assert learned._speed.value == pytest.approx(50_000, rel=0.02)
    assert learned._density.value == pytest.approx(0.1, rel=0.1)
    assert learned._estimated(A, Input("x" * 500)) == pytest.approx(52, rel=0.1)
    assert learned._estimated(A, Input("x" * 1_000_000)) == 512


@scenario
async def test_seconds_tell_what_waits():
    bench = Bench()
    bench.steady(100.0)
    first = await bench.held()
    request = bench.ask(*(f"{n:03} " + "lore " * 20 for n in range(100)))
    await asyncio.sleep(0)
    assert bench.batcher.seconds == pytest.approx(100 * (104 * 0.2 + 2) / 100, rel=0.05)
    with pytest.raises(Overloaded) as caught:
        bench.batcher._limit = 10
        await bench.ask("x")
    assert caught.value.seconds == pytest.approx(bench.batcher.seconds)
    bench.go.set()
    await asyncio.gather(first, request)
    assert bench.batcher.seconds == pytest.approx(0, abs=1e-6)


@scenario
async def test_a_thousand_clients_that_come_and_go():
    """None gets what another asked for, none is forgotten, and nothing is left behind."""
    import random

    rng = random.Random(0)
    bench = Bench(places=2, queue=100_000, cache=20_000)
    bench.steady(2_000.0)
    lost = iter(rng.random() < 0.05 for _ in range(1_000_000))
    bench.fails = lambda inputs: Lost("it ended") if len(inputs) > 1 and next(lost) else None
    answered = 0

    async def client(n):
        nonlocal answered
        await asyncio.sleep(rng.random() * 0.2)
        texts = [f"text {rng.randrange(400)} " + "lore " * rng.randrange(20) for _ in range(rng.randint(1, 8))]
        request = bench.ask(*texts, kind=rng.choice([A, B]))
        if rng.random() < 0.2:
            await asyncio.sleep(rng.random() * 0.05)
            request.cancel()
            return
        assert right(await request, *texts)
        answered += 1

    async with asyncio.timeout(25):
        await asyncio.gather(*(client(n) for n in range(1_000)))
    assert answered > 700
    await until(lambda: bench.batcher.at_work == 0)
    assert bench.batcher.waiting == 0
    assert bench.batcher._pending == {}
    assert bench.batcher._queues == {}
    assert bench.batcher._tokens == pytest.approx(0, abs=1e-6)
