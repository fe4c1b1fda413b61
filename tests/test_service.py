"""What a service does with texts that are looked into: one at a time, some may wait, and all ends are told."""

import asyncio
import json

import pytest

from bertray.batcher import Input, Late, Lost, Overloaded, Unavailable
from bertray.errors import CheckpointError
from bertray.service import Limits, Service, Wrong


def service(explore):
    return Service(None, None, explore, Limits())


def test_one_text_is_looked_into_at_a_time_and_few_wait():
    at_once, most = 0, 0

    async def explore(given, show, dims):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.01)
        at_once -= 1
        return {"text": given.text, "dims": dims}

    async def ask():
        own = service(explore)
        asked = (own.explore(Input(str(i)), [], i, 10) for i in range(12))
        found = await asyncio.gather(*asked, return_exceptions=True)
        again = await own.explore(Input("later"), [], 3, 10)
        return found, again

    found, again = asyncio.run(ask())
    assert found[:8] == [{"text": str(i), "dims": i} for i in range(8)] and most == 1
    assert all(isinstance(error, Overloaded) and error.seconds > 0 for error in found[8:])
    assert again["text"] == "later"


@pytest.mark.parametrize(
    ("error", "told"), [(Lost("x"), Unavailable), (CheckpointError("no pooler"), Wrong), (TimeoutError(), Late)]
)
def test_what_goes_wrong_is_told(error, told):
    async def explore(given, show, dims):
        raise error

    with pytest.raises(told):
        asyncio.run(service(explore).explore(Input("a"), [], 10, 10))


def test_whoever_waits_too_long_is_told():
    async def explore(given, show, dims):
        await asyncio.sleep(60)

    with pytest.raises(Late, match=r"within 0\.05 s"):
        asyncio.run(service(explore).explore(Input("a"), [], 10, 0.05))


def test_what_nobody_waits_for_any_more_is_not_looked_into(demo):
    """In the process that encodes; and what is encoded meanwhile does not wait."""
    import time

    import bertray
    from bertray.registry import Reading
    from bertray.serve import Encoders

    bundle = bertray.load(demo["bundle"]).bundle
    own = Encoders(bundle.encoder, "cpu", 2)
    looked, look = [], own._explorer.look

    def counted(text, *rest):
        looked.append(text)
        time.sleep(0.3)
        return look(text, *rest)

    own._explorer.look = counted
    reading = Reading(512, "truncate", 0, "text", bundle.features)

    async def ask():
        tasks = [asyncio.ensure_future(own.explore(Input(f"text {i}"), [], 10)) for i in range(8)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        begun = time.perf_counter()
        await own.encode(reading, [Input("a text")])
        encoded = time.perf_counter() - begun
        found = await own.explore(Input("the last"), ["tokens"], 10)
        return encoded, found

    encoded, found = asyncio.run(ask())
    assert looked == ["text 0", "the last"] and encoded < 0.25
    assert list(json.loads(found)) == ["model", "texts", "notes", "about", "tokens"]
