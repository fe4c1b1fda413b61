"""One run at a time in a folder, on a disk and on a store without locks."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bertray import lease
from bertray.errors import BertrayError
from bertray.storage import Location

HOLD = """
import sys, time
from bertray import lease
from bertray.storage import Location
with lease.held(Location(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def held_elsewhere(url):
    process = subprocess.Popen([sys.executable, "-c", HOLD, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_with_who_holds_it(tmp_path):
    folder = Location(str(tmp_path / "run"))
    with lease.held(folder) as mine:
        assert lease.holder(folder) == mine
        with pytest.raises(BertrayError, match=rf"Another run \(process {os.getpid()} on .*\) is at work in") as caught:
            lease.held(folder).__enter__()
        assert "\n" not in str(caught.value)
    assert lease.holder(folder) is None
    assert not (tmp_path / "run").exists()
    with lease.held(folder):
        pass


def test_a_holder_that_is_killed_lets_go_at_once(tmp_path):
    folder = Location(str(tmp_path))
    process = held_elsewhere(folder.url)
    with pytest.raises(BertrayError, match=f"process {process.pid} on"):
        lease.held(folder).__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lease.holder(folder) is None
    with lease.held(folder):
        pass


def test_on_a_store_without_locks_a_lease_is_renewed(s3, monkeypatch):
    monkeypatch.setattr(lease, "_RENEWED", 0.2)
    monkeypatch.setattr(lease, "_ENDED", 3.0)
    folder = Location(s3) / "leases/renewed"
    with lease.held(folder) as mine:
        time.sleep(0.5)
        assert lease.holder(folder).run == mine.run
        with pytest.raises(BertrayError, match="Another run"):
            lease.held(folder).__enter__()
    assert lease.holder(folder) is None


def test_on_a_store_a_killed_holder_of_this_machine_is_known_at_once_and_others_after_a_while(s3, monkeypatch):
    monkeypatch.setattr(lease, "_ENDED", 3.0)
    folder = Location(s3) / "leases/killed"
    process = held_elsewhere(folder.url)
    process.kill()
    process.wait()
    started = time.monotonic()
    with lease.held(folder):
        assert time.monotonic() - started < 2.5
    lease._write(folder, lease.Holder(host="elsewhere"))
    started = time.monotonic()
    with lease.held(folder):
        assert 2.5 < time.monotonic() - started < 10
