"""What the HTTP API promises, asked of a true service by the clients that people have: OpenAI's, Hugging Face's,
schemathesis, a fuzzer, and sockets for what no client does."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from os import kill

import huggingface_hub
import numpy as np
import openai
import pytest
from conftest import MINILM, demo_rows, serving, wait_until
from fuzz import Fuzzer
from handmade import LABELS, heads_of_every_kind
from test_serve import encoders, metrics

import bertray
from bertray import bundle as bundles
from bertray.heads import LinearHead

_HEADS = ("mood", "topics", "stars", "same", "follows", "entities", "questions")
_CONTEXT = "Anna Berg lives in Oslo with her two cats, and works for a small bank near the harbour."
_TEXTS = ["so happy today", "the bus is late again and i am tired", "", "Grüße aus Köln 🎉", "a" * 40]
_MARKER = "xyzzyplugh"  # in texts that no log may hold
_KEYS = ("key-of-a-file-1", "key-of-a-file-2", "key-of-the-environment")
_STRICT = {"queue": 4, "deadline": 2, "body": 1_000_000, "characters": 3_000, "texts": 500, "cache": 0}
_FRIEND = "https://friend.example"
_OTHER = {"model": "x", "revision": "", "max_length": 9, "truncation": "truncate", "identity": {"weights": ""}} | {
    "precision": "fp32"
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bundles of every kind of head, as NAME/head."""
    folder = tmp_path_factory.mktemp("bundles")
    heads_of_every_kind(folder, demo_rows("train")[::3])
    return folder


@pytest.fixture(scope="module")
def open_service(folder):
    """A service of all those heads for everybody; mood is the default."""
    heads = [f"{name}={folder / name / 'head'}" for name in _HEADS]
    with serving(*heads, "--heads", folder, "--limit", "cache=1000000") as running:  # little, so that much is encoded
        yield running


@pytest.fixture(scope="module")
def strict_service(folder, tmp_path_factory):
    """A service with keys, another site that may call it, and narrow limits."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# two people\n{_KEYS[0]}\n\n  {_KEYS[1]}  \n")
    limits = [part for name, value in _STRICT.items() for part in ("--limit", f"{name}={value}")]
    heads = [f"{name}={folder / name / 'head'}" for name in ("mood", "topics")]
    environment = {"BERTRAY_API_KEYS": f" {_KEYS[2]} ,"}
    with serving(*heads, "--keys", keys, "--cors", _FRIEND, *limits, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def python(folder):
    """A function from a head's name to its predictor."""
    return cache(lambda name: bertray.load(folder / name / "head", "cpu"))


def ask(service, method, path, body=None, key="", **headers):
    """Status, headers and content of an answer. Headers with _ for -."""
    connection = http.client.HTTPConnection(service.address.removeprefix("http://"), timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    kind = answer.headers.get("content-type", "")
    return answer.status, answer.headers, json.loads(content) if kind == "application/json" else content.decode()


def refused(answer, status, kind, *words):
    """Check that an answer is an error of that kind, with a line that holds those words."""
    assert answer[0] == status, answer[2]
    assert set(answer[2]) == {"error", "error_type"}
    assert answer[2]["error_type"] == kind
    assert "\n" not in answer[2]["error"]
    for word in words:
        assert str(word) in answer[2]["error"]


def scored(predictor, texts, pairs=None):
    """What pipelines answer: of each text {label: probability}."""
    _, found = predictor.predict(texts, pairs)
    return [dict(zip(predictor.bundle.labels, row.tolist(), strict=True)) for row in found]


def close(value):
    return pytest.approx(value, abs=1e-4)


# --- OpenAI's client --------------------------------------------------------------------------------------


@pytest.fixture
def ai(open_service):
    with openai.OpenAI(base_url=f"{open_service.address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.parametrize("how", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
@pytest.mark.parametrize("given", [_TEXTS[0], _TEXTS])
def test_openai_embeddings(ai, python, how, given):
    found = ai.embeddings.create(input=given, model=MINILM, **how)
    encoded = python("mood").encoder.encode([given] if isinstance(given, str) else given)
    expected = encoded.vectors / np.linalg.norm(encoded.vectors, axis=1, keepdims=True)
    rows = [row.embedding for row in found.data]
    if how.get("encoding_format") == "base64":  # asked for by name, it is not undone by the client
        import base64

        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert [row.index for row in found.data] == list(range(len(expected)))
    assert {row.object for row in found.data} == {"embedding"}
    assert (found.object, found.model) == ("list", MINILM)
    assert found.usage.prompt_tokens == found.usage.total_tokens == encoded.tokens.sum()


def test_openai_embeddings_of_heads(ai, python):
    """The vectors that a head sees; of one that sees words, its text's."""
    found = ai.embeddings.create(input=_TEXTS, model="entities", encoding_format="float")
    layer4 = bertray.encoder.Encoder(
        bertray.checkpoints.find(MINILM),
        bertray.predict.encoder_spec({**python("mood").bundle.encoder, "layers": [4]}),
    ).encode(_TEXTS)
    expected = layer4.vectors / np.linalg.norm(layer4.vectors, axis=1, keepdims=True)
    np.testing.assert_allclose([row.embedding for row in found.data], expected, atol=1e-5)
    assert (
        ai.embeddings.create(input="word " * 2_000, model="mood").usage.prompt_tokens == 512
    )  # cut, as OpenAI's are not
    assert len(ai.embeddings.create(input="a", model="mood", dimensions=384).data[0].embedding) == 384


@pytest.mark.parametrize(
    ("given", "error", "line"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "There is no head 'gpt-9'"),
        ({"dimensions": 256}, openai.UnprocessableEntityError, "dimensions must be 384"),
        ({"input": []}, openai.UnprocessableEntityError, "a text at least"),
        ({"input": [[1, 2]]}, openai.UnprocessableEntityError, "valid string"),
        ({"encoding_format": "int8"}, openai.UnprocessableEntityError, "encoding_format"),
        ({"input": ["a"] * 1001}, openai.APIStatusError, "At most 1000 texts"),
    ],
)
def test_openai_errors(ai, given, error, line):
    with pytest.raises(error, match=line) as caught:
        ai.embeddings.create(**{"input": "a", "model": "mood", **given})
    assert caught.value.body["message"].startswith(caught.value.body["message"].splitlines()[0])
    assert caught.value.code == caught.value.type


def test_openai_models(ai):
    assert [model.id for model in ai.models.list()] == [MINILM, *_HEADS]


def test_openai_keys(strict_service):
    for key in _KEYS:
        client = openai.OpenAI(base_url=f"{strict_service.address}/v1", api_key=key, max_retries=5)
        assert client.models.list().data[0].id == MINILM
        assert len(client.embeddings.create(input="a", model="mood").data[0].embedding) == 384
    client = openai.OpenAI(base_url=f"{strict_service.address}/v1", api_key="key-of-nobody", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="A key is needed"):
        client.models.list()
    with pytest.raises(openai.AuthenticationError, match="A key is needed"):
        client.embeddings.create(input="a", model="mood")


# --- Hugging Face's client, and text-embeddings-inference ---------------------------------------------------


@pytest.fixture
def hugging(open_service, monkeypatch):
    """A function from a path to a client."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it would not even ask this machine
    return lambda path="": huggingface_hub.InferenceClient(f"{open_service.address}{path}", timeout=60)


@pytest.mark.parametrize("path", ["", "/predict", "/v1/heads/mood"])
def test_hugging_face_classification(hugging, python, path):
    client, (expected, *_) = hugging(path), scored(python("mood"), _TEXTS[:1])
    found = client.text_classification(_TEXTS[0])
    assert {row.label: row.score for row in found} == close(expected)
    assert [row.score for row in found] == sorted(expected.values(), reverse=True)
    (best,) = client.text_classification(_TEXTS[0], top_k=1)
    assert expected[best.label] == max(expected.values())
    raw = client.text_classification(_TEXTS[0], function_to_apply="none")
    (logits,) = python("mood").bundle.head.logits(python("mood").encoder.encode(_TEXTS[:1]).vectors)
    assert {row.label: row.score for row in raw} == close(dict(zip(LABELS, logits.tolist(), strict=True)))
    assert client.text_classification(_TEXTS[0], function_to_apply="softmax") == found
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="function_to_apply 'sigmoid' is not to be had"):
        client.text_classification(_TEXTS[0], function_to_apply="sigmoid")


@pytest.mark.parametrize("name", ["topics", "same", "follows", "stars"])
def test_hugging_face_classification_of_other_heads(hugging, python, name):
    paired = name in ("same", "follows")
    found = hugging(f"/v1/heads/{name}").text_classification(["so happy", "so sad"] if paired else "so happy")
    if name == "stars":
        assert {row.label: row.score for row in found} == {"stars": close(python(name).predict("so happy").labels[0])}
        return
    (expected,) = scored(python(name), ["so happy"], ["so sad"] if paired else None)
    assert {row.label: row.score for row in found} == close(expected)


@pytest.mark.parametrize("text", [_CONTEXT, "Grüße von Anna 🎉 aus Oslo", ""])
def test_hugging_face_words(hugging, python, text):
    found = hugging("/v1/heads/entities").token_classification(text)
    (expected,) = python("entities").predict([text]).labels
    assert [(row.entity_group, row.word, row.start, row.end, row.score) for row in found] == [
        (entity["label"], entity["text"], entity["start"], entity["stop"], close(entity["score"]))
        for entity in expected
    ]
    assert all(row.word == text[row.start : row.end] for row in found)
    assert hugging("/v1/heads/entities").token_classification(text, aggregation_strategy="simple") == found
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="aggregation_strategy 'none'"):
        hugging("/v1/heads/entities").token_classification(text, aggregation_strategy="none")


@pytest.mark.parametrize("question", ["Where does Anna live?", "What colour is the moon on the flag?"])
def test_hugging_face_questions(hugging, python, question):
    found = hugging("/v1/heads/questions").question_answering(question=question, context=_CONTEXT)
    (expected,) = python("questions").predict([question], [_CONTEXT]).labels
    assert (found.answer, found.start, found.end) == (expected["text"], expected["start"], expected["stop"])
    assert found.score == close(expected["score"])
    assert found.answer == _CONTEXT[found.start : found.end]
    assert hugging("/v1/heads/questions").question_answering(question=question, context=_CONTEXT, top_k=1) == found


def test_hugging_face_vectors(hugging, python):
    client = hugging("/embed")
    vectors = python("mood").encoder.encode(_TEXTS).vectors
    np.testing.assert_allclose(client.feature_extraction(_TEXTS, normalize=False), vectors, atol=1e-4)
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(client.feature_extraction(_TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(client.feature_extraction(_TEXTS[0]), expected[:1], atol=1e-5)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="longer than 512 tokens"):
        client.feature_extraction("word " * 600)
    assert client.feature_extraction("word " * 600, truncate=True).shape == (1, 384)


def test_pipelines_have_the_same_form(open_service, minilm):
    """transformers' own pipelines name and nest alike what they answer. (For questions it has none any more.)"""
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
        BertForTokenClassification,
        pipeline,
    )

    tokenizer = AutoTokenizer.from_pretrained(minilm.folder)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    config.num_labels = 3

    def form(content):
        if isinstance(content, dict):
            return {name: form(value) for name, value in content.items()}
        if isinstance(content, list | tuple):
            return [form(content[0])] if content else []
        return float if isinstance(content, float | np.floating) else type(content)

    def theirs(task, model, given, **options):
        return form(pipeline(task, model=model(config), tokenizer=tokenizer)(given, **options))

    def ours(path, given, **parameters):
        return form(ask(open_service, "POST", path, {"inputs": given, "parameters": parameters})[2])

    labels = theirs("text-classification", BertForSequenceClassification, ["a b", "c"], top_k=None)
    assert labels == ours("/", ["a b", "c"]) == ours("/predict", ["a b", "c"])
    words = theirs("token-classification", BertForTokenClassification, _CONTEXT, aggregation_strategy="simple")
    assert words == ours("/v1/heads/entities", _CONTEXT, aggregation_strategy="simple")


def test_text_embeddings_inference(open_service, python):
    expected = scored(python("mood"), _TEXTS)

    def predict(inputs, **more):
        return ask(open_service, "POST", "/predict", {"inputs": inputs, **more})[2]

    def by_label(rows):
        return {row["label"]: row["score"] for row in rows}

    assert by_label(predict(_TEXTS[0])) == close(expected[0])  # flat for one text
    for inputs in (_TEXTS, [[text] for text in _TEXTS]):
        assert list(map(by_label, predict(inputs))) == list(map(close, expected))
    assert predict([]) == []
    logits = python("mood").bundle.head.logits(python("mood").encoder.encode(_TEXTS).vectors)
    for row, own in zip(predict(_TEXTS, raw_scores=True), logits.tolist(), strict=True):
        assert by_label(row) == close(dict(zip(LABELS, own, strict=True)))
    assert [len(row) for row in predict(_TEXTS, top_k=2)] == [2] * len(_TEXTS)
    assert len(predict("word " * 600)) == 3
    long = ask(open_service, "POST", "/predict", {"inputs": "word " * 600, "truncate": False})
    refused(long, 413, "too_large", "longer than 512 tokens")
    status, headers, _ = ask(open_service, "POST", "/predict", {"inputs": "a"})
    assert (status, headers["x-head"], headers["x-head-version"]) == (200, "mood", "1")


def test_several_heads_answer_at_once(open_service, python):
    names = ["mood", "topics", "stars", "entities"]
    found = ask(open_service, "POST", "/predict", {"inputs": _TEXTS, "heads": names})[2]["heads"]
    assert list(found) == names
    for name in names:
        alone = ask(open_service, "POST", f"/v1/heads/{name}/predict", {"inputs": _TEXTS})[2]
        assert found[name] == alone
    assert [row["label"] for row in found["mood"]["predictions"]] == python("mood").predict(_TEXTS).labels
    assert [row["labels"] for row in found["topics"]["predictions"]] == python("topics").predict(_TEXTS).labels
    assert [row["value"] for row in found["stars"]["predictions"]] == close(python("stars").predict(_TEXTS).labels)
    refused(
        ask(open_service, "POST", "/predict", {"inputs": "a", "heads": ["mood", "same"]}), 422, "validation", "pair"
    )
    refused(ask(open_service, "POST", "/predict", {"inputs": "a", "heads": ["mood", "x"]}), 404, "not_found", "'x'")


# --- the document -----------------------------------------------------------------------------------------


def documents(service, key):
    """/openapi.json, with what it cannot tell: names of heads, what the head `mood` takes. What changes heads is apart,
    so that it changes none that are asked."""
    content = ask(service, "GET", "/openapi.json", key=key)[2]
    changes = {path: content["paths"].pop(path) for path in ("/v1/heads/{name}", "/v1/heads/{name}/rollback")}
    name = changes["/v1/heads/{name}"]["put"]["parameters"]
    for route in (route for methods in changes.values() for route in methods.values()):
        route["parameters"] = name
    for route in (route for methods in content["paths"].values() for route in methods.values()):
        for parameter in route.get("parameters", []):
            parameter["schema"] = {"type": "string", "enum": ["mood", "topics"]}
    models = content["components"]["schemas"]
    text = {"type": "string"}
    for name in ("Predict", "PredictHead", "Pipelines", "Explain"):
        fields = models[name]["properties"]
        fields["inputs"]["anyOf"] = [text] if name == "Explain" else [text, {"type": "array", "items": text}]
        if "parameters" in fields:
            known = {"function_to_apply": {"enum": ["none", None]}}
            nulls = {"type": "null"}
            fields["parameters"] = {"type": ["object", "null"], "properties": known, "additionalProperties": nulls}
    models["Predict"]["properties"]["heads"]["anyOf"][0]["items"]["enum"] = ["mood", "topics", "stars"]
    models["Embeddings"]["properties"]["model"]["enum"] = [MINILM, "mood", "entities"]
    models["Embeddings"]["properties"]["dimensions"]["anyOf"][0]["enum"] = [384]
    models["Embeddings"]["properties"]["input"]["anyOf"][1]["minItems"] = 1
    models["Put"]["properties"]["bundle"]["enum"] = ["mood/head", "topics/head", "stars/head"]
    return {"asks": content, "changes": {**content, "paths": changes}}


@pytest.mark.parametrize("keyed", [False, True])
def test_the_service_does_what_its_document_says(open_service, strict_service, tmp_path, keyed):
    """All of schemathesis' checks, on requests that the document allows and on others."""
    service = strict_service if keyed else open_service
    options = ["--url", service.address, "--phases", "examples,coverage,fuzzing", "--generation-deterministic"]
    options += ["--checks", "all", "--max-examples", "3" if keyed else "30", "--no-color", "--request-timeout", "60"]
    if keyed:
        options += ["--header", f"Authorization: Bearer {_KEYS[0]}"]
    for name, content in documents(service, _KEYS[0] if keyed else "").items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(path), *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
        assert int(re.search(r"(\d+) generated", done.stdout)[1]) > {"asks": 200, "changes": 20}[name]
    for head in ask(open_service, "GET", "/v1/heads")[2]["heads"]:
        if head["name"] not in _HEADS:
            assert ask(open_service, "DELETE", f"/v1/heads/{head['name']}")[0] == 204


# --- a fuzzer ---------------------------------------------------------------------------------------------

_ODD = ["\x00", "nul\x00 and \x1f", "שלום עולם", "\u202eabc", "🎉" * 50, "e\u0301" * 30, "漢字かな交じり文"]


def known_requests(python):
    """[(path, body, what says whether an answer is right)] for `Fuzzer`."""
    texts = [*_ODD, *(f"{row['text']} {n}" for n, row in enumerate(demo_rows("test")))]
    texts = [*dict.fromkeys(texts)]
    predictors = {name: python(name) for name in ("mood", "topics", "stars")}
    encoded = predictors["mood"].encoder.encode(texts).vectors
    logits = {name: predictor.bundle.head.logits(encoded) for name, predictor in predictors.items()}
    gaps = np.abs(logits["mood"][:, None] - logits["mood"][None]).max(-1) + 9 * np.eye(len(texts))
    assert gaps.min() > 2e-3  # whose answer it is can be told
    vectors = encoded / np.linalg.norm(encoded, axis=1, keepdims=True)
    found = predictors["mood"].predict(texts).labels
    entities = python("entities").predict(texts).labels
    numbers = {name: dict(zip(texts, rows.tolist(), strict=True)) for name, rows in logits.items()}
    numbers["embed"] = dict(zip(texts, vectors.tolist(), strict=True))
    moods, words = dict(zip(texts, found, strict=True)), dict(zip(texts, entities, strict=True))

    def near(one, other):
        return np.shape(one) == np.shape(other) and bool(np.allclose(one, other, atol=5e-4))

    def scores(rows, labels):
        return [[{row["label"]: row["score"] for row in own}[label] for label in labels] for own in rows]

    def flat(own):
        return lambda answer: near(scores([answer], LABELS), [numbers["mood"][own[0]]])

    def nested(own):
        return lambda answer: near(scores(answer, LABELS), [numbers["mood"][text] for text in own])

    def mood(own):
        def is_right(answer):
            rows = answer["predictions"]
            expected = [numbers["mood"][text] for text in own]
            return near(scores((row["scores"] for row in rows), LABELS), expected) and [
                row["label"] for row in rows
            ] == [moods[text] for text in own]

        return is_right

    def topics(own):
        labels = predictors["topics"].bundle.labels
        return lambda answer: near(
            scores((row["scores"] for row in answer["predictions"]), labels), [numbers["topics"][text] for text in own]
        )

    def stars(own):
        return lambda answer: near(
            [row["value"] for row in answer["predictions"]], [numbers["stars"][text][0] for text in own]
        )

    def embed(own):
        return lambda answer: near(answer, [numbers["embed"][text] for text in own])

    def openai_(own):
        return lambda answer: near([row["embedding"] for row in answer["data"]], [numbers["embed"][t] for t in own])

    def labelled(own):
        def is_right(answer):
            rows = [row["entities"] for row in answer["predictions"]]
            return [[(e["entity_group"], e["start"], e["word"]) for e in row] for row in rows] == [
                [(e["label"], e["start"], e["text"]) for e in words[text]] for text in own
            ]

        return is_right

    requests = []
    raw = {"raw_scores": True}
    for place, text in enumerate(texts):
        several = [texts[(place * 7 + step * 13) % len(texts)] for step in range(1 + place % 6)]
        requests += [
            ("/predict", {"inputs": text, **raw}, flat([text])),
            ("/", {"inputs": text, **raw}, nested([text])),
            ("/predict", {"inputs": several, **raw}, nested(several)),
            ("/v1/heads/mood/predict", {"inputs": several, **raw}, mood(several)),
            ("/v1/heads/topics/predict", {"inputs": several, **raw}, topics(several)),
            ("/v1/heads/stars/predict", {"inputs": several}, stars(several)),
            ("/embed", {"inputs": several}, embed(several)),
            ("/v1/embeddings", {"input": several, "model": "mood"}, openai_(several)),
            ("/v1/heads/entities/predict", {"inputs": several[:2]}, labelled(several[:2])),
        ]
    return requests


def test_ten_thousand_requests_good_and_bad(open_service, python):
    host, port = open_service.address.removeprefix("http://").split(":")
    limits = ask(open_service, "GET", "/info")[2]["limits"]
    fuzzer = Fuzzer((host, int(port)), known_requests(python), limits, seed=0)
    fuzzer.run(10_000, threads=8)
    assert fuzzer.wrong[:10] == []
    assert sum(fuzzer.sent.values()) == 10_000
    assert fuzzer.sent["good"] > 3_000
    assert not any(status >= 500 for status in fuzzer.statuses)
    assert ask(open_service, "POST", "/predict", {"inputs": "so happy"})[0] == 200
    told = "".join(open_service.lines)
    assert not [word for word in ("bug of ours", "Traceback", "never awaited", "an encoder was lost") if word in told]
    found = metrics(open_service.address)
    assert found["bertray_waiting_texts"] == 0
    assert 'bertray_errors_total{kind="internal"}' not in found


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        (b"", 400, "malformed", ["must be JSON, such as"]),
        (b'{"inputs": "a"', 400, "malformed", ["must be JSON"]),
        (b'{"inputs": "\\ud800"}', 400, "malformed", ["surrogate"]),
        (b"[]", 422, "validation", ["The body must be an object such as"]),
        ({"input": "a"}, 422, "validation", ["input is not known here. Known are inputs"]),
        ({}, 422, "validation", ["inputs: Field required"]),
        ({"inputs": 5}, 422, "validation", ['inputs must be "a text" or ["a text", ...]']),
        ({"inputs": ["a", None]}, 422, "validation", ["inputs[1]"]),
        ({"inputs": [["a", "b"]]}, 422, "validation", ["inputs[0]"]),
        ({"inputs": "a", "top_k": 0}, 422, "validation", ["top_k"]),
        ({"inputs": "a", "top_k": True}, 422, "validation", ["top_k"]),
        ({"inputs": "a", "raw_scores": 1}, 422, "validation", ["raw_scores"]),
        ({"inputs": "a", "parameters": {"top_k": True}}, 422, "validation", ["parameters.top_k True"]),
        ({"inputs": ["a"] * 1001}, 413, "too_large", ["At most 1000 inputs", 1001]),
        ({"inputs": "a" * 100_001}, 413, "too_large", ["At most 100000 characters", 100_001]),
        (b'{"inputs": ["' + b"a" * 16_000_000 + b'"]}', 413, "too_large", ["At most 16000000 bytes"]),
    ],
)
def test_refusals_say_what_is_wrong(open_service, body, status, kind, words):
    refused(ask(open_service, "POST", "/predict", body), status, kind, *words)


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"inputs": []}, 422, "validation", ["a list of two. Got a list of 0"]),
        ({"inputs": ["a", "b", "c"]}, 422, "validation", ["Got a list of 3"]),
        ({"inputs": ["a", 1]}, 422, "validation", ["inputs[1]"]),
        ({"inputs": "a", "show": ["prediction"]}, 422, "validation", ["show[0]"]),
        ({"inputs": "a", "show": [1] * 100_000}, 422, "validation", ["show[0]"]),
        ({"inputs": "a", "dims": 0}, 422, "validation", ["dims"]),
        ({"inputs": "a" * 100_001}, 413, "too_large", ["At most 100000 characters"]),
    ],
)
def test_what_cannot_be_looked_into(open_service, body, status, kind, words):
    refused(ask(open_service, "POST", "/v1/explore", body), status, kind, *words)


def test_a_text_is_looked_into_as_in_python(open_service):
    from bertray.explorer import explore, plain

    for inputs in ("I [MASK] cold water", ["the river bank", "a bank 😀"], "", "word " * 600):
        texts = [inputs] if isinstance(inputs, str) else inputs
        status, headers, found = ask(open_service, "POST", "/v1/explore", {"inputs": inputs, "dims": 4})
        expected = json.loads(json.dumps(plain(explore(*texts, model=MINILM, dims=4))))
        assert status == 200 and headers["cache-control"] == "no-store"
        assert {name: found[name] for name in ("texts", "notes", "tokens", "architecture", "pretraining")} == {
            name: expected[name] for name in ("texts", "notes", "tokens", "architecture", "pretraining")
        }
        states = (one["outputs"]["last_hidden_state"]["values"] for one in (found, expected))
        np.testing.assert_allclose(*states, atol=1e-4)
    _, _, found = ask(open_service, "POST", "/v1/explore", {"inputs": "a", "show": ["outputs", "tokens"]})
    assert list(found)[4:] == ["tokens", "outputs"]


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/heads/nobody/predict", 404, "not_found"),
        ("POST", "/v1/heads/nobody/explain", 404, "not_found"),
        ("POST", "/v1/heads/nobody/rollback", 404, "not_found"),
        ("DELETE", "/v1/heads/nobody", 404, "not_found"),
        ("POST", "/v1/heads/mood/rollback", 409, "conflict"),
        ("GET", "/predict", 405, "method_not_allowed"),
        ("PATCH", "/v1/heads/mood", 405, "method_not_allowed"),
        ("GET", "/static/nothing.js", 404, "not_found"),
        ("GET", "/static/api.py", 404, "not_found"),
    ],
)
def test_what_there_is_not(open_service, method, path, status, kind):
    answer = ask(open_service, method, path, {"inputs": "a"} if method == "POST" else None)
    refused(answer, status, kind)
    allowed = {"/predict": "POST", "/v1/heads/mood": "DELETE, POST, PUT"}
    assert answer[1]["allow"] == (allowed[path] if status == 405 else None)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"head": LinearHead(np.zeros((3, 100), np.float32), np.zeros(3, np.float32))}, "is damaged: it cannot answer"),
        ({"features": ("mean_7",)}, "has no mean_7: its layers are 0 (embeddings) to 6"),
        ({"features": ("mean_-1",)}, "has no mean_-1"),
        ({"features": ("cls",)}, "is damaged: it cannot answer"),
        ({"encoder": _OTHER}, "its weights differs"),
        ({"labels": ("a",)}, "is damaged: 1 labels, but weights (3, 384)"),
    ],
)
def test_bundles_that_cannot_answer_are_not_served(open_service, folder, change, line):
    bundles.save(replace(bundles.load(str(folder / "mood" / "head")), **change), str(folder / "broken" / "head"))
    before = ask(open_service, "POST", "/predict", {"inputs": "so happy"})[2]
    answer = ask(open_service, "PUT", "/v1/heads/broken", {"bundle": "broken/head"})
    refused(answer, 422, "validation", line)
    assert str(folder) not in answer[2]["error"]  # where things lie is nobody's business
    assert [head["name"] for head in ask(open_service, "GET", "/v1/heads")[2]["heads"]] == list(_HEADS)
    assert ask(open_service, "POST", "/predict", {"inputs": "so happy"})[2] == before
    assert "an encoder was lost" not in "".join(open_service.lines)


def test_a_list_of_millions_is_refused_at_once(open_service):
    for path in ("/embed", "/predict"):
        begun = time.monotonic()
        name = "heads" if path == "/predict" else "inputs"
        body = b'{"inputs": "a", "%s": [' % name.encode() + b"1," * 7_000_000 + b"1]}"
        refused(ask(open_service, "POST", path, body), 422, "validation", f"{name}[0]: Input should be a valid string")
        assert time.monotonic() - begun < 20  # minutes, if each is looked at


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("times", [1.1, 6])
def test_bodies_over_the_limit(strict_service, chunked, times):
    """Also where a client sends all of it before it listens."""
    data = b'{"inputs": ["' + b"a" * int(_STRICT["body"] * times) + b'"]}'
    body = iter([data[i : i + 50_000] for i in range(0, len(data), 50_000)]) if chunked else data
    connection = http.client.HTTPConnection(strict_service.address.removeprefix("http://"), timeout=60)
    headers = {"Authorization": f"Bearer {_KEYS[0]}"}
    connection.request("POST", "/predict", body, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    refused((answer.status, answer.headers, content), 413, "too_large", "At most 1000000 bytes a request.")
    assert answer.headers["connection"] == "close"


def test_a_body_that_does_not_come(strict_service):
    host, port = strict_service.address.removeprefix("http://").split(":")
    begun = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {_KEYS[0]}\r\nContent-Length: 99\r\n\r\n"
        slow.sendall(head.encode() + b'{"inputs"')
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        refused((answer.status, answer.headers, json.loads(answer.read())), 408, "timeout", "did not come within 2 s")
    assert 1.5 < time.monotonic() - begun < 20


def long_texts(count, kind):
    """Texts that take an encoder long, and that no other test sends."""
    return [f"{kind} {n} " + "lorem ipsum dolor sit amet " * 80 for n in range(count)]


def read_in_vain(service, key, begin):
    """Do something with 400 long texts that nobody waits for to the end: how many of them were encoded."""
    before = metrics_of(service, key)
    begin(json.dumps({"inputs": long_texts(400, str(time.monotonic()))}).encode())
    wait_until(lambda: metrics_of(service, key)["bertray_waiting_texts"] == 0, 30)
    wait_until(lambda: metrics_of(service, key)["bertray_batches_at_work"] == 0, 30)
    return metrics_of(service, key)["bertray_batch_texts_sum"] - before["bertray_batch_texts_sum"]


def metrics_of(service, key):
    lines = ask(service, "GET", "/metrics", key=key)[2].splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_what_is_late_is_told_and_not_encoded(strict_service):
    def begin(body):
        begun = time.monotonic()
        late = ask(strict_service, "POST", "/predict", body, _KEYS[0])
        refused(late, 504, "timeout", "Not answered within 2 s")
        assert time.monotonic() - begun < 20

    assert read_in_vain(strict_service, _KEYS[0], begin) < 380


def test_what_nobody_waits_for_is_not_encoded(open_service):
    host, port = open_service.address.removeprefix("http://").split(":")

    def begin(body):
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            wait_until(lambda: metrics(open_service.address)["bertray_waiting_texts"] > 0, 30)

    assert read_in_vain(open_service, "", begin) < 300
    assert metrics(open_service.address)['bertray_errors_total{kind="gone"}'] >= 1


def test_too_much_at_once(strict_service):
    """Where more waits than may, requests are told to come back, and those that do are answered."""
    texts = long_texts(6, "burst")

    def one(number):
        body = {"inputs": [f"{number} {text}" for text in texts]}
        return ask(strict_service, "POST", "/v1/heads/mood/predict", body, _KEYS[number % 3])

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(32)))
    assert {answer[0] for answer in answers} <= {200, 429, 504}
    busy = [answer for answer in answers if answer[0] == 429]
    assert busy
    for answer in busy:
        refused(answer, 429, "overloaded", "texts wait already. Try again in")
        assert int(answer[1]["retry-after"]) >= 1
    wait_until(lambda: one(99)[0] == 200, 30)


# --- keys, other sites, logs --------------------------------------------------------------------------------


def test_keys(strict_service, open_service):
    for key in _KEYS:
        assert ask(strict_service, "GET", "/v1/heads", key=key)[0] == 200
    for headers in (
        {},
        {"Authorization": "Bearer key-of-nobody"},
        {"Authorization": _KEYS[0]},
        {"Authorization": f"Basic {_KEYS[0]}"},
        {"Authorization": f"Bearer {_KEYS[0]} {_KEYS[1]}"},
        {"Authorization": f"Bearer {_KEYS[0][:-1]}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer # two people"},
        {"Authorization": "Bearer \xff"},
        {"X_API_Key": _KEYS[0]},
    ):
        for method, path in (
            ("POST", "/predict"),
            ("GET", "/v1/heads"),
            ("POST", "/"),
            ("GET", "/metrics"),
            ("GET", "/x"),
        ):
            answer = ask(strict_service, method, path, {"inputs": "a"} if method == "POST" else None, **headers)
            refused(answer, 401, "authentication", "Authorization: Bearer KEY")
            assert answer[1]["www-authenticate"] == "Bearer"
            assert _KEYS[0] not in str(answer)
    for path in ("/", "/health", "/ready", "/static/docs.css"):
        assert ask(strict_service, "GET", path)[0] == 200
    assert ask(strict_service, "GET", "/info", key=_KEYS[0])[2]["keys"] is True
    assert ask(open_service, "GET", "/info")[2]["keys"] is False
    told = ask(strict_service, "GET", "/openapi.json", key=_KEYS[0])[2]
    for path, methods in told["paths"].items():
        for method, route in methods.items():
            is_open = method == "get" and path in ("/", "/health", "/ready")
            assert ("security" in route, "401" in route["responses"]) == (not is_open, not is_open)
    of_openai = told["paths"]["/v1/models"]["get"]["responses"]["401"]["content"]["application/json"]["schema"]
    assert of_openai == {"$ref": "#/components/schemas/OpenAIErrors"}
    assert "securitySchemes" not in ask(open_service, "GET", "/openapi.json")[2]["components"]


def test_pages_of_other_sites(open_service, strict_service):
    body = {"inputs": "a"}
    own = open_service.address
    for headers, status in (
        ({"Sec_Fetch_Site": "same-origin", "Origin": own}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Origin": own}, 200),
        ({}, 200),
        ({"Sec_Fetch_Site": "cross-site", "Origin": "https://evil.example"}, 403),
        ({"Sec_Fetch_Site": "same-site", "Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),  # over plain http browsers tell no more
        ({"Origin": "null"}, 403),
        ({"Origin": "\xff", "Sec_Fetch_Site": "cross-site"}, 403),
    ):
        answer = ask(open_service, "POST", "/predict", body, Content_Type="text/plain", **headers)
        assert answer[0] == status, headers
        assert "access-control-allow-origin" not in answer[1]
        if status == 403:
            refused(answer, 403, "forbidden", "--cors ORIGIN")
    assert ask(open_service, "GET", "/health", Sec_Fetch_Site="cross-site", Origin="https://evil.example")[0] == 200
    refused(ask(open_service, "OPTIONS", "/predict", Access_Control_Request_Method="POST"), 405, "method_not_allowed")
    asking = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    status, headers, _ = ask(strict_service, "OPTIONS", "/predict", Origin=_FRIEND, **asking)
    assert (status, headers["access-control-allow-origin"]) == (200, _FRIEND)
    assert ask(strict_service, "OPTIONS", "/predict", Origin="https://evil.example", **asking)[0] == 400
    status, headers, _ = ask(
        strict_service, "POST", "/predict", body, _KEYS[0], Origin=_FRIEND, Sec_Fetch_Site="cross-site"
    )
    assert (status, headers["access-control-allow-origin"]) == (200, _FRIEND)
    answer = ask(
        strict_service, "POST", "/predict", body, _KEYS[0], Origin="https://evil.example", Sec_Fetch_Site="cross-site"
    )
    refused(answer, 403, "forbidden")
    assert "access-control-allow-origin" not in answer[1]


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:1", 200), ("LOCALHOST", 200), ("evil.example:8000", 403)],
)
def test_names_that_a_site_has_lead_to_this_machine(open_service, strict_service, host, status):
    answer = ask(open_service, "GET", "/v1/heads", Host=host)
    assert answer[0] == status
    if status == 403:
        refused(answer, 403, "forbidden", "for 127.0.0.1, ::1, localhost")
    assert ask(strict_service, "GET", "/v1/heads", key=_KEYS[0], Host=host)[0] == 200  # who has a key is no such page


@pytest.mark.parametrize("path", ["/", "/docs", "/predict", "/nothing", "/health", "/v1/models", "/static/docs.css"])
def test_headers_that_browsers_heed(open_service, path):
    _, headers, _ = ask(open_service, "GET", path)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in headers
    if path in ("/", "/docs"):
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"


def test_no_log_holds_texts_or_keys(open_service, strict_service):
    bodies = [
        {"inputs": _MARKER},
        {"inputs": [_MARKER, 5]},
        {"inputs": _MARKER * 20_000},
        {"inputs": "a", _MARKER: 1},
        {"inputs": "a", "heads": [_MARKER]},
        {"inputs": "a", "parameters": {_MARKER: _MARKER}},
        {"inputs": "word " * 600 + _MARKER, "truncate": False},
        f'{{"inputs": "{_MARKER}'.encode(),
        _MARKER.encode(),
    ]
    for body in bodies:
        for path in ("/predict", f"/v1/heads/{_MARKER}/predict", "/embed", f"/{_MARKER}"):
            assert ask(open_service, "POST", path, body)[0] < 500
        assert ask(strict_service, "POST", "/predict", body, key=_KEYS[0])[0] < 500
        assert ask(strict_service, "POST", "/predict", body, key=_MARKER)[0] == 401
    assert ask(open_service, "PUT", "/v1/heads/x", {"bundle": _MARKER})[0] == 422
    time.sleep(0.5)  # until what is said is read
    for service in (open_service, strict_service):
        told = "".join(service.lines)
        assert "Serving mood" in told
        for secret in (_MARKER, *_KEYS):
            assert secret not in told
    with open(f"/proc/{strict_service.process.pid}/cmdline") as line:
        assert not any(key in line.read() for key in _KEYS)
    assert not any(key in ask(strict_service, "GET", "/metrics", key=_KEYS[0])[2] for key in _KEYS)


def test_no_encoder(strict_service):
    """While encoders are away /ready says so, and requests wait, or are told to come back."""
    (encoder,) = encoders(strict_service.process)
    kill(encoder, signal.SIGKILL)
    seen = []

    def is_away():
        seen.append(ask(strict_service, "GET", "/ready"))
        return seen[-1][0] != 200

    wait_until(is_away, 30)
    refused(seen[-1], 503, "unavailable", "No encoder is ready")
    assert int(seen[-1][1]["retry-after"]) >= 1
    assert ask(strict_service, "GET", "/health")[0] == 200
    answer = ask(strict_service, "POST", "/predict", {"inputs": "while it is away"}, _KEYS[0])
    assert answer[0] in (200, 503, 504)
    wait_until(lambda: ask(strict_service, "GET", "/ready")[0] == 200, 90)
    body = {"inputs": "when it is back"}
    wait_until(lambda: ask(strict_service, "POST", "/predict", body, _KEYS[0])[0] == 200, 60)
