"""`bertray serve` as a process of its own, over real HTTP: on a real Ray Serve, with encoders that are killed."""

import http.client
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, SIX, demo_rows, read_jsonl, serving, wait_until

import bertray
from benchmarks.processes import titled
from bertray import bundle as bundles
from bertray.errors import BertrayError, BundleError
from bertray.predict import predict_files
from bertray.serve import build, limits_of, named, read_keys
from bertray.service import Limits
from bertray.sources import Columns
from bertray.spec import RaySizes, Source

_LABELS = ["negative", "neutral", "positive"]


def call(url, body=None, method=None, headers=None):
    """Status and content of an answer."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
            return answer.status, json.loads(content) if content else None
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def metrics(address):
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def encoders(process):
    """Processes of encoders below that of a service."""
    return titled(process.pid, "Encoders")


# --- answers ----------------------------------------------------------------------------------------------


def test_one_text_and_a_list(service):
    status, one = call(f"{service.address}/predict", {"inputs": "this is great news!"})
    assert status == 200
    assert [set(answer) for answer in one] == [{"label", "score"}] * 3
    assert one[0]["label"] == "positive"
    assert sum(answer["score"] for answer in one) == pytest.approx(1, abs=1e-5)
    status, several = call(f"{service.address}/predict", {"inputs": list(SIX)})
    assert [answers[0]["label"] for answers in several] == list(SIX.values())
    assert call(f"{service.address}/predict", {"inputs": []}) == (200, [])
    assert call(f"{service.address}/predict", {"inputs": ""})[0] == 200


def test_many_at_once_each_get_their_own_answer(service, demo):
    texts = [row["text"] for row in demo_rows("test")]
    _, probabilities = bertray.load(demo["bundle"]).predict(texts)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: call(f"{service.address}/predict", {"inputs": text})[1], texts))
    scores = [[next(a["score"] for a in answer if a["label"] == name) for name in _LABELS] for answer in answers]
    np.testing.assert_allclose(scores, probabilities, atol=5e-3)  # each process chooses its own precision


@pytest.fixture(scope="module")
def exact(demo, tmp_path_factory):
    """A service of the demo's head in one precision, and its bundle's folder."""
    bundle = bundles.load(demo["bundle"])
    folder = tmp_path_factory.mktemp("exact")
    bundles.save(replace(bundle, encoder={**bundle.encoder, "precision": "fp32"}), str(folder / "head"))
    with serving(f"mood={folder / 'head'}", "--replicas", "1") as running:
        running.bundle = str(folder / "head")
        yield running


def test_a_thousand_texts_get_the_answers_of_batch_prediction(exact, tmp_path, rows_file):
    tweets = SHARED / "tweets" / "test.jsonl"
    if not tweets.exists():  # the demo's rows then
        tweets = rows_file([{"text": row["text"]} for row in demo_rows("train") + demo_rows("test")])
    source = Source(path=str(tweets))
    output = str(tmp_path / "labelled.jsonl")
    predict_files(exact.bundle, source, output, Columns("text"), RaySizes())
    rows = read_jsonl(Path(output))[:1000]
    texts = [row["text"] for row in rows]
    answers, start, sizes = [], 0, (1, 32, 7, 200, 3)
    while start < len(texts):
        size = sizes[len(answers) % len(sizes)]
        _, got = call(f"{exact.address}/v1/heads/mood/predict", {"inputs": texts[start : start + size]})
        answers += got["predictions"]
        start += size
    assert [answer["label"] for answer in answers] == [row["label"] for row in rows]
    scores = [
        [next(a["score"] for a in answer["scores"] if a["label"] == name) for name in _LABELS] for answer in answers
    ]
    np.testing.assert_allclose(scores, [row["probabilities"] for row in rows], atol=1e-6)


def test_a_text_is_encoded_once_for_all_heads_and_remembered(service):
    text = "nobody has asked this before, said the fox"
    before = metrics(service.address)
    body = {"inputs": text, "heads": ["mood", "topics"]}
    status, answer = call(f"{service.address}/predict", body)
    assert status == 200
    assert set(answer["heads"]) == {"mood", "topics"}
    assert answer["heads"]["topics"]["predictions"][0]["scores"][0]["label"] in ("family", "health", "travel", "work")
    call(f"{service.address}/v1/heads/topics/predict", {"inputs": text})
    after = metrics(service.address)
    assert after["bertray_batch_texts_sum"] - before["bertray_batch_texts_sum"] == 1
    assert after['bertray_answers_total{head="topics",version="1"}'] >= 2
    assert after['bertray_requests_total{route="/predict",status="200"}'] >= 1


def test_monitors_ask_for_the_head_alone(service):
    with urllib.request.urlopen(
        urllib.request.Request(f"{service.address}/health", method="HEAD"), timeout=30
    ) as answer:
        assert (answer.status, answer.read()) == (200, b"")


def test_words_that_count(service):
    status, told = call(f"{service.address}/v1/heads/mood/explain", {"inputs": "this is great news! 🎉 truly"})
    assert status == 200
    assert (told["label"], told["method"]) == ("positive", "occlusion")
    assert [word["text"] for word in told["words"]] == ["this", "is", "great", "news", "!", "🎉", "truly"]
    without = call(f"{service.address}/v1/heads/mood/predict", {"inputs": "this is  news! 🎉 truly"})[1]
    score = next(s["score"] for s in without["predictions"][0]["scores"] if s["label"] == "positive")
    assert told["words"][2]["weight"] == pytest.approx(told["score"] - score, abs=1e-4)
    assert call(f"{service.address}/v1/heads/mood/explain", {"inputs": ["a", "b"]})[0] == 422


# --- heads ------------------------------------------------------------------------------------------------


def test_heads_are_put_swapped_rolled_back_and_removed(service):
    url = f"{service.address}/v1/heads/third"
    status, card = call(url, {"bundle": "mood/head"}, "PUT")
    assert (status, card["version"], card["previous"]) == (201, 1, None)
    text = {"inputs": "this is great news!"}
    assert call(f"{url}/predict", text)[1]["predictions"][0]["label"] == "positive"
    status, card = call(url, {"bundle": "other/head"}, "PUT")
    assert (status, card["version"], card["previous"]) == (200, 2, 1)
    answer = call(f"{url}/predict", text)[1]
    assert (answer["version"], answer["predictions"][0]["label"]) == (2, "negative")
    assert call(f"{url}/rollback", b"", "POST")[1]["version"] == 1
    assert call(f"{url}/predict", text)[1]["version"] == 1
    assert call(f"{url}/rollback", b"", "POST")[0] == 409
    card = call(url, {"bundle": "other/head"}, "PUT")[1]
    assert (card["version"], card["previous"]) == (3, 1)
    assert call(f"{url}/rollback", b"", "POST")[1]["version"] == 1, "what was served before"
    assert call(url, method="DELETE") == (204, None)
    assert call(f"{url}/predict", text)[0] == 404
    assert [head["name"] for head in call(f"{service.address}/v1/heads")[1]["heads"]] == ["mood", "topics"]


@pytest.mark.parametrize(
    ("path", "status", "line"),
    [
        ("../mood/head", 403, "below the folder"),
        ("/etc", 403, "below the folder"),
        ("s3://other/head", 403, "below the folder"),
        ("mood/head?endpoint_override=other", 403, "below the folder"),  # in S3 it would lead elsewhere
        ("link/head", 403, "leads out"),
        ("missing/head", 422, "is not a bundle"),
        ("mood", 422, "is not a bundle"),
        ("stranger/head", 422, "another encoder"),
    ],
)
def test_bundles_come_from_the_allowed_folder_and_fit(service, demo, path, status, line, tmp_path):
    if path == "link/head" and not (service.folder / "link").exists():
        (service.folder / "link").symlink_to(Path(demo["bundle"]).parent)
    if path == "stranger/head":
        bundle = bundles.load(demo["bundle"])
        identity = {**bundle.encoder["identity"], "weights": "0" * 64}
        bundles.save(replace(bundle, encoder={**bundle.encoder, "identity": identity}), str(service.folder / path))
    got, answer = call(f"{service.address}/v1/heads/mood", {"bundle": path}, "PUT")
    assert (got, line in answer["error"]) == (status, True), answer
    assert str(service.folder) not in answer["error"]
    assert call(f"{service.address}/v1/heads")[1]["heads"][0]["version"] == 1


def test_requests_never_see_half_of_a_swap(service):
    """While a head is swapped between two bundles, every answer is that of the version it names."""
    url = f"{service.address}/v1/heads/swapped"
    assert call(url, {"bundle": "mood/head"}, "PUT")[0] == 201
    texts, wrong, stop = list(SIX), [], threading.Event()
    answers = Counter()

    def ask(number):
        while not stop.is_set():
            text = f"{texts[number % 6]}"
            status, answer = call(f"{url}/predict", {"inputs": [text, text]})
            if status != 200:
                wrong.append((status, answer))
                continue
            labels = {prediction["label"] for prediction in answer["predictions"]}
            turned = answer["version"] % 2 == 0
            right = SIX[text] in labels
            answers[answer["version"]] += 1
            if len(labels) != 1 or right == turned:
                wrong.append(answer)

    with ThreadPoolExecutor(6) as pool:
        for number in range(6):
            pool.submit(ask, number)
        for swap in range(8):
            time.sleep(0.2)
            call(url, {"bundle": "other/head" if swap % 2 == 0 else "mood/head"}, "PUT")
        stop.set()
    assert not wrong
    assert len(answers) >= 6
    call(url, method="DELETE")


# --- encoders that end, and the end of the service --------------------------------------------------------


@pytest.mark.timeout(240)
def test_a_killed_encoder_comes_back_and_no_request_is_lost(exact, demo):
    texts = [row["text"] for row in demo_rows("test")]
    labels, _ = bertray.load(exact.bundle).predict(texts)
    counts, wrong, stop = Counter(), [], threading.Event()

    def ask(number):
        turn = 0
        while not stop.is_set():
            turn += 1
            place = (number * 31 + turn) % len(texts)
            # A word more, so that the cache does not answer; not enough to turn the label of most.
            status, answer = call(f"{exact.address}/predict", {"inputs": [texts[place], f"word {number} {turn}"]})
            counts[status] += 1
            if status == 200 and answer[0][0]["label"] != labels[place]:
                wrong.append((texts[place], answer))
            if status != 200 and not (status in (429, 503) and "error" in answer):
                wrong.append((status, answer))

    def kill_at_work(turn):
        many = {"inputs": [f"{turn} {number} " + "many words " * 100 for number in range(60)]}
        listed = pool.submit(call, f"{exact.address}/predict", many)
        wait_until(lambda: metrics(exact.address)["bertray_waiting_texts"] > 20, 30)  # it is at work when it ends
        (last,) = encoders(exact.process)
        os.kill(last, signal.SIGKILL)
        wait_until(lambda: encoders(exact.process) not in ([], [last]), 90)
        wait_until(lambda: call(f"{exact.address}/ready")[0] == 200, 90)
        before = counts[200]
        wait_until(lambda: counts[200] > before + 50, 60)
        assert listed.result(60)[0] == 200

    with ThreadPoolExecutor(9) as pool:
        askers = [pool.submit(ask, number) for number in range(8)]
        time.sleep(2)
        # Of a batch that has only just been sent Ray Serve itself finds another encoder, and we are told nothing.
        try:
            for turn in range(5):
                kill_at_work(turn)
                if metrics(exact.address)["bertray_tried_again_total"] > 0:
                    break
        finally:
            stop.set()
        for asker in askers:
            asker.result(60)  # and no connection broke
    assert not wrong
    assert counts[200] > 0.99 * sum(counts.values())
    assert metrics(exact.address)["bertray_tried_again_total"] > 0


@pytest.mark.timeout(240)
def test_at_sigterm_what_is_begun_is_answered(demo):
    with serving(f"mood={demo['bundle']}") as running:
        host = running.address.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request(
            "POST", "/predict", json.dumps({"inputs": [f"number {i} of many words" for i in range(1000)]})
        )
        time.sleep(0.3)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", int(host.rpartition(":")[2])), timeout=5)
        answer = connection.getresponse()
        assert answer.status == 200
        assert len(json.load(answer)) == 1000
        assert running.process.wait(60) == 0


# --- settings ---------------------------------------------------------------------------------------------


def test_names_of_heads(tmp_path):
    head = tmp_path / "mood" / "head"
    assert named([str(head), f"other={head}"]) == {"mood": head.as_uri()[7:], "other": head.as_uri()[7:]}
    with pytest.raises(BertrayError, match="Two heads are called mood"):
        named([str(head), str(head)])
    with pytest.raises(BertrayError, match="cannot be a head's name"):
        named([str(tmp_path / "so so" / "head")])


def test_keys_of_a_file_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BERTRAY_API_KEYS", "one, two")
    (tmp_path / "keys").write_text("# ours\nthree\n\ntwo\n")
    assert read_keys(str(tmp_path / "keys")) == ("one", "two", "three")
    assert read_keys("") == ("one", "two")
    (tmp_path / "none").write_text("# nothing\n")
    with pytest.raises(BertrayError, match="holds none"):
        read_keys(str(tmp_path / "none"))
    with pytest.raises(BertrayError, match="cannot be read"):
        read_keys(str(tmp_path / "missing"))


def test_limits():
    assert limits_of({"queue": "7", "deadline": "0.5", "cache": 0}) == Limits(queue=7, deadline=0.5, cache=0)
    for given, line in (({"x": 1}, "no limit 'x'"), ({"queue": "a"}, "must be a number"), ({"queue": 0}, "at least 1")):
        with pytest.raises(BertrayError, match=line):
            limits_of(given)


def test_a_wrong_bundle_is_told_before_anything_starts(tmp_path, demo):
    with pytest.raises(BundleError, match="is not a bundle"):
        build({"heads": {"mood": str(tmp_path)}})
    with pytest.raises(BertrayError, match="replica is not known"):
        build({"heads": {"mood": demo["bundle"]}, "replica": 2})
