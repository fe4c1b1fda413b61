"""A lease: one run at a time in a folder. Knows nothing of what runs do.

On a disk the kernel locks the lease's file, and lets go of it when the holder ends, however it ends. Object stores have
no locks: there the holder renews the lease, and one that is not renewed for a while has ended. What runs write does
not depend on it, since two at once would write the same; it keeps them from doing the work twice.
"""

import errno
import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace

from bertray.errors import BertrayError
from bertray.progress import log
from bertray.storage import Location

_FILE = ".lease"
_RENEWED = 10.0  # seconds between renewals
_ENDED = 35.0  # seconds after which a lease that was not renewed is free


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. `since` is in seconds since 1970; `beats` grows as the lease is renewed."""

    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.time)
    beats: int = 0

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


@contextmanager
def held(folder: Location) -> Iterator[Holder]:
    """While this is entered, no other run holds the folder.

    Raises:
        BertrayError: one does.
    """
    mine = Holder()
    with _locked(folder, mine) if folder.local else _renewed(folder, mine):
        yield mine


def holder(folder: Location) -> Holder | None:
    """Who holds a folder now, as far as can be told."""
    found = _read(folder)
    if found is None:
        return None
    if not folder.local:
        renewed = (folder / _FILE).file()
        return found if renewed and time.time() - renewed.changed < _ENDED else None
    try:
        with open((folder / _FILE).path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except OSError:
        return found
    return None


@contextmanager
def _locked(folder: Location, mine: Holder) -> Iterator[None]:
    path, made = (folder / _FILE).path, not os.path.isdir(folder.path)
    os.makedirs(folder.path, exist_ok=True)
    while True:
        file = open(path, "a+")  # noqa: SIM115  closed below, in any case
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _taken(folder, _read(folder)) from None
            log.debug("%s: %s; the folder is not locked", path, error)  # a file system without locks
            yield
            return
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            break
        file.close()  # its holder ended in between, and took the file along
    with file:
        file.truncate(0)
        file.write(json.dumps(asdict(mine)))
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # the folder is gone, or in use
                os.unlink(path)
                if made:
                    os.rmdir(folder.path)


@contextmanager
def _renewed(folder: Location, mine: Holder) -> Iterator[None]:
    before = _read(folder)
    if before and not _is_dead(before):
        log.info("waiting to see whether another run (%s) still holds %s", before, folder)
        deadline = time.monotonic() + _ENDED
        while time.monotonic() < deadline and (now := _read(folder)):
            if now != before:
                raise _taken(folder, now)
            time.sleep(1)
    _write(folder, mine)
    if (now := _read(folder)) and now.run != mine.run:
        raise _taken(folder, now)  # two began at once
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(folder, mine, ended), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        if (now := _read(folder)) and now.run == mine.run:
            (folder / _FILE).delete()


def _renew(folder: Location, mine: Holder, ended: threading.Event) -> None:
    while not ended.wait(_RENEWED):
        try:
            now = _read(folder)
            if now and now.run != mine.run:
                log.warning("another run (%s) has taken over %s: both write the same vectors", now, folder)
                return
            mine = replace(mine, beats=mine.beats + 1)
            _write(folder, mine)
        except OSError as error:
            log.debug("%s: the lease is not renewed: %s", folder, error)


def _is_dead(other: Holder) -> bool:
    """Whether a holder is known to have ended: it was a process of this very machine."""
    if other.host != platform.node() or other.pid == os.getpid():
        return False
    try:
        os.kill(other.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _read(folder: Location) -> Holder | None:
    try:
        return Holder(**json.loads((folder / _FILE).read()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write(folder: Location, mine: Holder) -> None:
    (folder / _FILE).write(json.dumps(asdict(mine)).encode())


def _taken(folder: Location, other: Holder | None) -> BertrayError:
    who = f" ({other})" if other else ""
    return BertrayError(
        f"Another run{who} is at work in {folder}. Wait until it has ended, or give another output; "
        f"`bertray status {folder}` shows how far it is."
    )
