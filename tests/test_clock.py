"""What is told of time adds up, whatever threads do beside each other."""

import threading
import time

import pytest

from bertray.clock import BESIDE, HELD, Clock, Stopwatch, account, lines


@pytest.fixture
def now(monkeypatch):
    """The time, to be put forward by hand."""
    at = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: at[0])
    return at


def test_what_is_done_at_once_counts_once(now):
    watch = Stopwatch()
    with watch:
        now[0] += 3
        with watch:  # as another thread would
            now[0] += 2
        now[0] += 1
        assert watch.seconds == 6  # also while it runs
    now[0] += 10
    assert watch.seconds == 6
    with watch:
        now[0] += 1
    watch.add(10)
    assert watch.seconds == 17


def test_threads_at_once():
    watch, started = Stopwatch(), time.perf_counter()

    def work():
        with watch:
            time.sleep(0.2)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.2 <= watch.seconds <= time.perf_counter() - started


def test_parts_of_a_clock_add_up_to_the_time_that_passed(now):
    clock = Clock()
    encode, others = Stopwatch(), {name: Stopwatch() for name in BESIDE}
    with encode:  # as it is tried out before the process is ready
        now[0] += 1
    now[0] += 4
    clock.ready(encode=encode, **others)
    parts = []
    for _ in range(3):
        now[0] += 1
        with encode, others["tokenize"]:
            now[0] += 2
        with others["write"]:
            now[0] += 0.5
            parts.append(clock.untold())  # while it writes
            now[0] += 0.25
    assert parts[0] == {"start": 5, "encode": 2, "idle": 1.5, "tokenize": 2, "write": 0.5}  # read is none
    assert parts[1] == parts[2] == {"encode": 2, "idle": 1.75, "tokenize": 2, "write": 0.75}
    assert sum(account(parts)["seconds"][name] for name in HELD) == now[0] - 0.25 - 1000


def test_rounding_loses_nothing(now):
    clock, encode = Clock(), Stopwatch()
    clock.ready(encode=encode, **{name: Stopwatch() for name in BESIDE})
    parts = []
    for _ in range(1000):
        with encode:
            now[0] += 0.0004
        parts.append(clock.untold())
    assert account(parts)["seconds"]["encode"] == pytest.approx(0.4, abs=0.001)


def test_processes_that_share_a_device_cost_it_once(now):
    clocks = [Clock(share=0.5) for _ in range(2)]
    for clock in clocks:
        clock.ready(**{name: Stopwatch() for name in ("encode", *BESIDE)})
    now[0] += 3600
    found = account([clock.untold() for clock in clocks], price=4.0)
    assert (found["seconds"]["idle"], found["device_hours"], found["cost"]) == (7200, 1, 4)


def test_an_account_has_shares_hours_and_a_cost():
    parts = [{"start": 60.0, "encode": 1800.0}, {}, {"encode": 1200.0, "idle": 540.0, "read": 90.0}]
    found = account(parts, price=4.0)
    assert found["seconds"] == dict(start=60, encode=3000, idle=540, read=90, tokenize=0, write=0)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert (found["shares"]["encode"], found["device_hours"], found["cost"]) == (0.8333, 1.0, 4.0)
    assert dict(lines(found)) == {
        "devices": "3,600.00 s: encode 83 %, idle 15 %, start 2 %; beside that read 90.00 s, tokenize 0.00 s, "
        "write 0.00 s",
        "cost": "4.00 (1.00 device-hours at 4)",
    }


def test_without_a_price_no_cost_is_told_and_of_what_is_not_known_nothing():
    assert "cost" not in account([{"encode": 1.0}])
    assert [title for title, _ in lines(account([{"encode": 1.0}]))] == ["devices"]
    assert account([{}, {}], price=1.0) == {}
    assert list(lines({})) == []
