"""Processes of a service, seen from outside, by /proc: all that a command started, what they hold, and their end."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def start(command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command as the head of a process group of its own."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def below(pid: int) -> list[int]:
    """A process and all that it started, and those started."""
    parents = {int(entry.name): _parent(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0


def titled(pid: int, words: str) -> list[int]:
    """Those below a process in whose title some words stand."""
    return [child for child in below(pid) if words.encode() in _read(child, "cmdline")]


def memory(pid: int) -> int:
    """Bytes that a process holds in memory; of what it shares with others, its share (PSS)."""
    for line in _read(pid, "smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def stop(process: subprocess.Popen[bytes], patience: float = 20) -> None:
    """Ask a command to end, as Ctrl-C does; then end what is left of its group and of all that it started."""
    started = {child: _born(child) for child in below(process.pid)}
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    deadline = time.monotonic() + 5  # what it leaves behind may be about to end by itself
    while (left := _left(started)) and process.poll() is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    for child in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while _left(started) and time.monotonic() < deadline + 5:  # the kernel takes its time
        time.sleep(0.02)


def _left(started: Mapping[int, bytes]) -> list[int]:
    """Those that still run; another process may have got the id of one that ended."""
    return [child for child, born in started.items() if born and _born(child) == born]


def _born(pid: int) -> bytes:
    """When a process started, as the kernel counts; nothing if it has ended."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return fields[19] if fields and fields[0] not in (b"Z", b"X") else b""
