"""The HTTP API of a service: its routes, and what they make of requests. Knows nothing of Ray.

Answers are those of Hugging Face's text-embeddings-inference and pipelines, and of OpenAI for /v1/embeddings, so that
their clients work. Bodies are parsed here and not by the framework, whose way takes longer than encoding a short text.
"""

import asyncio
import base64
import re
import reprlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from bertray import __version__, schemas
from bertray.batcher import Input, Late, Overloaded, Unavailable
from bertray.door import Door, Refused, tell_errors
from bertray.errors import BertrayError, BundleError
from bertray.monitor import Monitor
from bertray.progress import log
from bertray.registry import NAME, Head, Shelf
from bertray.service import Options, Service, TooMuch, Wrong, check_length, inputs_of

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEARD = 16  # times as much as is allowed, before a client is cut off
_GONE = 499  # as nginx logs a client that did not wait; nobody reads it

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


def application(
    service: Service,
    monitor: Monitor,
    told: Mapping[str, Any],
    is_ready: Callable[[], bool],
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> ASGIApp:
    """The ASGI application of a service.

    Args:
        told: what /info tells of the encoder.
        is_ready: whether there is an encoder to answer with.
        keys: one of which every request has to carry, if there are any.
        origins: of other sites whose pages may call it.
        hosts: the names that it may be called by; any, if there are none.
    """
    app = FastAPI(
        title="bertray",
        version=__version__,
        summary="Linear heads on a frozen BERT. A text is encoded once, and any number of heads answer.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to where the Host header says
    )
    api = _Api(service, monitor, told, is_ready, bool(keys))
    api.add_routes(app)
    tell_errors(app)
    schemas.describe(app, bool(keys))
    door: ASGIApp = Door(app, monitor, keys, origins, hosts)
    if origins:
        door = CORSMiddleware(door, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    return door


class _Api:
    def __init__(
        self,
        service: Service,
        monitor: Monitor,
        told: Mapping[str, Any],
        is_ready: Callable[[], bool],
        keyed: bool,
    ) -> None:
        self.service, self.monitor, self.told, self.is_ready, self.keyed = service, monitor, told, is_ready, keyed
        self.limits = service.limits
        batcher = service.batcher
        monitor.gauge("waiting_texts", "texts that wait for an encoder", lambda: batcher.waiting)
        monitor.gauge("batches_at_work", "batches that are being encoded", lambda: batcher.at_work)
        monitor.gauge("ready", "whether there is an encoder", lambda: float(is_ready()))
        monitor.gauge("heads", "heads that are served", lambda: len(service.registry.shelf.heads))

    def add_routes(self, app: FastAPI) -> None:
        """What can be asked, by method and path; `schemas` says what goes in and out."""
        for method, path, handler in (
            ("POST", "/predict", self.predict),
            ("POST", "/", self.predict_as_pipelines),
            ("GET", "/v1/heads", self.heads),
            ("POST", "/v1/heads/{name}", self.predict_head_as_pipelines),
            ("POST", "/v1/heads/{name}/predict", self.predict_head),
            ("POST", "/v1/heads/{name}/explain", self.explain_head),
            ("POST", "/v1/explore", self.explore),
            ("PUT", "/v1/heads/{name}", self.put_head),
            ("DELETE", "/v1/heads/{name}", self.remove_head),
            ("POST", "/v1/heads/{name}/rollback", self.roll_back_head),
            ("POST", "/embed", self.embed),
            ("POST", "/v1/embeddings", self.embeddings),
            ("GET", "/v1/models", self.models),
            ("GET", "/health", self.health),
            ("GET", "/ready", self.ready),
            ("GET", "/info", self.info),
            ("GET", "/metrics", self.metrics),
            ("GET", "/docs", self.docs),
            ("GET", "/", self.page),
            ("GET", "/static/{name}", self.static),
        ):
            shown = schemas.ROUTES.get((method, path))
            app.add_api_route(path, handler, methods=[method], include_in_schema=bool(shown), **(shown or {}))

    # --- prediction ---------------------------------------------------------------------------------------

    async def predict(self, request: Request) -> Response:
        body = await self._body(request, schemas.Predict)
        return await self._predict(request, body, body.heads, nested=body.parameters is not None)

    async def predict_as_pipelines(self, request: Request) -> Response:
        body = await self._body(request, schemas.Predict)
        return await self._predict(request, body, body.heads, nested=True)

    async def predict_head_as_pipelines(self, request: Request, name: str) -> Response:
        self._head(self.service.registry.shelf, name)
        return await self._predict(request, await self._body(request, schemas.Pipelines), name=name, nested=True)

    async def _predict(
        self,
        request: Request,
        body: schemas.Pipelines,
        names: Sequence[str] | None = None,
        *,
        name: str | None = None,
        nested: bool,
    ) -> Response:
        shelf = self.service.registry.shelf
        if names is not None:
            heads = [self._head(shelf, name) for name in dict.fromkeys(names)]
            asked = [
                (head, inputs_of(head.bundle, body.inputs, self.limits)[0], _options(head, body)) for head in heads
            ]
            found = await self._unless_gone(request, _all([self._predictions(shelf, *each) for each in asked]))
            return _json({"heads": {head.name: _told(head, own) for head, own in zip(heads, found, strict=True)}})
        head = self._head(shelf, name)
        inputs, single = inputs_of(head.bundle, body.inputs, self.limits)
        work = self._predictions(shelf, head, inputs, _options(head, body))
        predictions = await self._unless_gone(request, work)
        plain = [_plain(head, prediction) for prediction in predictions]
        whole = head.bundle.task == "text-classification" and nested
        return _json(plain[0] if single and not whole else plain, head)

    async def predict_head(self, request: Request, name: str) -> Response:
        shelf = self.service.registry.shelf
        head = self._head(shelf, name)
        body = await self._body(request, schemas.PredictHead)
        options = Options(body.top_k, body.raw_scores, body.truncate, body.ood)
        inputs, _ = inputs_of(head.bundle, body.inputs, self.limits)
        work = self._predictions(shelf, head, inputs, options)
        return _json(_told(head, await self._unless_gone(request, work)), head)

    async def _predictions(
        self, shelf: Shelf, head: Head, inputs: Sequence[Input], options: Options
    ) -> list[dict[str, Any]]:
        begun = time.perf_counter()
        found = await self.service.predict(shelf, head, inputs, options, self.limits.deadline)
        seconds = time.perf_counter() - begun
        unsure = sum("label" in prediction and prediction["label"] is None for prediction in found)
        self.monitor.predicted(head.name, head.version, len(found), unsure, seconds)
        if options.ood and head.bundle.ood is not None:
            self.monitor.judged(head.name, len(found), sum(prediction["ood"]["outlier"] for prediction in found))
        return found

    async def explain_head(self, request: Request, name: str) -> Response:
        shelf = self.service.registry.shelf
        head = self._head(shelf, name)
        body = await self._body(request, schemas.Explain)
        inputs, single = inputs_of(head.bundle, body.inputs, self.limits)
        if not single:
            raise Refused(422, "One input at a time is explained. Got a list.")
        work = self.service.explain(shelf, head, inputs[0], self.limits.deadline)
        return _json({"head": head.name, "version": head.version, **await self._unless_gone(request, work)}, head)

    async def explore(self, request: Request) -> Response:
        body = await self._body(request, schemas.Explore)
        texts = self._texts(body.inputs, "inputs")
        if len(texts) not in (1, 2):
            raise Refused(422, f"inputs must be a text, or a list of two. Got a list of {len(texts)}.")
        given = Input(texts[0].text, texts[1].text if len(texts) > 1 else None)
        work = self.service.explore(given, body.show, body.dims, self.limits.deadline)
        found = await self._unless_gone(request, work)
        return Response(found, media_type="application/json", headers={"cache-control": "no-store"})

    # --- heads --------------------------------------------------------------------------------------------

    async def heads(self) -> Response:
        registry = self.service.registry
        heads = registry.shelf.heads
        return _json(
            {
                "default": next(iter(heads)),
                "heads": [_card(head, registry.previous(name)) for name, head in heads.items()],
            }
        )

    async def put_head(self, request: Request, name: str) -> Response:
        if not re.fullmatch(NAME, name):
            raise Refused(422, "A head's name is up to 100 letters, digits, dots, dashes and underscores.")
        body = await self._body(request, schemas.Put)
        known = name in self.service.registry.shelf.heads
        try:
            head = await self.service.put(name, body.bundle)
        except (Overloaded, Late, Unavailable):
            raise
        except BundleError as error:
            raise Refused(422, self._without_folder(error)) from None
        except (BertrayError, OSError) as error:
            raise Refused(403, self._without_folder(error)) from None
        log.info("head %s: version %d, %s", name, head.version, head.url)
        return _json(_card(head, self.service.registry.previous(name)), head, 200 if known else 201)

    def _without_folder(self, error: Exception) -> str:
        folder = self.service.folder
        return str(error).replace(f"{folder.url}/", "") if folder else str(error)

    async def remove_head(self, name: str) -> Response:
        self._head(self.service.registry.shelf, name)
        try:
            await self.service.remove(name)
        except BertrayError as error:
            raise Refused(409, str(error)) from None
        log.info("head %s: removed", name)
        return Response(status_code=204)

    async def roll_back_head(self, name: str) -> Response:
        self._head(self.service.registry.shelf, name)
        try:
            head = await self.service.roll_back(name)
        except BertrayError as error:
            raise Refused(409, str(error)) from None
        log.info("head %s: back to version %d", name, head.version)
        return _json(_card(head, self.service.registry.previous(name)), head)

    def _head(self, shelf: Shelf, name: str | None) -> Head:
        head = shelf.head(name)
        if head is None:
            raise Refused(404, f"There is no head {name!r:.110}. GET /v1/heads lists those there are.")
        return head

    # --- embedding ----------------------------------------------------------------------------------------

    async def embed(self, request: Request) -> Response:
        shelf = self.service.registry.shelf
        head = self._head(shelf, None)
        body = await self._body(request, schemas.Embed)
        inputs = self._texts(body.inputs, "inputs")
        work = self.service.embed(shelf, head, inputs, body.normalize, body.truncate, self.limits.deadline)
        vectors, _ = await self._unless_gone(request, work)
        return _json(vectors, head)

    async def embeddings(self, request: Request) -> Response:
        shelf = self.service.registry.shelf
        body = await self._body(request, schemas.Embeddings)
        head = self._head(shelf, None if body.model == self.told["model"] else body.model)
        inputs = self._texts(body.input, "input")
        if not inputs:
            raise Refused(422, "input must hold a text at least.")
        _, features = self.service.embedding(shelf, head)
        work = self.service.embed(shelf, head, inputs, True, True, self.limits.deadline)
        vectors, tokens = await self._unless_gone(request, work)
        if body.dimensions not in (None, vectors.shape[1]):
            raise Refused(
                422,
                f"dimensions must be {vectors.shape[1]}, or left out: these vectors cannot be shortened. "
                f"They are {', '.join(features)}.",
            )
        told: list[Any] = list(vectors)
        if body.encoding_format == "base64":
            told = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        return _json(
            {
                "object": "list",
                "model": body.model,
                "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(told)],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
            head,
        )

    def _texts(self, given: str | list[str], place: str) -> list[Input]:
        texts = [given] if isinstance(given, str) else given
        if len(texts) > self.limits.texts:
            raise TooMuch(f"At most {self.limits.texts} texts a request. Got {len(texts)}: send several requests.")
        for number, text in enumerate(texts):
            check_length(text, f"{place}[{number}]", self.limits)
        return [Input(text) for text in texts]

    async def models(self) -> Response:
        names = [self.told["model"], *self.service.registry.shelf.heads]
        return _json(
            {
                "object": "list",
                "data": [{"id": name, "object": "model", "created": 0, "owned_by": "bertray"} for name in names],
            }
        )

    # --- the service itself -------------------------------------------------------------------------------

    async def health(self) -> Response:
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        if not self.is_ready():
            raise Refused(503, "No encoder is ready.", retry_after="1")
        return _json({"status": "ready"})

    async def info(self) -> Response:
        return _json(
            {
                "version": __version__,
                "encoder": self.told,
                "heads": list(self.service.registry.shelf.heads),
                "limits": vars(self.limits),
                "keys": self.keyed,
            }
        )

    async def metrics(self) -> Response:
        return Response(self.monitor.text(), media_type="text/plain; version=0.0.4")

    async def docs(self, request: Request) -> Response:
        return _page(schemas.page(request.app.openapi(), str(request.base_url).rstrip("/")))

    async def page(self) -> Response:
        return _page(_asset("index.html"))

    async def static(self, name: str) -> Response:
        kind = _TYPES.get(name.rpartition(".")[2])
        if kind is None or not re.fullmatch(r"[a-z]+\.[a-z]+", name):
            raise Refused(404, "There is no such file.")
        return Response(_asset(name), media_type=kind, headers={"cache-control": "no-cache"})

    # --- requests -----------------------------------------------------------------------------------------

    async def _body(self, request: Request, model: type[Model]) -> Model:
        """The body of a request.

        Raises:
            Refused: it is too large (413), too slow (408), no JSON (400), or JSON of another form (422).
        """
        try:
            async with asyncio.timeout(self.limits.deadline):
                data = await self._data(request)
        except TimeoutError:
            raise Refused(
                408, f"The body did not come within {self.limits.deadline:g} s.", connection="close"
            ) from None
        except ClientDisconnect:
            raise Refused(_GONE, "The client has gone.") from None
        try:
            content = orjson.loads(data)
        except ValueError as error:
            raise Refused(400, f"The body must be JSON, such as {schemas.example(model)}: {error}.") from None
        if not isinstance(content, dict):
            raise Refused(422, f"The body must be an object such as {schemas.example(model)}.")
        known = model.model_fields
        unknown = next((name for name in content if name not in known), None)
        if unknown is not None:  # of a million, each would make an error of its own
            raise Refused(422, f"{unknown[:100]} is not known here. Known are {', '.join(known)}.")
        try:
            return model.model_validate(content)
        except ValidationError as error:
            raise Refused(422, _first(error)) from None

    async def _data(self, request: Request) -> bytearray:
        """The bytes of a request. Of too many all are read, within reason, since many clients do not listen before they
        have said what they have to say."""
        data, size, limit = bytearray(), 0, self.limits.body
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                data += part
            elif size > _HEARD * limit:
                break
        if size > limit:
            raise Refused(413, f"At most {limit} bytes a request.", connection="close")
        return data

    async def _unless_gone(self, request: Request, work: Awaitable[T]) -> T:
        """What is awaited, unless the client does not wait for it: then it is not done."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                raise Refused(_GONE, "The client has gone.")
            return task.result()
        finally:
            task.cancel()
            gone.cancel()


async def _all(work: Sequence[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*work))


def _first(error: ValidationError) -> str:
    """The first mistake of a body, in a line. Where a text or a list may stand, it is the one farther inside."""
    found = max(
        error.errors(include_url=False, include_input=False, include_context=False), key=lambda e: len(e["loc"])
    )
    field, *inside = found["loc"]
    return f"{field}{''.join(f'[{part}]' for part in inside if isinstance(part, int))}: {found['msg']}."


def _options(head: Head, body: schemas.Pipelines) -> Options:
    """What a request of text-embeddings-inference asks for, or one of the pipelines in its `parameters`.

    Raises:
        Wrong: the head cannot do that.
    """
    top_k, raw = body.top_k, body.raw_scores
    link = {"single_label": "softmax", "multi_label": "sigmoid"}.get(head.bundle.problem, "none")
    for name, value in (body.parameters or {}).items():
        if value is None:
            continue
        if head.bundle.task == "text-classification":
            if name == "top_k" and type(value) is int and value > 0:
                top_k = value
                continue
            if name == "function_to_apply" and value in ("none", link):
                raw = value == "none"
                continue
        elif name == "aggregation_strategy" and value in ("simple", "first", "average", "max"):
            continue  # words are always labelled whole
        elif name == "top_k" and value == 1:
            continue
        raise Wrong(f"parameters.{name[:100]} {reprlib.repr(value)} is not to be had of the head {head.name}.")
    return Options(top_k, raw, body.truncate)


def _told(head: Head, predictions: list[dict[str, Any]]) -> dict[str, Any]:
    bundle = head.bundle
    return {
        "head": head.name,
        "version": head.version,
        "task": bundle.task,
        "problem": bundle.problem,
        "predictions": predictions,
    }


def _plain(head: Head, prediction: dict[str, Any]) -> Any:
    """What Hugging Face's pipelines answer."""
    if "scores" in prediction:
        return prediction["scores"]
    if "value" in prediction:
        return [{"label": head.bundle.labels[0], "score": prediction["value"]}]
    if "entities" in prediction:
        return prediction["entities"]
    return {name: prediction[name] for name in ("answer", "score", "start", "end")}


def _card(head: Head, previous: Head | None) -> dict[str, Any]:
    bundle = head.bundle
    return {
        "name": head.name,
        "version": head.version,
        "task": bundle.task,
        "problem": bundle.problem,
        "labels": bundle.labels,
        "pairs": bundle.pairs,
        "features": bundle.features,
        "threshold": bundle.threshold,
        "ood": bundle.ood is not None,
        "explain": bundle.task == "text-classification",
        "bundle": "/".join(head.url.rstrip("/").split("/")[-2:]),
        "fingerprint": bundle.fingerprint,
        "previous": previous and previous.version,
    }


def _json(content: Any, head: Head | None = None, status: int = 200) -> Response:
    headers = {"cache-control": "no-store"}
    if head is not None:
        headers |= {"x-head": head.name, "x-head-version": str(head.version)}
    data = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, status, headers, "application/json")


def _asset(name: str) -> bytes:
    try:
        return (resources.files("bertray") / "static" / name).read_bytes()
    except FileNotFoundError:
        raise Refused(404, "There is no such file.") from None


def _page(content: bytes) -> Response:
    return Response(content, media_type="text/html", headers={"content-security-policy": _POLICY})
