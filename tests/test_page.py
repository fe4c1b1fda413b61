"""The page in a real browser: what people see, what the keyboard reaches, and that no cell of a file is lost."""

import csv
import io
import json
import re
import shutil
import time
import urllib.request
from itertools import count

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
from conftest import ROOT, SIX
from playwright.sync_api import expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
STATIC = ROOT / "bertray" / "static"
LABELS = ["negative", "neutral", "positive"]
TABS = {",": "csv", ";": "csv", "\t": "tsv"}

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="session")
def address(service):
    """Where a service with the heads `mood` (one of three labels) and `topics` (any of several) answers."""
    return f"{service.address}/"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, timeout=60_000)
        yield found
        found.close()


@pytest.fixture
def visit(browser, address):
    """A function that opens the page. Whatever a test does: no other origin, no error, nothing against the policy."""
    contexts, wrong = [], []

    def open_page(before=lambda page: None, wait=True, **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error(`policy: ${e.violatedDirective}`))"
        )
        page.on(
            "request", lambda request: request.url.startswith((address, "data:", "blob:")) or wrong.append(request.url)
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and not message.text.startswith("Failed to load resource")  # a status that the page handles
                and wrong.append(message.text)
            ),
        )
        before(page)
        page.goto(address)
        if wait:
            page.wait_for_selector("#predict:enabled")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def ask(page, first, second=None):
    page.fill("#first", first)
    if second is not None:
        page.fill("#second", second)
    page.evaluate("document.getElementById('results').replaceChildren()")
    page.click("#predict")
    page.wait_for_selector(".result")
    return page.locator(".result")


def percents(result):
    return [float(text.split()[0]) for text in result.locator(".bars li > :last-child").all_inner_texts()]


def answers(address, head, texts):
    """What the service says to a program."""
    return asked_of(f"{address}v1/heads/{head}/predict", texts)["predictions"]


def explained(address, head, text):
    """How much the service says that each word counted."""
    return asked_of(f"{address}v1/heads/{head}/explain", text)


def asked_of(url, inputs):
    body = json.dumps({"inputs": inputs}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=60) as response:
        return json.load(response)


def told(address, path):
    with urllib.request.urlopen(f"{address}{path}", timeout=60) as response:
        return json.load(response)


# --- texts ---


def test_lines_are_labelled_with_all_probabilities(visit, address):
    page = visit()
    results = ask(page, "\n\n".join(SIX))
    assert results.count() == 6
    assert results.locator(".named").all_inner_texts() == list(SIX.values())
    assert results.locator(".text").all_inner_texts() == list(SIX)
    for i, expected in enumerate(answers(address, "mood", list(SIX))):
        shown = percents(results.nth(i))
        assert sum(shown) == pytest.approx(100, abs=0.2)
        assert shown == pytest.approx([100 * one["score"] for one in expected["scores"]], abs=0.06)
        assert sorted(results.nth(i).locator(".bars bdi").all_inner_texts()) == LABELS
    version = next(head["version"] for head in told(address, "v1/heads")["heads"] if head["name"] == "mood")
    assert f"mood, version {version}" in page.inner_text("#said")


def test_bars_are_as_long_as_the_probabilities(visit):
    page = visit(reduced_motion="reduce")
    bars = ask(page, "this is great news!").locator(".bar")
    wide = bars.evaluate_all(
        "bars => bars.map(b => 100 * b.firstChild.getBoundingClientRect().width / b.getBoundingClientRect().width)"
    )
    assert wide == pytest.approx(percents(page.locator(".result")), abs=0.3)


def test_more_lines_than_a_request_holds_keep_their_order(visit):
    page = visit()
    lines = [f"{i} {text}" for i in range(25) for text in SIX]
    results = ask(page, "\n".join(lines))
    assert results.locator(".text").all_inner_texts() == lines
    assert page.inner_text("#said").startswith("150 texts")


def test_no_text_is_said(visit):
    page = visit()
    page.fill("#first", " \n\n ")
    page.click("#predict")
    assert page.inner_text("#said") == "There is no text yet."


def test_words_are_coloured_by_how_much_they_counted(visit, address):
    page = visit()
    result = ask(page, "this is great news!").first
    text = result.locator(".text").inner_text()
    result.locator(".why").click()
    words = result.locator(".text .w")
    words.first.wait_for()
    assert result.locator(".text").inner_text() == text == "this is great news!"
    assert "occlusion: each word left out once" in result.locator(".key").inner_text()
    strength = dict(words.evaluate_all("words => words.map(w => [w.textContent, +w.style.getPropertyValue('--s')])"))
    weights = {word["text"]: word["weight"] for word in explained(address, "mood", text)["words"]}
    strongest = max(map(abs, weights.values()))
    assert strength == {word: pytest.approx(abs(weight) / strongest, abs=0.01) for word, weight in weights.items()}
    great = words.get_by_text("great", exact=True)
    assert re.fullmatch(r"great: for positive, \+0\.\d{3}", great.get_attribute("aria-label"))
    great.hover()
    assert re.match(r"“great” \+0\.\d{3}: without it “positive” goes from", result.locator(".reason").inner_text())
    assert great.evaluate("w => getComputedStyle(w).backgroundColor") != "rgba(0, 0, 0, 0)"
    result.locator(".why").click()
    assert words.count() == 0
    assert result.locator(".text").inner_text() == text


def test_for_and_against_differ_in_colour_and_in_form(visit):
    words = [{"text": "a", "start": 1, "end": 2, "weight": 0.2}, {"text": "b", "start": 3, "end": 4, "weight": -0.1}]
    found = {"label": "positive", "score": 0.7, "method": "occlusion", "words": words}
    page = visit()
    page.route("**/explain", lambda route: route.fulfill(json=found))
    ask(page, "😀a b").locator(".why").first.click()
    page.wait_for_selector(".text .w")
    assert page.locator(".text .w").all_inner_texts() == ["a", "b"], "places count code points"
    style = "w => [getComputedStyle(w).backgroundColor, getComputedStyle(w).textDecorationStyle]"
    (blue, solid), (orange, dotted) = (page.locator(".text .w").nth(i).evaluate(style) for i in range(2))
    assert blue != orange and (solid, dotted) == ("solid", "dotted")
    page.locator(".text .w").nth(1).hover()
    assert page.inner_text(".reason") == "“b” \N{MINUS SIGN}0.100: without it “positive” goes from 70.0 % to 80.0 %."


def test_heads_are_switched(visit, address):
    page = visit()
    assert "negative, neutral, positive" in page.inner_text("#about")
    ask(page, "this is great news!")
    page.select_option("#head", "topics")
    assert page.locator(".result").count() == 0
    assert page.inner_text("#about").startswith("Any of ")
    result = ask(page, "my sister cooks pasta").first
    expected = answers(address, "topics", ["my sister cooks pasta"])[0]
    assert result.locator(".named").inner_text() == (", ".join(expected["labels"]) or "none of the labels")
    assert "topics, version 1" in page.inner_text("#said")


def test_a_single_head_needs_no_choice(visit, address):
    listed = told(address, "v1/heads")
    listed["heads"] = listed["heads"][:1]
    page = visit(lambda page: page.route("**/v1/heads", lambda route: route.fulfill(json=listed)))
    assert not page.is_visible("#head")
    assert re.fullmatch(r"mood, version \d+", page.inner_text("#only"))


def test_text_stays_text(visit):
    page = visit()
    nasty = '<img src=x onerror="document.title=1"><b>great</b> news &amp; &lt;'
    result = ask(page, nasty).first
    assert result.locator(".text").inner_text() == nasty
    assert page.title() == "bertray"
    assert result.locator("img, b").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(visit, scheme):
    """Words stand out from what is behind them by 4.5 to 1, as WCAG asks."""
    page = visit(color_scheme=scheme)
    ask(page, "this is great news!").locator(".why").first.click()
    page.wait_for_selector(".text .w")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (_light(page, paper) > 0.5) == (scheme == "light")
    for what in ("#about", ".named", ".bars li:last-child", "#said", "#predict", ".why", ".small a", ".text .w"):
        for i in range(page.locator(what).count()):
            ink, behind = page.locator(what).nth(i).evaluate(_COLOURS)
            lights = sorted((_light(page, ink), _light(page, behind)))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (what, i)


_COLOURS = """element => {
  const pixel = document.createElement("canvas").getContext("2d");
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.unshift(getComputedStyle(e).backgroundColor);
  for (const layer of layers) { pixel.fillStyle = layer; pixel.fillRect(0, 0, 1, 1); }
  const behind = `rgb(${[...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3)})`;
  return [getComputedStyle(element).color, behind];
}"""


def _light(page, colour):
    """The relative luminance of rgb(...)."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_the_keyboard_alone(visit):
    page = visit()
    focus = "document.activeElement.id || document.activeElement.className"

    def tab(*places):
        for place in places:
            page.keyboard.press("Tab")
            assert page.evaluate(focus) == place
            ring = (
                "getComputedStyle(document.activeElement.closest('.tabs label') || document.activeElement).outlineStyle"
            )
            assert page.evaluate(ring) == "solid", f"no focus to be seen on {place}"

    tab("head", "tab-texts", "first")
    page.keyboard.type("this is great news!")
    page.keyboard.press("Enter")
    page.keyboard.type("im very sad at the whole situation")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".result")
    assert page.evaluate(focus) == "first"
    tab("predict", "why")
    page.keyboard.press("Enter")
    page.wait_for_selector(".text .w")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.textContent") == "this"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent").startswith("great")
    assert "without it" in page.inner_text(".reason")
    tab("why", "why")
    page.keyboard.press("Space")
    page.wait_for_selector(".result:nth-child(2) .w")
    page.focus("#tab-texts")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#file") and not page.is_visible("#texts")
    tab("upload")
    page.set_input_files("#upload", files=[as_file("text\nso happy\nso sad\n")])
    page.wait_for_selector("#job")
    tab("column", "header", "label")
    page.keyboard.press("Enter")
    page.wait_for_selector("#download")
    assert page.evaluate(focus) == "download", "the focus is not lost with the button that went"


def test_what_is_said_is_announced(visit):
    page = visit()
    for place in ("#said", "#told", "#about"):
        assert page.get_attribute(place, "role") == "status"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, select, progress')]"
        ".filter(e => !e.labels?.length && !e.ariaLabel).map(e => e.id)"
    )
    assert unnamed == []


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_needs_no_sideways_scrolling(visit, width):
    page = visit(viewport={"width": width, "height": 844}, has_touch=True, is_mobile=True)
    fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert page.evaluate(fits)
    ask(page, "Donaudampfschifffahrt" * 12 + "\nאהבה great 😀👩‍👩‍👧\nthis is great news!")
    page.locator(".why").first.tap()
    page.wait_for_selector(".text .w")
    assert page.evaluate(fits)
    page.tap("#tab-file")
    page.set_input_files(
        "#upload", files=[as_file("a very long name of a column " * 9 + "\nso happy\n", "x" * 90 + ".csv")]
    )
    page.wait_for_selector("#job")
    page.tap("#label")
    page.wait_for_selector("#download")
    assert page.evaluate(fits)


def test_nothing_moves_while_it_loads(visit):
    def watch(page):
        page.add_init_script(
            "window.moved = 0;"
            "new PerformanceObserver((list) => list.getEntries().forEach((e) => window.moved += e.value))"
            ".observe({ type: 'layout-shift', buffered: true })"
        )

    page = visit(watch)
    page.wait_for_timeout(300)
    assert page.evaluate("window.moved") < 0.01


def test_the_page_is_small_and_all_its_links_are_relative():
    files = [STATIC / name for name in ("index.html", "app.js", "make.js", "style.css")]
    assert sum(file.stat().st_size for file in files) < 40 * 1024
    assert not re.search(r'(src|href)="(/|http)|["`]/v1|innerHTML', "".join(file.read_text("utf-8") for file in files))


# --- other kinds of heads, which this service does not hold ---


def with_head(head, predictions):
    head = {"version": 7, "labels": [], "pairs": False, "threshold": 0, "ood": False, "explain": False, **head}
    asked = []

    def predict(route):
        asked.append(route.request.post_data_json)
        route.fulfill(json={"head": head["name"], "version": 7, "predictions": predictions})

    def before(page):
        page.route("**/v1/heads", lambda route: route.fulfill(json={"default": head["name"], "heads": [head]}))
        page.route("**/predict", predict)

    return before, asked


def test_entities_are_marked_in_their_text(visit):
    text = "😀 Ana saw אבהא in Rome"
    places = [("PER", 2, 5), ("PER", 10, 14), ("LOC", 18, 22)]
    entities = [
        {"entity_group": kind, "score": 0.9, "word": text[start:end], "start": start, "end": end}
        for kind, start, end in places
    ]
    head = {"name": "names/é", "task": "token-classification", "labels": ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]}
    before, asked = with_head(head, [{"entities": entities, "truncated": False}])
    page = visit(before)
    result = ask(page, text).first
    assert result.locator("mark").all_inner_texts() == ["AnaPER", "אבהאPER", "RomeLOC"]
    assert result.locator(".named").inner_text() == "3 names"
    assert asked == [{"inputs": [text], "ood": False}]


def test_an_answer_is_marked_in_its_context(visit):
    head = {"name": "reader", "task": "question-answering", "pairs": True, "labels": ["start", "stop"]}
    context = "😀 Built in 1924.\nNever since."
    before, asked = with_head(head, [{"answer": "1924", "score": 3.5, "start": 11, "end": 15, "truncated": True}])
    page = visit(before)
    result = ask(page, "When?", context).first
    assert result.locator("mark").inner_text() == "1924"
    assert result.locator(".text").all_inner_texts() == ["When?", context]
    assert "end was left out" in result.inner_text()
    assert asked == [{"inputs": [{"question": "When?", "context": context}], "ood": False}]


def test_pairs_numbers_and_doubts(visit):
    head = {"name": "same", "task": "text-classification", "problem": "single_label", "pairs": True, "ood": True}
    unsure = {
        "label": None,
        "scores": [{"label": "same", "score": 0.55}, {"label": "other", "score": 0.45}],
        "ood": {"distance": 31.5, "threshold": 20.1, "outlier": True},
    }
    before, asked = with_head(head | {"labels": ["other", "same"], "threshold": 0.9}, [unsure])
    page = visit(before)
    assert "Below 90.0 %" in page.inner_text("#about")
    result = ask(page, "a", "b").first
    assert result.locator(".named").inner_text() == "not sure enough"
    assert "Unlike the training texts" in result.inner_text()
    assert asked == [{"inputs": [["a", "b"]], "ood": True}]

    head = {"name": "stars", "task": "text-classification", "problem": "regression", "labels": ["stars"]}
    page = visit(with_head(head, [{"value": -3.25001, "truncated": False}])[0])
    assert ask(page, "a").locator(".named").inner_text() == "-3.25 stars"


# --- files ---


def as_file(content, name="rows.csv"):
    return {"name": name, "mimeType": "text/csv", "buffer": content if isinstance(content, bytes) else content.encode()}


def upload(page, content, name="rows.csv"):
    page.check("#tab-file")
    page.set_input_files("#upload", files=[as_file(content, name)])
    page.wait_for_selector("#job")


def download(page):
    page.wait_for_selector("#download")
    with page.expect_download() as waiting:
        page.click("#download")
    return waiting.value.suggested_filename, open(waiting.value.path(), "rb").read()


def read_csv(content, delimiter=","):
    return list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True))


def write_csv(rows, delimiter=",", newline="\r\n"):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator=newline).writerows(rows)
    return out.getvalue()


NASTY = [
    "",
    " ",
    'he said "great", twice',
    "two\nlines, great",
    "two\r\nlines of Windows",
    '"',
    '""',
    "semi;colon\ttab",
    "=1+1",
    "-great",
    "+39 02 great",
    "@someone this is great news!",
    "  spaces around  ",
    "great 😀👩‍👩‍👧 news",
    "אני אוהב את זה",
    "<script>alert(1)</script>",
    "NEL\u0085and\u2028line separators\u00a0",
    "null \\N NULL nan",
    "x" * 9_000,
]


def test_a_file_comes_back_cell_by_cell(visit, address):
    limit = told(address, "info")["limits"]["characters"]
    texts = [*NASTY, *SIX, "very " * (limit // 5) + "long", *(f"row {i}: {text}" for i in range(35) for text in SIX)]
    rows = [["id", "text", "label", "no, te"]] + [[f"{i:03}", text, "=old", ' "n" '] for i, text in enumerate(texts)]
    rows[5] = rows[5][:2]  # spreadsheets leave out empty cells at the end
    page = visit()
    upload(page, write_csv(rows))
    assert page.input_value("#column") == "1", "the column named text is chosen"
    assert page.inner_text("#told").startswith(f"{len(texts)} rows, 4 columns between commas")
    page.click("#label")
    name, content = download(page)
    assert name == "rows-mood.csv"
    found = read_csv(content)
    assert found[0] == [*rows[0], "predicted_label", "score", "error"]
    assert [row[:4] for row in found[1:]] == [row + [""] * (4 - len(row)) for row in rows[1:]]
    assert page.evaluate("document.getElementById('progress').value") == len(texts)

    long = texts.index(max(texts, key=len))
    assert found[1 + long][4:6] == ["", ""] and found[1 + long][6], "its neighbours are labelled all the same"
    others = [i for i in range(len(texts)) if i != long]
    assert all(found[1 + i][6] == "" for i in others)
    expected = answers(address, "mood", [texts[i] for i in others])
    assert [found[1 + i][4] for i in others] == [one["label"] for one in expected]
    scores = [one["scores"][0]["score"] for one in expected]
    assert [float(found[1 + i][5]) for i in others] == pytest.approx(scores, abs=1e-3)
    assert f"{len(others)} of {len(texts)} rows labelled by mood" in page.inner_text("#told")
    assert sum(int(n) for n in page.locator("#counts li > :last-child").all_inner_texts()) == len(others)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", [True, False], ids=["ended", "unended"])
def test_what_files_are_like(visit, delimiter, newline, end):
    rows = [["text", "other"], *([text, f"a, b; {i}"] for i, text in enumerate(NASTY[:12]))]
    content = write_csv(rows, delimiter, newline)
    mark = b"\xef\xbb\xbf" if end else b""
    page = visit()
    upload(page, mark + (content if end else content[: -len(newline)]).encode(), "list.of.txt")
    page.click("#label")
    name, found = download(page)
    assert name == f"list.of-mood.{TABS[delimiter]}"
    assert found.startswith(b"\xef\xbb\xbf") == end
    assert found.endswith(newline.encode())
    table = read_csv(found, delimiter)
    assert [row[:2] for row in table] == rows
    assert table[0][2:] == ["label", "score"]
    assert {row[2] for row in table[1:]} <= {*LABELS}


def test_one_column_without_a_name_and_empty_cells(visit):
    page = visit()
    upload(page, b'so happy\n""\n\nso sad, really; yes\n')
    page.uncheck("#header")
    assert page.inner_text("#label") == "Label 3 rows", "an empty line is no row; an empty cell is"
    page.click("#label")
    table = read_csv(download(page)[1])
    assert [row[0] for row in table] == ["so happy", "", "so sad, really; yes"]
    assert [len(row) for row in table] == [3, 3, 3]


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_other_encodings(visit, encoding):
    page = visit()
    upload(page, "text,n\nça c'est “génial”,1\n".encode(encoding))
    page.click("#label")
    assert read_csv(download(page)[1])[1][:2] == ["ça c'est “génial”", "1"]


def test_labels_do_not_become_formulas(visit):
    head = {"name": "odd", "task": "text-classification", "problem": "single_label", "labels": ["=1+1", "b"]}
    found = {"label": "=1+1", "scores": [{"label": "=1+1", "score": 0.9}, {"label": "b", "score": 0.1}]}
    page = visit(with_head(head, [found])[0])
    upload(page, "text\n=2+2\n")
    page.click("#label")
    assert read_csv(download(page)[1]) == [["text", "label", "score"], ["=2+2", "'=1+1", "0.9"]]


def test_several_labels_are_json(visit, address):
    page = visit()
    page.select_option("#head", "topics")
    upload(page, "text\nmy sister cooks pasta\n")
    page.click("#label")
    table = read_csv(download(page)[1])
    expected = answers(address, "topics", ["my sister cooks pasta"])[0]
    assert json.loads(table[1][1]) == expected["labels"]
    assert len(json.loads(table[1][2])) == len(expected["labels"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "rows.csv has no rows."),
        (b'text\n"never closed', "the quote that opens in row 2 is never closed"),
        (b"text\n" + b"a\n" * 5_001, "This page takes up to 5,000"),
    ],
    ids=["empty", "unclosed", "many"],
)
def test_files_that_are_refused(visit, content, says):
    page = visit()
    page.check("#tab-file")
    page.set_input_files("#upload", files=[as_file(content)])
    page.wait_for_selector("#told.bad")
    assert says in page.inner_text("#told")
    assert not page.is_visible("#label:enabled")


def test_cancel_keeps_what_is_done_and_goes_on(visit):
    held = []

    def hold(route):
        held.append(route)
        if len(held) <= 2:
            route.continue_()

    page = visit()
    page.route("**/predict", hold)
    upload(page, "text\n" + "so happy\n" * 400)
    page.click("#label")
    expect(page.locator("#progress")).to_have_js_property("value", 128, timeout=20_000)
    page.click("#cancel")
    page.wait_for_selector("#download")
    assert page.inner_text("#told").startswith("Cancelled. 128 of 400 rows labelled by mood")
    half = read_csv(download(page)[1])
    assert [row[1] != "" for row in half[1:]] == [True] * 128 + [False] * 272
    for route in held[2:]:
        route.abort()
    page.unroute("**/predict")
    assert page.inner_text("#label") == "Go on with 272 rows"
    page.click("#label")
    page.wait_for_selector("#label", state="hidden")
    page.wait_for_selector("#download")
    assert all(row[1] for row in read_csv(download(page)[1])[1:])


# --- a service that is busy, gone or locked ---


def test_a_busy_service_is_asked_again(visit):
    turns, asked = count(), []

    def busy(route):
        asked.append((time.monotonic(), len(route.request.post_data_json["inputs"])))
        if next(turns) < 3:
            route.fulfill(status=429, headers={"Retry-After": "1"}, json={"error": "Too much at once."})
        else:
            route.continue_()

    page = visit()
    page.route("**/predict", busy)
    upload(page, "text\n" + "so happy\n" * 100)
    page.click("#label")
    expect(page.locator("#told")).to_contain_text("busy", timeout=20_000)
    table = read_csv(download(page)[1])
    assert len(table) == 101 and table[0] == ["text", "label", "score"] and all(row[1] for row in table[1:])
    assert len(asked) == 5 and asked[-1][0] - asked[0][0] >= 1
    page.unroute("**/predict")


def test_a_refused_row_does_not_fail_its_neighbours(visit):
    def refuse(route):
        if any("poison" in text for text in route.request.post_data_json["inputs"]):
            route.fulfill(status=422, json={"error": "=This text cannot be read."})
        else:
            route.continue_()

    page = visit()
    page.route("**/predict", refuse)
    results = ask(page, "this is great news!\npoison")
    assert results.locator(".named").all_inner_texts() == ["positive", "failed"]
    upload(page, "text\n" + "so happy\n" * 70 + "poison\n" + "so happy\n" * 20 + "more poison\n")
    page.click("#label")
    table = read_csv(download(page)[1])
    assert [i for i, row in enumerate(table[1:]) if row[3]] == [70, 91]
    assert table[71] == ["poison", "", "", "'=This text cannot be read."]
    assert all(row[1] for i, row in enumerate(table[1:]) if i not in (70, 91))
    page.unroute("**/predict")


def test_a_service_that_goes_is_told_in_a_line(visit):
    page = visit()
    page.route("**/predict", lambda route: route.abort())
    page.fill("#first", "a")
    page.click("#predict")
    page.wait_for_selector("#said.bad")
    assert page.inner_text("#said") == "The service cannot be reached. Is it still running?"
    page.unroute("**/predict")
    page.route("**/predict", lambda route: route.fulfill(status=500, body="<h1>no</h1>"))
    upload(page, "text\na\n")
    page.click("#label")
    page.wait_for_selector("#told.bad")
    assert "status 500" in page.inner_text("#told")
    assert page.inner_text("#label") == "Label 1 row"


def test_a_key_is_asked_for_and_kept_for_the_session(visit):
    def locked(route):
        if route.request.headers.get("authorization") == "Bearer open-sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": "Give a key."})

    def before(page):
        page.route(re.compile(r"/(v1/|info)"), locked)

    page = visit(before, wait=False)
    page.wait_for_selector("#key")
    assert page.evaluate("document.activeElement.id") == "key-value"
    assert page.is_disabled("#predict")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-note")).to_have_text("That key was refused.", timeout=20_000)
    page.fill("#key-value", "open-sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("#predict:enabled")
    assert not page.is_visible("#key")
    assert page.evaluate("document.activeElement.id") == "first"
    assert ask(page, "this is great news!").locator(".named").inner_text() == "positive"
    page.reload()
    page.wait_for_selector("#predict:enabled")
    assert not page.is_visible("#key")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.unroute(re.compile(r"/(v1/|info)"))


# --- look inside ---

FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


def look(page, first, second=""):
    page.check("#tab-inside")
    page.fill("#inside-first", first)
    page.fill("#inside-second", second)
    page.click("#look")
    page.wait_for_selector("#part-pretraining")
    return page.locator("#explored")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_encoder_is_looked_into(visit, address, width):
    page = visit(viewport={"width": width, "height": 844}, has_touch=width < 500, is_mobile=width < 500)
    texts = ["I sat on the bank of the river", "The bank gave me <b>money</b> 😀"]
    found = look(page, *texts)
    expected = asked_of(f"{address}v1/explore", texts)
    assert page.evaluate(FITS)
    assert not page.is_visible("#texts") and not page.is_visible("#file")
    chips = [text.split("\n") for text in found.locator(".chip").all_inner_texts()]
    assert chips == [[token["token"], str(token["id"])] for token in expected["tokens"]["tokens"]]
    assert [heading.lower() for heading in found.locator("h2").all_inner_texts()] == [
        "tokens",
        "embedding tables",
        "architecture",
        "outputs",
        "pretraining tasks",
    ]
    shape = expected["outputs"]["last_hidden_state"]["shape"]
    assert f"last_hidden_state [{', '.join(map(str, shape))}]" in found.locator("h3").all_inner_texts()
    row = (
        found.get_by_role("region", name="last_hidden_state").locator("tbody tr").nth(3).locator("td").all_inner_texts()
    )
    assert [float(cell.replace("\u2212", "-")) for cell in row] == pytest.approx(
        expected["outputs"]["last_hidden_state"]["values"][3], abs=0.006
    )
    assert found.locator("b:not(p > b), img").count() == 0  # texts stay texts
    page.check("#tab-texts")
    assert page.is_visible("#texts") and not page.is_visible("#inside")


def test_maps_are_read_by_keyboard_and_by_touch(visit, address):
    page = visit()
    text = "the river bank"
    found = look(page, text)
    outputs = asked_of(f"{address}v1/explore", text)["outputs"]
    cosines, attention = found.locator(".map").first, found.locator(".map").nth(1)
    cosines.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight"):  # the first one leads to the first cell
        page.keyboard.press(key)
    expect(found.locator(".told").first).to_have_text(f"the and river: {outputs['cosine'][-1][1][2]:.3f}")
    layer = found.locator("input[type=range]").first
    layer.focus()
    page.keyboard.press("Home")
    expect(found.locator(".told").first).to_have_text(f"the and river: {outputs['cosine'][0][1][2]:.3f}")
    assert cosines.get_attribute("aria-label") == "Cosines of tokens behind layer 0"

    small = found.locator(".small-map")
    assert small.count() == 6 * 12
    small.nth(2 * 12 + 5).click()
    assert small.nth(2 * 12 + 5).get_attribute("aria-pressed") == "true"
    assert attention.get_attribute("aria-label") == "Attention in layer 3, head 5"
    box = attention.locator("g rect").nth(2 * 5 + 1).bounding_box()  # row 2, column 1
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    share = 100 * outputs["attention"][2][5][2][1]
    expect(found.locator(".told").nth(1)).to_have_text(f"river looks at the: {share:.1f} %")
    shown = found.locator(".map g rect").nth(25 + 2 * 5 + 1).get_attribute("fill-opacity")
    assert float(shown) == pytest.approx(share / 100, abs=0.001)


def test_looking_inside_says_what_is_wrong(visit):
    page = visit()
    page.check("#tab-inside")
    page.fill("#inside-first", "x" * 100_001)
    page.click("#look")
    expect(page.locator("#inside .status.bad")).to_contain_text("At most 100000 characters")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_inside_is_readable(visit, scheme):
    page = visit(color_scheme=scheme)
    look(page, "I sat on the bank 😀", "The bank gave me money")
    for what in (
        ".chip bdi",
        ".chip small",
        ".about",
        ".part .small",
        ".part td",
        ".part thead th",
        ".part h3",
        ".slider",
    ):
        for i in range(min(60, page.locator(what).count())):
            ink, behind = page.locator(what).nth(i).evaluate(_COLOURS)
            lights = sorted((_light(page, ink), _light(page, behind)))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (what, i)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_explore_needs_nothing_else(browser, demo, tmp_path, width):
    from bertray.display import page as page_of
    from bertray.explorer import explore, plain

    text = "What a wonderful </script><img src=x onerror=document.title='owned'> day 😀"
    found = plain(explore(text, bundle=demo["bundle"]))
    (tmp_path / "page.html").write_bytes(page_of(found))
    context = browser.new_context(viewport={"width": width, "height": 844})
    page, wrong = context.new_page(), []
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("#part-prediction")
    assert wrong == [] and page.title() == "bertray explore"
    assert page.evaluate(FITS) and page.locator("img").count() == 0
    assert page.locator(".text").first.inner_text() == text
    told = found["prediction"]
    assert page.locator(".part .named").inner_text() == told["label"]
    assert page.locator(".bars li").count() >= 3
    chips = page.locator("section:has(#part-prediction) .chips")
    assert chips.first.locator("bdi").all_inner_texts() == [word["text"] for word in told["words"]]
    assert chips.nth(1).locator("bdi").all_inner_texts() == [token["token"] for token in told["tokens"]]
    weight = chips.first.locator("small").first.inner_text().replace("\u2212", "-")
    assert float(weight) == pytest.approx(told["words"][0]["weight"], abs=0.0006)
    nearest = page.get_by_role("region", name="Nearest training texts").locator("tbody tr")
    assert nearest.count() == 5 and told["nearest"][0]["text"] in nearest.first.inner_text()
    context.close()


def test_what_draws_the_inside_is_small():
    files = [STATIC / name for name in ("explore.js", "inside.js", "explore.css")]
    assert sum(file.stat().st_size for file in files) < 32 * 1024
    assert not re.search(r'(src|href)="(/|http)|["`]/v1|innerHTML', "".join(file.read_text("utf-8") for file in files))
