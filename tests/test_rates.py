"""Rates: which are measured, which are not, and what follows from them."""

import pytest
from conftest import ROOT

from bertray.errors import BertrayError
from bertray.rates import Shape, gpus, peak, rate, table

MINILM = Shape(6, 384, 1536)
BASE = Shape(12, 768, 3072)


def test_operations_are_those_of_the_published_encoders():
    """BERT-base has 85 million weights in its layers."""
    assert BASE.flops(0) == 2 * 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert BASE.flops(0) / 2 == pytest.approx(85e6, rel=0.01)
    assert BASE.flops(100) - BASE.flops(0) == 4 * 12 * 100 * 768


def test_what_is_called_measured_was_measured_by_this_project():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    for row in table()["rates"]:
        assert (row["kind"], row["device"] == "cpu") in (("measured", True), ("published", False))
        if row["kind"] == "measured":
            line = rf"bertray-{row['precision']} "
            told = [each for each in results.splitlines() if line in each and f" {row['tokens_per_second']:,} " in each]
            assert told, row
        else:
            assert "github.com" in row["where"]


@pytest.mark.parametrize("row", [row for row in table()["rates"] if row["kind"] == "measured"])
def test_a_row_of_the_table_is_taken_as_it_is(row):
    found = rate("cpu", row["threads"], row["precision"], MINILM, row["attended"])
    assert found.kind == "measured"
    assert found.tokens_per_second == pytest.approx(row["tokens_per_second"])


def test_another_encoder_is_an_estimate_by_its_operations():
    small, large = (rate("cpu", 2, "auto", shape, 25) for shape in (MINILM, BASE))
    assert small.kind == "measured" and large.kind == "estimate"
    times = BASE.flops(25) / MINILM.flops(25)
    assert large.tokens_per_second == pytest.approx(small.tokens_per_second / times, rel=0.01)
    assert "operations a token" in large.how


def test_other_threads_are_an_estimate():
    two, four = rate("cpu", 2, "fp32", MINILM, 25), rate("cpu", 4, "fp32", MINILM, 25)
    assert four.tokens_per_second == pytest.approx(2 * two.tokens_per_second)
    assert (two.kind, four.kind) == ("measured", "estimate")


def test_no_gpu_is_called_measured():
    for gpu in gpus():
        for shape in (MINILM, BASE, Shape(24, 1024, 4096)):
            assert rate(gpu, 4, "auto", shape, 128).kind in ("published", "estimate")
    assert rate("a100", 4, "fp16", BASE, 128).kind == "published"
    assert rate("a100", 4, "fp16", BASE, 128).tokens_per_second == pytest.approx(128 * 128 / 16.14e-3, rel=0.001)


def test_a_gpu_without_a_row_is_scaled_by_its_peak():
    h200, h100, l4 = (rate(gpu, 4, "auto", BASE, 50) for gpu in ("h200", "h100", "l4"))
    assert (h200.kind, h100.kind, l4.kind) == ("published", "estimate", "estimate")
    assert h100.tokens_per_second == h200.tokens_per_second == pytest.approx(1_400_000)  # one peak
    assert "for the peak of l4" in l4.how
    assert l4.tokens_per_second < h100.tokens_per_second
    assert rate("h200", 4, "fp32", BASE, 50).tokens_per_second == pytest.approx(1_400_000 * 67 / 989, rel=0.01)


def test_what_a_device_has_not_is_said():
    with pytest.raises(BertrayError, match=r"encoder.precision int8 cannot be had on a GPU"):
        rate("l4", 4, "int8", BASE, 50)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 0),
        ("", 0),
    ],
)
def test_peaks_by_the_names_of_devices(name, teraflops):
    assert peak(name) == teraflops * 1e12
