"""What is told of time adds up, whatever threads do beside each other."""

import threading
import time

import pytest

from bertray.clock import BESIDE, HELD, Clock, Stopwatch, account, lines


def at_once(watch, *pauses):
    """Threads that are at it for so many seconds after so many seconds."""

    def work(before, during):
        time.sleep(before)
        with watch:
            time.sleep(during)

    threads = [threading.Thread(target=work, args=pause) for pause in pauses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_what_several_threads_do_at_once_counts_once():
    watch = Stopwatch()
    started = time.perf_counter()
    at_once(watch, (0.0, 0.3), (0.1, 0.3), (0.7, 0.2))  # from 0 to 0.4, and from 0.7 to 0.9
    assert 0.6 <= watch.seconds < time.perf_counter() - started - 0.2
    before = watch.seconds
    time.sleep(0.05)
    assert watch.seconds == before
    with watch:
        time.sleep(0.05)
        assert watch.seconds >= before + 0.05  # also while it runs
    watch.add(10)
    assert watch.seconds > 10.6


def test_parts_of_a_clock_add_up_to_the_time_that_passed():
    started, clock = time.perf_counter(), Clock()
    encode, others = Stopwatch(), {name: Stopwatch() for name in BESIDE}
    with encode:  # as it is tried out before the process is ready
        time.sleep(0.1)
    clock.ready(encode=encode, **others)
    parts = []
    for _ in range(3):
        time.sleep(0.1)
        with encode, others["tokenize"]:
            time.sleep(0.2)
        with others["write"]:  # is told while it runs
            time.sleep(0.05)
            parts.append(clock.untold())
    passed, total = time.perf_counter() - started, account(parts)["seconds"]
    assert sum(total[name] for name in HELD) == pytest.approx(passed, abs=0.02)
    assert total["start"] >= 0.1 and [part.get("start", 0.0) > 0 for part in parts] == [True, False, False]
    assert 0.6 <= total["encode"] < 0.8 and 0.3 <= total["idle"] - 3 * 0.05 < 0.5
    assert 0.6 <= total["tokenize"] < 0.8 and 0.15 <= total["write"] < 0.3
    assert "read" not in parts[0]  # what is none is not told


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
