"""Calls between processes over Unix sockets, with real processes that are killed."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bertray.errors import BertrayError
from bertray.lines import Lines

pytestmark = pytest.mark.timeout(60)
ANSWERING = """
import os, sys, time
from pathlib import Path
from bertray.errors import BertrayError
from bertray.lines import listen

def function(kind, value=None):
    if kind == "wrong":
        raise BertrayError("it is wrong")
    if kind == "ends":
        os._exit(1)
    if kind == "sleeps":
        time.sleep(value)
    return os.getpid(), value

listen(Path(sys.argv[1]), function)
print("LISTENS", flush=True)
time.sleep(600)
"""


@pytest.fixture
def answering(tmp_path):
    """A function that starts a process which answers in a folder: the process."""
    started = []

    def start():
        process = subprocess.Popen([sys.executable, "-c", ANSWERING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "LISTENS\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


async def called(lines, *arguments):
    line = lines.take()
    try:
        return await line.call(*arguments)
    finally:
        lines.give(line)


def taken(lines):
    """The lines that are free."""
    found = list(iter(lines.take, None))
    for line in found:
        lines.give(line)
    return found


async def connected(folder, each=2):
    lines = Lines(folder, each)
    await lines.look()
    return lines


def test_what_is_called_answers_or_raises(answering, tmp_path):
    process = answering()
    vectors = np.random.default_rng(0).random((3_000, 400))  # more than a socket or a buffer holds

    async def talk():
        lines = await connected(tmp_path)
        pid, found = await called(lines, "gives", vectors)
        assert pid == process.pid
        np.testing.assert_array_equal(found, vectors)
        with pytest.raises(BertrayError, match="it is wrong"):
            await called(lines, "wrong")
        assert (await called(lines, "gives", "again"))[1] == "again"
        lines.close()

    asyncio.run(talk())


def test_calls_run_beside_each_other_as_many_as_there_are_lines(answering, tmp_path):
    pids = {answering().pid, answering().pid}

    async def talk():
        lines = await connected(tmp_path)
        assert lines.processes == 2
        started = time.monotonic()
        calls = [asyncio.create_task(called(lines, "sleeps", 0.5)) for _ in range(4)]
        await asyncio.sleep(0.1)
        assert lines.take() is None
        found = [pid for pid, _ in await asyncio.gather(*calls)]
        assert time.monotonic() - started < 0.9
        assert sorted(found) == sorted([*pids, *pids])  # as many of each
        lines.close()

    asyncio.run(talk())


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_a_process_that_ends_is_told_and_another_is_found(answering, tmp_path, how):
    process = answering()

    async def talk():
        lines = await connected(tmp_path)
        call = asyncio.create_task(called(lines, *(("ends",) if how == "ends" else ("sleeps", 60))))
        await asyncio.sleep(0.2)
        if how == "killed":
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ConnectionError):
            await call
        await asyncio.sleep(0.1)
        assert lines.processes == 0 and lines.take() is None
        another = answering()
        await lines.look()
        assert (await called(lines, "gives"))[0] == another.pid
        assert [path.stem for path in tmp_path.glob("*.sock")] == [str(another.pid)]  # the other's is swept
        lines.close()

    asyncio.run(talk())


@pytest.mark.parametrize("each", [1, 2])
def test_a_line_whose_call_was_given_up_is_not_used_again(answering, tmp_path, each):
    answering()

    async def talk():
        lines = await connected(tmp_path, each)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(called(lines, "sleeps", 1), 0.2)
        assert len(taken(lines)) == each - 1
        await lines.look()  # and another line is had to the same process
        assert len(taken(lines)) == each
        assert (await called(lines, "gives", "new"))[1] == "new"
        lines.close()

    asyncio.run(talk())
