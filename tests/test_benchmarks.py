"""The benchmark itself: a small real run, and the parts that tables and shares are made of."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import contestants, machine, peers, results, simulation, texts
from benchmarks.contestants import Contestant, Job, SkippedError

LIGHT = "notebook,bertray-fp32"  # what needs none of the extra's packages


@pytest.fixture(scope="module")
def printed():
    command = f"-m benchmarks.engine --quick --texts 64 --rounds 1 --corpora tweets --only {LIGHT} --threads 1"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(markdown):
    """The cells of every contestant's row, by its name."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]
    head = next(cells for cells in found if cells[0] == "contestant")
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in found if cells[0] in LIGHT.split(",")}


def test_a_small_run_gives_a_sane_row_to_each_contestant(printed):
    found = rows(printed)
    assert list(found) == LIGHT.split(",")
    for cells in found.values():
        middle, least, most = (float(number) for number in re.findall(r"[\d.]+", cells["texts/s"]))
        assert 1 < least <= middle <= most < 1e5
        assert float(cells["cosine, least"]) > 0.9999
        assert cells["computes in"] == "fp32"
        assert 0 < float(cells["share"].rstrip("%")) < 400  # the rate was measured at another moment
        assert 100 < float(cells["peak MB"].replace(",", "")) < 4000
    assert found["bertray-fp32"]["padding"] == "0.0%"
    assert float(found["notebook"]["padding"].rstrip("%")) > 20


def test_a_small_run_tells_the_machine(printed):
    assert re.search(r"^- CPU: .+, \d+ cores$", printed, re.M)
    assert re.search(r"^- versions: .*torch \d.*transformers \d", printed, re.M)
    assert re.search(r"^- matrix products by torch, .*: fp32 \d", printed, re.M)


def test_without_a_gpu_attention_is_not_measured():
    command = [sys.executable, "-m", "benchmarks.attention"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 1
    assert done.stderr == "benchmarks.attention: there is no GPU here. Run it where torch.cuda.is_available().\n"


def test_unknown_contestants_are_named():
    command = [sys.executable, "-m", "benchmarks.engine", "--only", "notebok"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "'notebok' is none of notebook" in done.stderr


@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != "notebook"])
def test_every_peer_gives_the_same_vectors_in_order(name, tiny, minilm):
    """Or is left out with a reason, as without its package."""
    found = ["a", "one two three four", "", "naïve café 😀", "cat " * 600, "one"] * 3
    job = Job(str(tiny), "cpu", 1, {"some": found})
    try:
        peer = contestants.make(name, job)
    except (ImportError, peers.UnavailableError, peers.exports.ExportError) as reason:
        pytest.skip(str(reason))
    expected = contestants.make(contestants.REFERENCE, job)(found)
    vectors = peer(found)
    least = {"fp32": 0.99999, "bf16": 0.999, "int8": 0.9}[peer.precision]
    cosines = (vectors * expected).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > least
    assert peer.fed >= 3 * (3 + 6 + 2 + 512 + 3)


def test_a_contestant_that_cannot_start_says_why(tiny):
    with pytest.raises(SkippedError, match="it is measured on GPUs alone"):
        Contestant("sentence-transformers-fp16", Job(str(tiny), "cpu", 1, {}))


def test_only_one_contestant_runs_at_a_time(tiny):
    contestant = Contestant("notebook", Job(str(tiny), "cpu", 1, {"some": ["one", "two"]}))
    try:
        _, status = os.waitpid(contestant.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert contestant.encode("some")["fed"] == 6
    finally:
        contestant.close()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Intel(R) Xeon(R) Processor", "Intel Xeon"),
        ("Intel(R) Core(TM) i7-8550U CPU @ 1.80GHz", "Intel Core i7-8550U"),
        ("AMD EPYC 9B45 128-Core Processor", "AMD EPYC 9B45 128-Core"),
    ],
)
def test_chips_without_decoration(monkeypatch, name, told):
    monkeypatch.setattr(machine, "_processor", lambda: (name, set()))
    assert machine.chip("cpu") == told


def test_sections_are_replaced_alone(tmp_path):
    path = tmp_path / "RESULTS.md"
    for section, markdown in (("one", "first"), ("two", r"a \1 b"), ("one", "again\n")):
        results.write(section, markdown, path)
    text = path.read_text()
    assert text.startswith("# Results\n")
    assert text.endswith("\n\n<!-- one -->\nagain\n<!-- /one -->\n\n<!-- two -->\na \\1 b\n<!-- /two -->\n")


def test_tables_line_up():
    lines = results.table([{"name": "a", "texts/s": 1.5}, {"name": "longer", "texts/s": 10}]).splitlines()
    assert lines == [
        "| name   | texts/s |",
        "|--------|--------:|",
        "| a      |     1.5 |",
        "| longer |      10 |",
    ]


def test_rates_are_those_of_a_processor():
    rates = machine.matmul_rates("cpu", size=256)
    assert {"fp32", "bf16"} <= set(rates)
    assert all(1e8 < rate < 1e15 for rate in rates.values())


def test_lengths_of_texts_are_as_said(minilm):
    from bertray.tokens import Tokenizer

    tokenizer = Tokenizer(minilm.folder, 10_000)
    long = texts.corpus("long", 400, minilm.folder)
    assert len(long) == 50
    lengths = tokenizer(long).lengths
    assert 120 <= lengths.min() < 200
    assert 440 < lengths.max() <= 516  # a word cut in two may take a token more or less
    assert long == texts.corpus("long", 400, minilm.folder)
    mixed = tokenizer(texts.corpus("mixed", 400, minilm.folder)).lengths
    assert mixed.min() < 10
    assert mixed.max() > 300


@pytest.mark.timeout(300)
def test_a_whole_job_beside_the_notebooks_loop():
    command = "-m benchmarks.job --rows 64 --many 64 --rounds 1"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    assert "| the notebook's loop, ten times one epoch |" in done.stdout
    seconds = [float(found) for found in re.findall(r"\|\s*(\d+\.\d) \(", done.stdout)]
    assert len(seconds) == 3
    assert seconds[2] < seconds[1]  # what is without start-up is quicker
    rates = [int(found) for found in re.findall(r"\|\s*(\d+) \(", done.stdout)]
    assert len(rates) == 2
    assert min(rates) > 10


@pytest.mark.timeout(240)
def test_scale_tells_memory_and_rates():
    command = "-m benchmarks.scale --sizes 1000 4000 --of 1000 --workers 2"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    sizes = {row[0]: row for row in cells if row[0] in ("1,000", "4,000")}
    assert set(sizes) == {"1,000", "4,000"}
    for row in sizes.values():
        assert 50 < int(row[3]) < 1000
        assert abs(int(row[4])) < 50
    assert any(row[0] == "2" for row in cells)


@pytest.mark.timeout(120)
def test_the_simulation_of_a_huge_run_tells_what_it_costs():
    command = "-m benchmarks.simulation --sizes 100 --driven 40"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    tables = {tuple(row) for row in cells}
    (kept,) = [row for row in tables if row[:2] == ("100", "2")]
    assert all(0 <= float(seconds) < 5 for seconds in kept[2:-1])
    (drove,) = [row for row in tables if row[:3] == ("40", "40", "written")]
    assert float(drove[4]) > 2
    asked = {row[0]: row for row in tables if row[0] in ("before", "now")}
    assert float(asked["now"][7]) < float(asked["before"][7])
    assert (asked["before"][-1], asked["now"][-1]) == ("2,001", "4")
    told = {row[0]: row for row in tables if row[0] in ("128 (before)", "128 (now)")}
    assert {row[2] for row in told.values()} == {"500,000", "23,995"}


def test_simulated_gpus_wait_for_a_driver_that_is_slower_than_they_are():
    free = simulation.simulated([1] * 4_000, 1.0, 0.0, 0.0, gpus=10)
    assert 396 < free < 410
    assert simulation.simulated([1] * 4_000, 0.01, 0.1, 0.0, gpus=10) == pytest.approx(400, abs=1)
    assert simulation.simulated([10] * 400, 0.01, 0.1, 0.0, gpus=10) == pytest.approx(40, abs=1)
    assert simulation.simulated([4_000], 1.0, 0.0, 0.0, gpus=10) > 3_000  # a block is one GPU's


def test_costs_of_a_block_and_of_a_unit_are_told_apart():
    driven = [
        {"blocks": blocks, "units": units, "cpu": 0.004 * blocks + 0.0001 * units}
        for blocks, units in ((1_000, 1_000), (5_000, 5_000), (24_000, 500_000))
    ]
    assert simulation._costs(driven) == pytest.approx((0.004, 0.0001))
    assert simulation._costs(driven[:1]) == pytest.approx((0.0041, 0))
