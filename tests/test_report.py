"""The report as a browser has it: one page, no network, no overflow on a phone."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bertray.evaluate import Evaluation
from bertray.report import html


def test_the_page_is_self_contained_and_tells_the_figures(demo):
    page = Path(demo["report"]).read_text(encoding="utf-8")
    for link in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page):
        assert link.startswith("data:"), link
    assert "<script" not in page
    assert f"{100 * demo['metrics']['test']['accuracy']:.1f} %" in page
    assert "im very sad at the whole situation" in page
    assert "Worst mistakes" in page
    assert "gt-all" not in page
    assert "all-MiniLM-L6-v2" in page


def test_texts_are_escaped_and_many_classes_fit():
    classes = 77
    confusion = np.random.default_rng(0).integers(0, 9, (classes, classes))
    worst = [{"text": "<script>alert(1)</script>", "label": "l0", "predicted": "l1", "score": 0.9, "loss": 3.0}]
    evaluation = Evaluation(100, 0.5, confusion, worst)
    rows = {"rejected": 0, "empty": 0, "truncated": 0, "windowed": 0, "reasons": {}}
    summary = {
        "encoder": {"model": "m", "pooling": "mean"},
        "metrics": {"test": evaluation.summary},
        "rows": {"test": rows},
        "faults": {"units_begun_again": 3, "storage_retries": 1200},
        "seconds": {"embed": 1.0},
    }
    labels = [f"l{i}" for i in range(classes)]
    page = html("run", summary, {"test": evaluation}, labels, [1.0, 0.5], "spec", {"a": "1"})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "3 units were begun again" in page
    assert "1,200 requests to storage were repeated" in page


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_a_desktop_and_a_phone_in_chromium(demo, tmp_path, width):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no Chromium on this machine")
    # In a frame, since a headless window cannot be as narrow as a phone.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id=f src="file://{demo["report"]}" style="width:{width}px;height:800px;border:0"></iframe>'
        "<script>f.onload = () => { const d = f.contentDocument.documentElement;"
        "document.title = `${d.scrollWidth <= d.clientWidth}"
        " ${[...f.contentDocument.images].every(i => i.naturalWidth > 99)}` }</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update", "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run(
        [chromium, *flags, "--window-size=1600,900", "--virtual-time-budget=5000", "--dump-dom", f"file://{frame}"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    (title,) = re.findall("<title>(.*?)</title>", dom)
    assert title == "true true"
