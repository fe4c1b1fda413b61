"""The cache: what a node keeps for all processes of a user, between runs too. Knows nothing of what the files hold.

All of it can be had again: while nothing runs, any of it may be deleted.
"""

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

_SUMS = "SHA256SUMS"  # in the form of the command sha256sum
_NOTED = 4 << 20  # bytes; a smaller file is hashed sooner than its note is found


def home() -> Path:
    """The cache's folder: `bertray` in XDG_CACHE_HOME or ~/.cache. Where that cannot be written, as in many containers,
    one of this user's among the temporary files."""
    with suppress(OSError, RuntimeError):  # there is no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bertray"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"bertray-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # somebody else may have put one there
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    return _of_this_process()


@cache
def _of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="bertray-"))


def sha256(file: Path) -> str:
    """The sha256 of a file. That of a large one is noted: nobody on this node reads it again until it changes."""
    with file.open("rb") as stream:
        before = _state(stream)
        if os.fstat(stream.fileno()).st_size < _NOTED:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        note = home() / "hashes" / hashlib.sha256(before.encode()).hexdigest()[:32]
        with suppress(OSError, UnicodeDecodeError):
            if len(known := note.read_text(encoding="ascii")) == 64:
                return known
        found = hashlib.file_digest(stream, "sha256").hexdigest()
        if _state(stream) == before:
            with suppress(OSError):  # no room: it is hashed again the next time
                _write(note, found)
    return found


def _state(stream: IO[bytes]) -> str:
    """What changes when an open file does. The time of its last change of any kind cannot be set back by `touch`."""
    found = os.fstat(stream.fileno())
    return repr((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_text(text, encoding="ascii")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def kept(name: str) -> Path | None:
    """The folder of that name that was `filled`; None if there is none, or its files are not what they were."""
    folder = home() / "models" / name
    try:
        lines = (folder / _SUMS).read_text(encoding="utf-8").splitlines()
        sums = [line.split("  ", 1) for line in lines]
        return folder if sums and all(sha256(folder / file) == told for told, file in sums) else None
    except (OSError, ValueError):
        return None


def filled(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder of that name, which appears whole or not at all. If several processes of a node want it at once, one
    fills it, and the others wait."""
    folder = home() / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{name}.lock")) as alone:
        if (found := kept(name)) is not None:  # meanwhile
            return found
        if alone:
            for left in folder.parent.glob(f".{name}.*.partial"):  # by one that was killed
                shutil.rmtree(left, ignore_errors=True)
        partial = folder.with_name(f".{name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir()
        try:
            fill(partial)
            sums = "".join(f"{sha256(file)}  {file.name}\n" for file in sorted(partial.iterdir()))
            (partial / _SUMS).write_text(sums, encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)  # what is damaged
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """While this is entered, no other process has the lock, or where there are no locks, False. The kernel lets go of
    it when its holder ends, however it ends."""
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
