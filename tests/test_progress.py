import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

CODE = """
import logging, sys; logging.basicConfig(format="%(message)s"); logging.getLogger("bertray").setLevel("INFO")
from bertray.progress import Progress
with Progress("embedding", 10, "rows", done=2) as progress:
    progress.add(3, "7 tokens/s")
    progress.add(5, "8 tokens/s")
with Progress("fitting", 0, "steps") as progress:
    progress.add(4)
"""


def test_plain_lines_where_there_is_no_terminal():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("embedding: 10 of 10 rows, ")
    assert lines[0].endswith("rows/s, ETA 00:00, 8 tokens/s")
    assert lines[1].startswith("fitting: 4 steps, ")
    assert "ETA" not in lines[1]


def test_an_interrupt_that_another_swallowed_still_stops():
    code = (
        "import os, signal, contextlib; from bertray import cli, progress;"
        "signal.signal(signal.SIGINT, cli._interrupt)\n"
        "with contextlib.suppress(KeyboardInterrupt): os.kill(os.getpid(), signal.SIGINT)\n"
        "with progress.Progress('embedding', 10, 'rows') as bar:\n"
        "    try: bar.add(1)\n"
        "    except KeyboardInterrupt: print('stopped')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "stopped\n"


def test_a_bar_on_a_terminal():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", CODE], stderr=theirs, timeout=60, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    assert "\r" in shown
    assert "embedding: 100%" in shown
    assert "8 tokens/s" in shown
    assert "embedding: 10 of 10" not in shown
