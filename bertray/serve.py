"""Serving: a bundle over HTTP on Ray Serve. `POST /predict` labels one text or a list."""

import asyncio
import json
import logging
import socket
import time
from typing import Any

from bertray import bundle as bundles
from bertray.cluster import connected
from bertray.errors import BertrayError
from bertray.predict import Predictor, checkpoint_of
from bertray.spec import RaySizes
from bertray.storage import Location

MAX_BATCH = 64
MAX_INPUTS = 1_000
MAX_CHARACTERS = 1_000_000


def application(bundle_url: str, threads: int = 0, num_cpus: float = 1, num_gpus: float = 0) -> Any:
    """A Ray Serve application that answers with a bundle.

    POST /predict takes {"inputs": TEXT}, {"inputs": [TEXT, ...]} or, for pairs, {"inputs": [[TEXT, PAIR], ...]}
    and answers as Hugging Face's text-embeddings-inference does: [{"label", "score"}, ...] by falling score for
    one input, a list of such lists for a list. GET /health and /info tell that it is up and what it serves.
    """
    from fastapi import FastAPI, Request
    from ray import serve

    from bertray import __version__

    bundles.load(bundle_url)  # a wrong path shows here, not in a replica
    bundle_url = Location(bundle_url).url  # replicas have another working folder
    app = FastAPI(title="bertray", version=__version__)

    @serve.deployment(
        name="bertray",
        num_replicas=1,
        max_ongoing_requests=4 * MAX_BATCH,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
    )
    @serve.ingress(app)
    class Service:
        def __init__(self) -> None:
            self.predictor = Predictor(bundles.load(bundle_url), threads=threads)

        @app.post("/predict")
        async def predict(self, request: Request) -> Any:
            inputs, single = parse(await request.body(), self.predictor.bundle.pairs)
            answers = await self.label(inputs)
            return answers[0] if single else answers

        @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0)
        async def label(self, requests: list[list[Any]]) -> list[list[Any]]:
            """Answers to requests of one or more inputs each, encoded together and beside the event loop."""
            inputs = [item for request in requests for item in request]
            answers = iter(await asyncio.to_thread(answer, self.predictor, inputs))
            return [[next(answers) for _ in request] for request in requests]

        @app.get("/health")
        async def health(self) -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/info")
        async def info(self) -> dict[str, Any]:
            bundle = self.predictor.bundle
            return {
                "task": bundle.task,
                "labels": bundle.labels,
                "encoder": bundle.encoder["model"],
                "features": bundle.features,
                "pairs": bundle.pairs,
                "fingerprint": bundle.fingerprint,
            }

    return Service.bind()  # type: ignore[attr-defined]


def answer(predictor: Predictor, inputs: list[Any]) -> list[Any]:
    """For each input what Hugging Face's pipelines answer: labels with their scores, the likeliest first; entities; or
    the answer to a question."""
    bundle = predictor.bundle
    texts = [item[0] for item in inputs] if bundle.pairs else inputs
    pairs = [item[1] for item in inputs] if bundle.pairs else None
    labels, probabilities = predictor.predict(texts, pairs)
    if probabilities is not None:
        names = bundle.labels
        return [[{"label": names[i], "score": float(row[i])} for i in row.argsort()[::-1]] for row in probabilities]
    return [_plain(bundle.labels, label) for label in labels]


def _plain(names: tuple[str, ...], found: Any) -> Any:
    if isinstance(found, list):
        return [
            {
                "entity_group": entity["label"],
                "score": entity["score"],
                "word": entity["text"],
                "start": entity["start"],
                "end": entity["stop"],
            }
            for entity in found
        ]
    if isinstance(found, dict):
        return {"answer": found["text"], "score": found["score"], "start": found["start"], "end": found["stop"]}
    return [{"label": names[0], "score": found}]


def parse(body: bytes, pairs: bool) -> tuple[list[Any], bool]:
    """The inputs of a request's body as a list, and whether it was a single one.

    Raises:
        HTTPException: 400 for what is not JSON, 422 for JSON of another form, 413 for too much of it.
    """
    from fastapi import HTTPException

    one = '["a text", "its pair"]' if pairs else '"a text"'
    try:
        content = json.loads(body)
    except ValueError:
        raise HTTPException(400, f'The body must be JSON such as {{"inputs": {one}}}.') from None
    inputs = content.get("inputs") if isinstance(content, dict) else None
    if pairs:  # questions, as Hugging Face's pipelines take them
        inputs = list(map(_as_pair, inputs)) if isinstance(inputs, list) else _as_pair(inputs)
    single = _is_input(inputs, pairs)
    listed = [inputs] if single else inputs
    if not isinstance(listed, list) or not all(_is_input(item, pairs) for item in listed):
        raise HTTPException(422, f'The body must be {{"inputs": {one}}} or {{"inputs": [{one}, ...]}}.')
    if len(listed) > MAX_INPUTS:
        raise HTTPException(413, f"At most {MAX_INPUTS} inputs a request. Got {len(listed)}.")
    if sum(len(text) for item in listed for text in (item if pairs else [item])) > MAX_CHARACTERS:
        raise HTTPException(413, f"At most {MAX_CHARACTERS} characters a request.")
    return listed, single


def _as_pair(item: Any) -> Any:
    asked = isinstance(item, dict) and {"question", "context"} <= {*item}
    return [item["question"], item["context"]] if asked else item


def _is_input(item: Any, pairs: bool) -> bool:
    """Whether it is one text, or one pair of texts, that can be encoded."""
    texts = item if pairs else [item]
    return (
        isinstance(texts, list)
        and len(texts) == (2 if pairs else 1)
        and all(isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text) for text in texts)
    )


def run(bundle_url: str, host: str, port: int, sizes: RaySizes) -> None:
    """Serve a bundle on Ray until interrupted.

    Raises:
        BertrayError: there is no such bundle, or the port is taken.
    """
    checkpoint_of(bundles.load(bundle_url))  # what is wrong shows before Ray starts
    _check_port(host, port)
    with connected(sizes):
        _serve(bundle_url, host, port)


def _serve(bundle_url: str, host: str, port: int) -> None:
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    total = ray.cluster_resources()
    cpus, gpus = max(1, int(total.get("CPU", 1))), int(total.get("GPU", 0))
    app = application(bundle_url, threads=min(4, cpus), num_cpus=0.5, num_gpus=1 if gpus else 0)
    serve.start(http_options={"host": host, "port": port})
    serve.run(app, name="bertray", route_prefix="/")
    print(
        f"Serving {bundle_url} at http://{host}:{port}/predict (Ctrl-C stops it). Try:\n"
        f'  curl http://{host}:{port}/predict -d \'{{"inputs": "so happy"}}\'',
        flush=True,
    )
    try:
        while True:
            time.sleep(3600)
    finally:
        serve.delete("bertray")


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise BertrayError(f"Cannot listen on {host}:{port}: {error}. Give another --host or --port.") from None
