"""Every family of encoders from a look inside to a served answer: tiny random checkpoints, the whole way."""

import json
import urllib.request

import numpy as np
import pytest
from conftest import serving
from families import FAMILIES, build

import bertray
from bertray.explorer import plain

ROWS = [
    {"id": str(i), "text": text, "label": label}
    for i, (text, label) in enumerate(
        [
            ("great happy today", "good"),
            ("the water is great", "good"),
            ("everyone is happy", "good"),
            ("a glass of cold water", "good"),
            ("lost his keys", "bad"),
            ("sad about it all", "bad"),
            ("he felt sad again", "bad"),
            ("lost all her money", "bad"),
        ]
        * 8
    )
]
ASKED = ["happy water", "sad keys", "The café by the river", ""]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    """A tiny random checkpoint of a family, in a folder."""
    return build(request.param, tmp_path_factory.mktemp("families") / request.param)


def ask(address, path, body):
    request = urllib.request.Request(f"{address}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_a_family_is_explored_embedded_fitted_and_served(checkpoint, ray_cluster, rows_file, tmp_path):
    from bertray import checkpoints
    from bertray.encoder import Encoder
    from bertray.spec import Encoder as EncoderSpec

    spec = {
        "data": {"train": {"path": rows_file(ROWS)}},
        "encoder": {"model": str(checkpoint), "pooling": "mean", "precision": "fp32", "max_length": 64},
        "output": str(tmp_path / "run"),
    }
    summary = bertray.run(spec)
    assert summary["rows"]["train"]["rows"] == len(ROWS)
    predictor = bertray.load(summary["bundle"])
    expected = predictor.predict(ASKED)

    seen = bertray.explore(ASKED[2], model=str(checkpoint), dims=0)
    mean = next(pooling for pooling in seen["outputs"]["poolings"] if pooling["name"] == "mean")
    encoder = Encoder(checkpoints.find(str(checkpoint)), EncoderSpec(pooling="mean", precision="fp32", max_length=64))
    np.testing.assert_allclose(mean["values"], encoder.encode(ASKED[2:3]).vectors[0], atol=1e-4)

    explained = bertray.explore(ASKED[2], bundle=summary["bundle"], show=["prediction"])["prediction"]
    assert explained["label"] == expected.labels[2]
    assert explained["nearest"][0]["cosine"] <= 1 and len(explained["nearest"]) == 5

    with serving(summary["bundle"]) as service:
        found = ask(service.address, "/predict", {"inputs": ASKED})
        for scores, probabilities in zip(found, expected.probabilities, strict=True):
            served = {score["label"]: score["score"] for score in scores}
            assert [served[label] for label in predictor.bundle.labels] == pytest.approx(probabilities, abs=1e-4)
        looked = ask(service.address, "/v1/explore", {"inputs": ASKED[2], "dims": 32})
        assert looked["tokens"] == json.loads(json.dumps(plain(seen["tokens"])))
        np.testing.assert_allclose(
            looked["outputs"]["last_hidden_state"]["values"], seen["outputs"]["last_hidden_state"]["values"], atol=1e-4
        )
