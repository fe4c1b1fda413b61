"""One view of local disk and object stores, by URL. Knows nothing of what the files hold.

A write is whole or not at all: local files are renamed into place, objects appear when their upload ends. What fails
for a while (a server that answers 500, a connection that breaks) is tried again.
"""

import errno
import os
import random
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from bertray.errors import BertrayError
from bertray.progress import log

T = TypeVar("T")

_WILD = re.compile(r"[*?\[]")
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
_PARTS, _PART = 4, 16 << 20  # that are downloaded at a time, and bytes of each
_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between attempts
# Of local disks, only what passes; of stores, all but what will be the same the next time.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN, errno.EBUSY}
_LASTING = re.compile(r"ACCESS_DENIED|NO_SUCH|NoSuch|InvalidAccessKey|SIGNATURE|credentials|not.exist", re.I)

_retried: list[str] = []  # appending is safe among threads


def retries() -> int:
    """How often this process has tried something in storage again so far."""
    return len(_retried)


@dataclass(frozen=True)
class FileInfo:
    """A file as a listing shows it. `stamp` changes when the content does (size and time of change); `changed` is when
    that was, in seconds since 1970."""

    url: str
    name: str
    size: int
    stamp: str
    changed: float


@dataclass(frozen=True)
class Location:
    """A file or folder: a local path, or a URL that pyarrow or fsspec opens (s3://, gs://, hdfs://, ...).

    Local paths become absolute at once: other processes have other working folders.
    """

    url: str

    def __post_init__(self) -> None:
        if "\0" in self.url:
            raise BertrayError(f"{self.url!r} is no path: it holds a NUL. Correct it.")
        if "://" not in self.url:
            object.__setattr__(self, "url", os.path.abspath(os.path.expanduser(self.url)))

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.url.rstrip('/')}/{name}" if name else self.url)

    def __str__(self) -> str:
        return self.url

    @cached_property
    def _resolved(self) -> tuple[pafs.FileSystem, str]:
        return _resolve(self.url)

    @property
    def fs(self) -> pafs.FileSystem:
        return self._resolved[0]

    @property
    def path(self) -> str:
        """The path inside `fs`."""
        return self._resolved[1]

    @property
    def local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def patiently(self, action: Callable[[], T]) -> T:
        """What an action on this location gives; tried again for some 15 seconds if it fails in a way that passes."""
        for pause in _PAUSES:
            try:
                return action()
            except Exception as error:
                if not self._passes(error):
                    raise
                log.debug("%s: %s; trying again in %g s", self.url, error, pause)
            _retried.append(self.url)
            time.sleep(pause * random.uniform(0.5, 1.5))  # not all workers at once
        return action()

    def _passes(self, error: BaseException) -> bool:
        """Whether an error may be gone the next time."""
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError):
            return False
        return cause.errno in _PASSING if self.local else not _LASTING.search(str(cause))

    @property
    def _name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def _looked_up(self) -> pafs.FileInfo:
        return self.patiently(lambda: self.fs.get_file_info(self.path))

    @property
    def kind(self) -> pafs.FileType:
        return self._looked_up().type

    def exists(self) -> bool:
        return self.kind != pafs.FileType.NotFound

    def open(self, compression: str | None = None) -> Any:
        """A stream to read from; compression None leaves the bytes as they are."""
        return self.patiently(lambda: self.fs.open_input_stream(self.path, compression=compression))

    def open_random(self) -> Any:
        return self.patiently(lambda: self.fs.open_input_file(self.path))

    def read(self) -> bytes:
        def whole() -> bytes:
            with self.fs.open_input_stream(self.path, compression=None) as stream:
                return bytes(stream.read())

        return self.patiently(whole)

    def download(self, target: Path, size: int) -> None:
        """Copy this file of that size to a local one, some parts at a time.

        Raises:
            BertrayError: it is shorter now.
        """

        def part(stream: Any, start: int) -> Any:
            return self.patiently(lambda: stream.read_at(min(_PART, size - start), start))

        with self.open_random() as stream, target.open("wb") as file, ThreadPoolExecutor(_PARTS) as pool:
            for start in range(0, size, _PARTS * _PART):
                starts = range(start, min(size, start + _PARTS * _PART), _PART)
                for content in pool.map(lambda at: part(stream, at), starts):
                    file.write(content)
        if (found := target.stat().st_size) != size:
            raise BertrayError(
                f"{self.url} changed while it was read: it has {found} bytes instead of {size}. Try again."
            )

    @contextmanager
    def create(self, sync: bool = True) -> Iterator[Any]:
        """A stream to write to, for what is too large to `write` at once. The file shows when it is whole.

        Args:
            sync: whether the content has to outlive a machine that loses power.
        """
        if not self.local:
            # Aside first: leaving a stream to a store early would leave what is written so far as an object.
            with tempfile.TemporaryFile(prefix="bertray-") as aside:
                yield aside
                self.patiently(lambda: self._upload(aside))
            return
        target = Path(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            with self.fs.open_output_stream(str(partial), compression=None) as stream:
                yield stream
            if sync:
                with partial.open("rb") as written:
                    os.fsync(written.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def _upload(self, aside: Any) -> None:
        aside.seek(0)
        with self.fs.open_output_stream(self.path, compression=None) as stream:
            shutil.copyfileobj(aside, stream, 8 << 20)

    def write(self, data: bytes | pa.Buffer, sync: bool = True) -> None:
        """Write a file whole or not at all, with the folders above it."""

        def whole() -> None:
            if self.local:
                with self.create(sync) as stream:
                    stream.write(data)
            else:
                with self.fs.open_output_stream(self.path, compression=None) as stream:
                    stream.write(data)

        self.patiently(whole)

    def delete(self) -> None:
        """Remove the file or folder, if it is there."""
        kind = self.kind
        if kind == pafs.FileType.Directory:
            self.patiently(lambda: self.fs.delete_dir(self.path))
        elif kind == pafs.FileType.File:
            with suppress(FileNotFoundError):  # somebody else was quicker
                self.patiently(lambda: self.fs.delete_file(self.path))

    def sweep(self) -> None:
        """Remove what writes that were killed have left in this folder."""
        if self.local:  # unfinished uploads to a store are not objects
            with suppress(FileNotFoundError), os.scandir(self.path) as entries:
                for entry in entries:
                    if _PARTIAL.fullmatch(entry.name):
                        Path(entry.path).unlink(missing_ok=True)

    def files(self) -> list[FileInfo]:
        """All files below this folder, sorted by name; hidden ones (a step that begins with . or _) left out.

        `name` is relative to this folder. A folder that does not exist holds no files.
        """
        found = []
        for info in self.patiently(lambda: self.fs.get_file_info(self._below())):
            name = os.path.relpath(info.path, self.path)
            if info.type == pafs.FileType.File and not any(step[0] in "._" for step in name.split("/")):
                found.append(self._info(info, name))
        return sorted(found, key=lambda file: file.name)

    def _below(self) -> Any:
        """What to ask the file system for, to get all below this folder."""
        if not self.local or not os.path.isdir(self.path):
            return pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        paths: list[str] = []
        seen: set[str] = set()
        for folder, folders, names in os.walk(self.path, followlinks=True):
            folders.sort()
            if (real := os.path.realpath(folder)) in seen:  # links may lead round in circles
                folders.clear()
                continue
            seen.add(real)
            paths += [os.path.join(folder, name) for name in names]
        return paths

    def folders(self) -> list[str]:
        """The names of the folders in this one, sorted."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        found = self.patiently(lambda: self.fs.get_file_info(selector))
        return sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)

    def file(self) -> FileInfo | None:
        """This file, or None if it is none."""
        info = self._looked_up()
        return self._info(info, self._name) if info.type == pafs.FileType.File else None

    def tag(self) -> str:
        """What changes when this file does: whatever its store tells of it beside size and time of change."""
        if isinstance(self.fs, pafs.PyFileSystem):
            handler = self.fs.handler
            if isinstance(handler, pafs.FSSpecHandler):
                return str(self.patiently(lambda: handler.fs.ukey(self.path)))
        return ""

    def match(self) -> list[FileInfo]:
        """The files that this location names: itself, all below it, or those that fit its wildcards."""
        info = self._looked_up()
        if info.type == pafs.FileType.File:
            return [self._info(info, self._name)]
        if info.type == pafs.FileType.Unknown:  # a pipe or a device: reading one may never end
            return []
        if info.type == pafs.FileType.Directory or not _WILD.search(self.url):
            return self.files()
        base = _WILD.split(self.url)[0].rpartition("/")[0] + "/"
        pattern = re.compile(_glob_regex(self.url.removeprefix(base)))
        return [file for file in Location(base).files() if pattern.fullmatch(file.name)]

    def _info(self, info: pafs.FileInfo, name: str) -> FileInfo:
        url = self.url if info.path == self.path else (self / name).url
        # Object stores tell fractions of a second in listings alone.
        changed = info.mtime_ns if self.local or info.mtime_ns is None else info.mtime_ns // 10**9
        return FileInfo(url, name, info.size, f"{info.size}-{changed}", (info.mtime_ns or 0) / 1e9)


def output_folder(output: str) -> Location:
    """Where to write. A submitted job runs in a copy of the working folder that Ray deletes afterwards: there a
    relative path is taken from the home folder instead."""
    local = "://" not in output and not Path(output).expanduser().is_absolute()
    if local and "runtime_resources" in Path.cwd().parts:
        output = str(Path.home() / output)
        log.warning("The working folder of this job is temporary: output is written to %s instead.", output)
    return Location(output)


def _resolve(url: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in url:
        return pafs.LocalFileSystem(), url
    # One request writes a small object instead of the three of an upload in parts.
    options = "?allow_delayed_open=true" if url.startswith("s3://") and "?" not in url else ""
    try:
        return pafs.FileSystem.from_uri(url + options)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError):
        pass  # not one of pyarrow's own: ask fsspec
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise BertrayError(f"{url} cannot be opened: {error}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _glob_regex(pattern: str) -> str:
    """A glob as a regular expression over a relative path; ** spans folders, * and ? stay within one."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        special.get(part) or (part.replace("[!", "[^") if part.startswith("[") else re.escape(part)) for part in parts
    )
