"""What encoder processes tell Prometheus; through a real agent: test_jobs."""

import subprocess
import sys

import pytest

from bertray.meters import Meters


def test_without_an_agent_nothing_is_recorded_and_ray_not_loaded():
    code = (
        "import sys; from bertray.meters import Meters; meters = Meters('run', 'cpu', '', False);"
        "meters.count('train', {'rows': 1}); meters.look(1.0, 1.0, 448); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class Shown(Meters):
    """Keeps what would be shown."""

    def __init__(self, model):
        super().__init__("run", "cuda:0", model, False)
        self._shown, self.told = True, {}

    def _show(self, name, value):
        self.told[name] = value


def test_shares_are_of_the_time_since_the_last_look(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meters = Shown("NVIDIA L4")
    now[0] += 10
    meters.look(4.0, 121e12, 65_536)
    first = {"idle_share": 0.6, "token_budget": 65_536, "mfu": 0.1}
    assert meters.told == pytest.approx(first)
    now[0] += 1
    meters.look(5.0, 121e12, 65_536)
    assert meters.told == pytest.approx(first)  # a moment ago
    now[0] += 9
    meters.look(14.0, 10 * 121e12, 32_768)
    assert meters.told == pytest.approx({"idle_share": 0.0, "token_budget": 32_768, "mfu": 0.9})
    for _ in range(3):  # a unit that takes a minute counts when it is done
        now[0] += 20
        meters.look(14.0, 10 * 121e12, 32_768)
        assert meters.told["idle_share"] == 0.0
    now[0] += 10
    meters.look(49.0, 25 * 121e12, 32_768)
    assert meters.told == pytest.approx({"idle_share": 0.5, "token_budget": 32_768, "mfu": 15 / 70})
    now[0] += 400
    meters.look(49.0, 25 * 121e12, 32_768)
    assert meters.told["idle_share"] == 1.0
    unknown = Shown("")
    now[0] += 10
    unknown.look(5.0, 1e12, 448)
    assert unknown.told == pytest.approx({"idle_share": 0.5, "token_budget": 448})
