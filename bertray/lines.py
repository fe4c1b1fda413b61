"""Lines: calls between processes of one machine, over Unix sockets. Where a call of Ray's takes milliseconds, these
take a tenth of one. Knows nothing of what is called.

Who answers listens in a folder that only its user may enter; what is in it is taken for true, as between Ray's own
processes.
"""

import asyncio
import os
import pickle
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_SIZE = struct.Struct("!Q")  # before each message: how many bytes it has
_BUFFER = 1 << 20
_PAUSE = 0.1  # seconds


def listen(folder: Path, function: Callable[..., Any]) -> None:
    """Answer calls of a function, each line's in a thread, until this process ends."""
    listening = socket.socket(socket.AF_UNIX)
    aside = folder / f".{os.getpid()}"
    listening.bind(str(aside))
    listening.listen()
    aside.rename(folder / f"{os.getpid()}.sock")  # found when it answers, not before

    def accept() -> None:
        while True:
            try:
                line, _ = listening.accept()
            except OSError:  # too many files are open, for now
                time.sleep(_PAUSE)
                continue
            threading.Thread(target=_answer, args=(line, function), name="bertray-line", daemon=True).start()

    threading.Thread(target=accept, name="bertray-lines", daemon=True).start()


def _answer(line: socket.socket, function: Callable[..., Any]) -> None:
    with line, line.makefile("rb", _BUFFER) as calls, suppress(OSError):  # who called may have gone
        while len(size := calls.read(_SIZE.size)) == _SIZE.size:
            arguments = pickle.loads(calls.read(*_SIZE.unpack(size)))
            try:
                answer: tuple[Any, Exception | None] = function(*arguments), None
            except Exception as error:
                answer = None, error
            line.sendall(_message(answer))


def _message(content: Any) -> bytes:
    data = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    return _SIZE.pack(len(data)) + data


class Line:
    """A connection to a process that answers, for one call at a time."""

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.name = name
        self._reader, self._writer = reader, writer

    async def call(self, *arguments: Any) -> Any:
        """What the other side's function gives, or raises.

        Raises:
            ConnectionError: the process has ended. A line whose call was not answered is of no more use.
        """
        whole = False
        try:
            self._writer.write(_message(arguments))
            await self._writer.drain()
            (size,) = _SIZE.unpack(await self._reader.readexactly(_SIZE.size))
            found, error = pickle.loads(await self._reader.readexactly(size))
            whole = True
        except EOFError as ended:
            raise ConnectionError(f"process {self.name} has ended") from ended
        finally:
            if not whole:
                self.close()
        if error is not None:
            raise error
        return found

    @property
    def closed(self) -> bool:
        return self._writer.is_closing() or self._reader.at_eof()

    def close(self) -> None:
        self._writer.close()


class Lines:
    """The lines to all processes that listen in a folder, some to each."""

    def __init__(self, folder: Path, each: int) -> None:
        """No lines yet. each: calls that a process answers at once."""
        self._folder, self._each = folder, each
        self._free: list[Line] = []
        self._busy: set[Line] = set()

    @property
    def processes(self) -> int:
        """How many processes there are lines to."""
        return len({line.name for line in (*self._free, *self._busy) if not line.closed})

    async def look(self) -> None:
        """Connect to the processes that are new, and again where a line has gone."""
        self._drop()
        there = Counter(line.name for line in (*self._free, *self._busy) if not line.closed)
        for path in self._folder.glob("*.sock"):
            missing = range(self._each - there[path.stem])
            try:
                opened = [await asyncio.open_unix_connection(str(path), limit=_BUFFER) for _ in missing]
            except ConnectionRefusedError:  # nobody listens there any more
                path.unlink(missing_ok=True)
                continue
            self._free += [Line(path.stem, *streams) for streams in opened]

    def take(self) -> Line | None:
        """A line that is free, to the process with the fewest calls; None if there is none."""
        self._drop()
        if not self._free:
            return None
        calls = Counter(line.name for line in self._busy)
        line = min(self._free, key=lambda line: calls[line.name])
        self._free.remove(line)
        self._busy.add(line)
        return line

    def _drop(self) -> None:
        for line in self._free:
            if line.closed:
                line.close()
        self._free = [line for line in self._free if not line.closed]

    def give(self, line: Line) -> None:
        """A line that was taken is free again."""
        self._busy.discard(line)
        if not line.closed:
            self._free.append(line)

    def close(self) -> None:
        """Leave all lines."""
        for line in (*self._free, *self._busy):
            line.close()
