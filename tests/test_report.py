"""The report as a browser has it: one page, no network, no overflow on a phone, a map that answers."""

import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from conftest import demo_rows

from bertray.clock import account
from bertray.report import OTHERS, PALETTE, html

LABELS = ["negative", "neutral", "positive"]
HOSTILE = [
    "<script>document.title = 'broken'</script>",
    "</title></svg></style></script>&amp;",
    r"a $x^2$ $\frac{ \$ %",
    "שלום עולם \u202e evil",
    "😀👩‍👩‍👧 中文",
    "x" * 500,
    "line\none\r\n\tthree",
    "\"quotes' ` {{ 7 * 7 }} {% raw %}",
]
VERSIONS = {"torch": "2.13.0", "ray": "2.60.0"}


@pytest.fixture
def summary():
    rows = {"rows": 720, "rejected": 2, "empty": 0, "truncated": 1, "windowed": 0, "tokens": 9_000}
    test = {
        "accuracy": 0.872,
        "macro_f1": 0.8713,
        "auroc": None,
        "loss": 0.4,
        "coverage": 0.62,
        "accuracy_answered": 0.95,
    }
    return {
        "task": "text-classification",
        "problem": "single_label",
        "encoder": {"model": "sentence-transformers/all-MiniLM-L6-v2", "pooling": "mean", "backends": ["int16 on cpu"]},
        "features": ["mean_5", "mean_6"],
        "head": {"optimizer": "lbfgs", "l2": 0.001, "standardize": True, "combine": "concat", "temperature": 1.31},
        "rows": {
            "train": {**rows, "reasons": {"the label is null": 2}},
            "test": {**rows, "rows": 180, "rejected": 0, "reasons": {}},
        },
        "metrics": {"train": {"accuracy": 0.99, "macro_f1": 0.99, "loss": 0.1}, "test": test},
        "intervals": {"test": {"accuracy": [0.811, 0.917], "auroc": [None, None]}},
        "seconds": {"embed": 1.5, "fit": 0.2, "total": 1.7},
        "faults": {"units_begun_again": 3, "storage_retries": 1200},
        "spent": account([{"start": 6.0, "encode": 80.0, "idle": 14.0, "read": 1.5}], price=36.0),
        "examples": [{"text": "this is great news!", "label": "positive", "score": 0.82}],
    }


@pytest.fixture
def details():
    texts = [row["text"] for row in demo_rows("test")]
    rng = np.random.default_rng(0)
    bins = {"confidence": [0.0, 0.5, 0.9], "accuracy": [0.0, 0.4, 0.95], "count": [0, 60, 120], "ece": 0.07}
    row = {"id": "t.csv:1", "text": texts[0], "label": "negative"}
    given = [LABELS[i] for i in rng.integers(0, 3, len(texts))]
    return {
        "judged": "test",
        "labels": LABELS,
        "losses": [1.1, 0.6, 0.4],
        "validation_losses": [1.0, 0.7],
        "confusion": {"test": [[50, 4, 6], [5, 50, 5], [6, 0, 54]]},
        "per_class": [{"label": name, "precision": 0.8, "recall": 0.9, "f1": 0.85, "support": 60.0} for name in LABELS],
        "reliability": bins,
        "reliability_before": {**bins, "ece": 0.11},
        "abstention": {"threshold": [0.4, 0.6], "coverage": [1, 0.62], "accuracy": [0.87, 0.95], "chosen": 0.55},
        "worst": [{**row, "text_pair": "and a second text", "predicted": "positive", "score": 0.98, "loss": 4.46}],
        "map": {
            "x": rng.normal(size=len(texts)).tolist(),
            "y": rng.normal(size=len(texts)).tolist(),
            "label": [row["label"] for row in demo_rows("test")],
            "predicted": given,
            "text": texts,
            "id": [f"t.csv:{i}" for i in range(len(texts))],
        },
        "doubts": [{**row, "suggested": "positive", "p_label": 0.01, "p_suggested": 0.97} for _ in range(30)],
        "conflicts": [{"text": "well done", "labels": {"positive": 2, "negative": 1}}],
        "overlap": {"rows": 2, "differing": 1, "examples": [{"text": "bye", "label": "neutral", "train_label": "x"}]},
        "near": [{"cosine": 0.991, "train": row, "test": {**row, "id": "t.csv:9"}}],
        "search": {
            "metric": "macro_f1",
            "best": {},
            "curve": [
                {"features": names, "combine": "sum", "l2": l2, "score": 0.8, "low": 0.7, "high": 0.9, "chosen": l2 > 0}
                for names in (["mean_6"], ["mean_5", "mean_6"])
                for l2 in (0.0, 0.1)
            ],
        },
        "truncated": [{"id": "a.csv:7", "text": "a very long story"}],
        "rejected": [{"id": "a.csv:9", "reason": "the label is null", "preview": '{"text": "hello"}'}],
    }  # fmt: skip


@pytest.fixture
def page(summary, details):
    return html("demo", summary, details, "head:\n  l2: 0.001\n", VERSIONS)


def hostile(summary, details):
    """The same with hostile labels and texts everywhere, and 2,000 points in the map."""
    many = [HOSTILE[i % len(HOSTILE)] for i in range(2_000)]
    rng = np.random.default_rng(0)
    row = [{"id": h, "text": h * 9, "text_pair": h, "label": h, "predicted": h[::-1], "suggested": h} for h in HOSTILE]
    numbers = {
        "score": 0.5,
        "loss": 3.0,
        "p_label": 0.1,
        "p_suggested": 0.9,
        "precision": 0.5,
        "recall": 0.4,
        "f1": 0.3,
    }
    rows = [{**each, **numbers, "support": 9, "reason": each["text"], "preview": each["text"]} for each in row]
    points = {"label": many, "predicted": many[::-1], "text": [text * 20 for text in many], "id": many}
    details = details | dict.fromkeys(("per_class", "worst", "doubts", "truncated", "rejected"), rows)
    details |= {
        "labels": HOSTILE,
        "confusion": {"test": np.eye(8, dtype=int).tolist()},
        "conflicts": [{"text": h, "labels": {h: 2, "a": 1}} for h in HOSTILE],
        "overlap": {"rows": 8, "differing": 0, "examples": rows},
        "near": [{"cosine": 0.99, "train": each, "test": each} for each in rows],
        "map": {"x": rng.normal(size=2_000).tolist(), "y": rng.normal(size=2_000).tolist(), **points},
        "search": {
            "metric": HOSTILE[0],
            "curve": [{"features": [h], "combine": h, "l2": l2, "score": l2} for h in HOSTILE for l2 in (0.1, 0.2)],
        },
    }
    reasons = {
        "train": {**summary["rows"]["train"], "reasons": dict.fromkeys(HOSTILE, 3)},
        "test": summary["rows"]["test"],
    }
    encoder = {"model": HOSTILE[0], "pooling": HOSTILE}
    return summary | {"examples": rows, "rows": reasons, "encoder": encoder, "features": HOSTILE[:2]}, details


class Outline(HTMLParser):
    """Tags as they are nested, headings, ids, what is referred to."""

    VOID = ("meta", "input", "br", "wbr", "path", "circle", "use", "rect", "image")

    def __init__(self, page):
        super().__init__()
        self.open, self.counts, self.headings, self.ids, self.links, self.crossed = [], {}, [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "data")]
        if tag in ("h1", "h2", "h3"):
            self.headings.append(int(tag[1]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID and self.open.pop() != tag:
            self.crossed.append(tag)


def sections(page):
    return re.findall('<section id="(.*?)">', page)


def assert_sound(page):
    """Nested rightly, headings in order, ids once, nothing from elsewhere."""
    outline = Outline(page)
    assert not outline.open and not outline.crossed
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(outline.headings))
    assert len(set(outline.ids)) == len(outline.ids)
    for link in outline.links:
        assert link.startswith("data:") or link[1:] in outline.ids, link
    for link in re.findall(r"url\((.*?)\)", page):
        assert link.startswith("#") and link[1:] in outline.ids, link
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\"'<\s]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    return outline


def test_all_is_told_on_one_page_without_a_network(page):
    outline = assert_sound(page)
    assert sections(page) == re.findall('<li><a href="#(.*?)">', page)
    assert sections(page) == [
        *("splits", "examples", "learning", "search", "classes", "confusion", "calibration", "map", "worst", "doubts"),
        *("conflicts", "shared", "aside", "time", "spec"),
    ]
    assert outline.counts["script"] == 1
    for words in (
        "sentence-transformers/all-MiniLM-L6-v2 (int16 on cpu), mean of layers 5, 6; a linear head over 3 labels "
        "fitted by lbfgs on 720 rows: l2 0.001, standardize, combine concat, temperature 1.31.",
        "Judged on 180 test rows",
        "<b>87.2 %</b><span>81.1 to 91.7</span>",
        "Set aside in train: 2 because <bdi>the label is null</bdi>",
        "At the threshold of 0.55 (ring) 62.0 % of the rows are answered, 95.0 % of these rightly.",
        "Calibration error 0.070, before scaling 0.110.",
        "and a second text",
        "0.01 → 0.97",
        "10 more",
        "The text of 2 test rows is in the training rows too, 1 of them with another label",
        "3 units were begun again",
        "1,200 requests to storage were repeated",
        "Devices: 100.00 s: encode 80 %, idle 14 %, start 6 %; beside that read 1.50 s, tokenize 0.00 s, write 0.00 s.",
        "Cost: 1.00 (0.028 device-hours at 36).",
        "torch 2.13.0, ray 2.60.0",
    ):
        assert words in page, words
    assert "<dt>AUROC</dt><dd><b>\N{EN DASH}</b></dd>" in page


def test_plots_are_in_the_colours_of_the_page_and_told_in_words(page):
    plots = re.findall("<svg.*?</svg>", page, re.S)
    assert len(plots) == 5  # learning, search, reliability, abstention, map
    for plot in plots:
        assert re.match('<svg [^>]*role="img"', plot) and re.match('<svg [^>]*aria-label="[^"]{20,}"', plot)
    for plot in plots[:4]:
        assert "var(--soft)" in plot and "#000000" not in plot and "#ffffff" not in plot


@pytest.mark.parametrize(
    ("key", "section"),
    [
        *((name, name) for name in ("search", "confusion", "map", "worst", "doubts", "conflicts")),
        *(("losses", "learning"), ("per_class", "classes")),
    ],
)
def test_what_is_absent_has_no_section(summary, details, key, section):
    for nothing in ({}, {key: None}, {key: []}):
        rest = {name: value for name, value in details.items() if name != key} | nothing
        page = html("demo", summary, rest, "", VERSIONS)
        assert section not in sections(page)
        assert len(sections(page)) == 14
        assert f'href="#{section}"' not in page


def test_sections_of_several_things_go_when_all_are_absent(summary, details):
    for keys, section in (
        (("reliability", "abstention"), "calibration"),
        (("overlap", "near"), "shared"),
        (("truncated", "rejected"), "aside"),
    ):
        one = {name: value for name, value in details.items() if name != keys[0]}
        assert section in sections(html("demo", summary, one, "", VERSIONS))
        none = {name: value for name, value in details.items() if name not in keys}
        assert section not in sections(html("demo", summary, none, "", VERSIONS))
    assert "shared" not in sections(html("demo", summary, {"overlap": {"rows": 0, "differing": 0}}, "", VERSIONS))


def test_little_is_enough():
    bare = {"encoder": {"model": "m", "pooling": "mean"}, "metrics": {"train": {"accuracy": 0.5}}, "rows": {}}
    page = html("bare", bare, {}, "", {})
    assert_sound(page)
    assert sections(page) == ["splits", "spec"]
    assert "There were no test rows." in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("task", "problem", "metrics", "cards"),
    [
        ("text-classification", "multi_label", {"exact": 0.5, "micro_f1": 0.7}, ["micro F1", "exactly right"]),
        ("text-classification", "regression", {"r2": 0.4, "pearson": 0.8}, ["Pearson&#39;s r", "R²"]),
        ("token-classification", "single_label", {"accuracy": 0.97, "f1": 0.6, "precision": 0.7}, ["F1", "precision"]),
        ("question-answering", "single_label", {"exact": 0.5, "f1": 0.6, "loss": None}, ["F1", "exactly right"]),
        ("other", "other", {"brilliance": 0.5}, []),
    ],
)  # fmt: skip
def test_each_problem_has_its_main_metrics_first(summary, task, problem, metrics, cards):
    page = html("demo", summary | {"task": task, "problem": problem, "metrics": {"test": metrics}}, {}, "", {})
    assert re.findall("<dt>(.*?)</dt>", page)[:2] == cards
    assert ("brilliance" in page) == (task == "other")


def test_numbers_have_a_scatter_and_a_map_in_ranges(summary):
    true = np.random.default_rng(0).normal(size=3_000)
    points = dict.fromkeys(("x", "y", "label", "predicted"), true.tolist()) | {"text": ["a text"] * 3_000}
    details = {"scatter": {"true": true.tolist(), "given": (true + 1).tolist()}, "map": points}
    page = html("demo", summary | {"problem": "regression"}, details, "", {})
    assert_sound(page)
    assert "1,000 rows; on the dotted line" in page
    assert len(re.findall('class="k\\d"', page)) == 5
    assert "only wrong answers" not in page
    assert len(page.encode()) < 1_000_000


@pytest.mark.parametrize("classes", [1, 2, 30, 31, 150])
def test_few_and_many_classes_fit(summary, classes):
    matrix = np.random.default_rng(0).integers(0, 9, (classes, classes))
    labels = [f"l{i}" for i in range(classes)]
    table = [
        {"label": name, "precision": 0.5, "recall": 0.5, "f1": i / 150, "support": 9} for i, name in enumerate(labels)
    ]
    details = {"judged": "test", "labels": labels, "confusion": {"test": matrix.tolist()}, "per_class": table[::-1]}
    page = html("demo", summary, details, "", {})
    assert_sound(page)
    assert ('<table class="matrix' in page) == (classes <= 30)
    assert ("Confusion matrix of" in page) == (classes > 30)
    assert ("Most often confused" in page) == (classes > 4)
    shown = re.findall('<th scope="row" dir="auto">(l\\d+)</th>', page)
    assert shown == (labels if classes > 30 else labels[::-1])  # of many the weakest first


def test_points_without_a_place_are_left_out_and_rare_labels_are_grey(summary):
    labels = [f"l{i}" for i in range(20) for _ in range(i + 1)]
    places = [float("nan"), *np.arange(len(labels) - 1.0)]
    points = {"x": places, "y": places, "label": labels, "predicted": labels, "text": labels}
    page = html("demo", summary, {"map": points}, "", {})
    assert page.count("<circle") == len(labels) - 1
    assert "11 other labels" in page
    names = ["a", "b"]
    same = {"x": [2.0, 2.0], "y": [2.0, 2.0], "label": names, "predicted": names, "text": names}
    assert html("demo", summary, {"map": same}, "", {}).count("<circle") == 2


def test_hostile_labels_and_texts_do_no_harm_and_the_page_stays_light(summary, details):
    summary, details = hostile(summary, details)
    started = time.perf_counter()
    page = html(HOSTILE[0], summary, details, HOSTILE[1], {HOSTILE[0]: HOSTILE[1]})
    assert time.perf_counter() - started < 10  # a busy machine; alone it takes 1 s
    assert assert_sound(page).counts["script"] == 1
    assert page.count("<circle") == 2_000
    assert len(page.encode()) < 1_000_000
    assert "x" * 301 not in page and "{{ 7 * 7 }}" in page
    assert "a $x^2$" in page


def test_colours_of_the_map_are_seen_on_light_and_dark():
    def luminance(colour):  # as WCAG 2 has it
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for colour in (*PALETTE, OTHERS):
        for background in ("#f3f6fa", "#1b222c"):
            low, high = sorted((luminance(colour), luminance(background)))
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, background)


def test_matplotlib_loads_only_when_a_page_is_made():
    code = "import sys, bertray.report; assert not {'matplotlib', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


PROBE = """
<script>
f.onload = () => {
  const page = f.contentDocument, view = f.contentWindow, root = page.documentElement, map = page.querySelector(".map");
  const svg = map.querySelector("svg"), tip = map.querySelector(".tip"), said = [];
  const say = (...all) => said.push(...all.map(Number));
  say(root.scrollWidth <= root.clientWidth);
  say([...page.querySelectorAll("figure svg")].every((one) => one.getBoundingClientRect().width > 200));
  const circle = map.querySelector("circle"), box = circle.getBoundingClientRect();
  const at = { clientX: (box.left + box.right) / 2, clientY: (box.top + box.bottom) / 2, bubbles: true };
  const pointer = (type, pointerType, more) => new view.PointerEvent(type, { ...at, pointerType, ...more });
  const send = (...event) => svg.dispatchEvent(pointer(...event));
  const told = () => !tip.hidden && tip.textContent.length > 20 && map.querySelectorAll(".at").length === 1;
  say(tip.hidden, page.querySelectorAll("circle title").length === 0);
  send("pointermove", "mouse"); say(told());
  const inside = tip.getBoundingClientRect();
  say(inside.left >= 0, inside.right <= root.clientWidth + 1, root.scrollWidth <= root.clientWidth);
  send("pointerleave", "mouse"); say(tip.hidden);
  send("pointermove", "touch"); say(tip.hidden);
  send("pointerdown", "touch"); say(told());
  send("pointerleave", "touch"); say(told());
  send("pointerdown", "touch", { clientX: -999 }); say(tip.hidden);
  const key = (name) => svg.dispatchEvent(new view.KeyboardEvent("keydown", { key: name, bubbles: true }));
  key("ArrowRight"); say(told());
  const first = tip.textContent;
  key("ArrowRight"); say(told(), tip.textContent !== first);
  key("Escape"); say(tip.hidden);
  const seen = () => [...map.querySelectorAll("circle")].filter((one) => one.getClientRects().length).length;
  const all = seen(), group = circle.parentNode;
  map.querySelector(".k" + group.className.baseVal.slice(1)).click();
  say(seen() === all - group.children.length);
  map.querySelector(".only").click();
  say(seen() === [...map.querySelectorAll(".w")].filter((one) => one.parentNode !== group).length);
  document.title = said.join("");
};
</script>
"""


@pytest.fixture
def chromium(tmp_path):
    """A function that opens a page in a frame of a width and gives the title of the page around it."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("there is no Chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update", "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--window-size=1600,900", "--virtual-time-budget=5000", "--dump-dom"]

    def title(page, width, probe):
        (tmp_path / "report.html").write_text(page, encoding="utf-8")
        # In a frame, since a headless window cannot be as narrow as a phone.
        frame = f'<iframe id=f src="report.html" style="width:{width}px;height:800px;border:0"></iframe>{probe}'
        (tmp_path / "frame.html").write_text(f"<!doctype html><meta charset=utf-8><title>?</title>{frame}")
        dom = subprocess.run(
            [program, *flags, f"file://{tmp_path / 'frame.html'}"],
            capture_output=True, text=True, timeout=90, check=True,
        ).stdout  # fmt: skip
        return re.search("<title>(.*?)</title>", dom)[1]

    return title


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_it_fits_a_desktop_and_a_phone_and_the_map_answers_in_chromium(summary, details, chromium, kind, width):
    if kind == "hostile":
        summary, details = hostile(summary, details)
    assert chromium(html("demo", summary, details, HOSTILE[5], VERSIONS), width, PROBE) == "1" * 19


def test_texts_are_cut_with_an_ellipsis_and_on_one_line(summary):
    texts = ["a" * 300, "b" * 301, " \n" * 3_000 + "late", "", ("c" + " " * 99) * 148 + "end", ("d" + " " * 99) * 400]
    page = html("demo", summary | {"examples": [{"text": text, "label": "x"} for text in texts]}, {}, "", {})
    shown = re.findall('<td class="text" dir="auto">(.*?)</td>', page)
    assert shown == ["a" * 300, "b" * 299 + "…", "late", "(empty)", "c " * 148 + "end", "d " * 149 + "d…"]


def test_without_scripts_the_map_is_a_picture_with_titles(page):
    bare = re.sub("<script>.*?</script>", "", page, flags=re.S)
    assert bare.count("<circle") == bare.count("<title>") - 1 == 180
    assert re.search(r"<circle[^>]*><title>[^<]+\nlabel (negative|neutral|positive)[^<]*\nt\.csv:\d+</title>", bare)
