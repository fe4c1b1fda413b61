"""Real HTTP against a real Ray Serve."""

import json
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import SIX, demo_rows

import bertray
from bertray import serve as serving
from bertray.errors import BundleError


@pytest.fixture(scope="module")
def server(demo, ray_cluster):
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(serving.application(demo["bundle"], threads=2, num_cpus=0.5), name="bertray", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def call(url, body=None):
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_one_text_and_a_list(server):
    status, one = call(f"{server}/predict", {"inputs": "this is great news!"})
    assert status == 200
    assert [set(answer) for answer in one] == [{"label", "score"}] * 3
    assert one[0]["label"] == "positive"
    assert sum(answer["score"] for answer in one) == pytest.approx(1, abs=1e-5)
    status, several = call(f"{server}/predict", {"inputs": list(SIX)})
    assert [answers[0]["label"] for answers in several] == list(SIX.values())
    assert call(f"{server}/predict", {"inputs": []}) == (200, [])
    assert call(f"{server}/predict", {"inputs": ""})[0] == 200


def test_many_at_once_each_get_their_own_answer(server, demo):
    texts = [row["text"] for row in demo_rows("test")]
    labels, probabilities = bertray.load(demo["bundle"]).predict(texts)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: call(f"{server}/predict", {"inputs": text})[1][0], texts))
    np.testing.assert_allclose([answer["score"] for answer in answers], probabilities.max(1), atol=2e-3)
    sure = probabilities.max(1) > 0.51
    assert np.mean([a["label"] == b for a, b in zip(answers, labels, strict=True)] | ~sure) == 1


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "must be JSON"),
        (b"\xff", 400, "must be JSON"),
        ({"inputs": 5}, 422, 'must be {"inputs": "a text"}'),
        ({"texts": "a"}, 422, "must be"),
        ([], 422, "must be"),
        ({"inputs": ["a", None]}, 422, "must be"),
        ({"inputs": [["a", "b"]]}, 422, "must be"),
        ({"inputs": "\ud800"}, 422, "must be"),
        ({"inputs": ["a"] * 1001}, 413, "At most 1000 inputs"),
        ({"inputs": "a" * 1_000_001}, 413, "At most 1000000 characters"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(server, body, status, message):
    got, answer = call(f"{server}/predict", body)
    assert got == status
    assert message in answer["detail"]


def test_health_and_info(server, demo):
    assert call(f"{server}/health") == (200, {"status": "ok"})
    info = call(f"{server}/info")[1]
    assert info["labels"] == ["negative", "neutral", "positive"]
    assert call(f"{server}/nothing")[0] == 404


def test_requests_for_heads_on_pairs():
    assert serving.parse(b'{"inputs": ["a", "b"]}', pairs=True) == ([["a", "b"]], True)
    assert serving.parse(b'{"inputs": [["a", "b"], ["c", "d"]]}', pairs=True) == ([["a", "b"], ["c", "d"]], False)


def test_a_wrong_bundle_is_told_before_anything_starts(tmp_path):
    with pytest.raises(BundleError, match="is not a bundle"):
        serving.application(str(tmp_path))
