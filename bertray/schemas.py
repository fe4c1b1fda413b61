"""What goes in and out of the HTTP API: models of bodies, and their description for /openapi.json and /docs."""

import json
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from bertray.registry import NAME


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


_QUESTION = {
    "type": "object",
    "properties": {"question": {"type": "string"}, "context": {"type": "string"}},
    "required": ["question", "context"],
}
_Inputs = Annotated[
    Any,
    Field(
        description="a text or a list of texts; for heads on pairs a pair or a list of pairs; for heads on questions "
        "{question, context} or a list of those",
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
                },
                _QUESTION,
                {"type": "array", "items": _QUESTION},
            ]
        },
    ),
]
_whole = BeforeValidator(lambda n: int(n) if isinstance(n, float) and n.is_integer() else n)  # 2.0 is one to JSON
_TopK = Annotated[
    Annotated[StrictInt, Field(ge=1), _whole] | None, Field(description="so many labels at most; left out, all of them")
]
_Raw = Annotated[StrictBool, Field(description="logits for probabilities")]
_Truncate = Annotated[
    StrictBool, Field(description="whether texts that are too long may be cut; else they are refused")
]
# The first mistake of a list is enough: each of millions would take longer than all there is to do.
_Strings = Annotated[list[StrictStr], Field(fail_fast=True)]
_Texts = Annotated[StrictStr | _Strings, Field(description="a text or a list of texts")]


class _Asked(_Body):
    inputs: _Inputs
    top_k: _TopK = None
    raw_scores: _Raw = False
    truncate: _Truncate = True

    model_config = ConfigDict(json_schema_extra={"example": {"inputs": "this is great news!"}})


class PredictHead(_Asked):
    ood: StrictBool = Field(False, description="tell how unlike the head's training texts each text is")


class Pipelines(_Asked):
    parameters: dict[str, Any] | None = Field(None, description="as clients of Hugging Face's pipelines send them")


class Predict(Pipelines):
    heads: Annotated[_Strings, Field(min_length=1)] | None = Field(
        None, description="which heads answer; left out, the default one"
    )


class Explain(_Body):
    inputs: _Inputs

    model_config = ConfigDict(json_schema_extra={"example": {"inputs": "this is great news!"}})


class Explore(_Body):
    inputs: StrictStr | _Strings = Field(
        description="a text, or two; [MASK] stands for a word to be guessed",
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
            ]
        },
    )
    show: list[Literal["tokens", "tables", "architecture", "outputs", "pretraining"]] = Field(
        [], description="some of these alone; left out, all of them", fail_fast=True
    )
    dims: Annotated[Annotated[StrictInt, Field(ge=1, le=4096)], _whole] = Field(
        10, description="how many numbers of each vector are given"
    )

    model_config = ConfigDict(json_schema_extra={"example": {"inputs": "I was [MASK]!"}})


class Put(_Body):
    bundle: StrictStr = Field(description="a bundle's folder below that of --heads", max_length=1000)

    model_config = ConfigDict(json_schema_extra={"example": {"bundle": "mood/head"}})


class Embed(_Body):
    inputs: _Texts
    normalize: StrictBool = Field(True, description="to length 1")
    truncate: _Truncate = False

    model_config = ConfigDict(json_schema_extra={"example": {"inputs": "this is great news!"}})


class Embeddings(_Body):
    input: _Texts
    model: StrictStr = Field(description="the encoder's name, or that of a head whose vectors are wanted")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, _whole] | None = Field(
        None, description="vectors cannot be shortened: their own width, or left out"
    )
    user: StrictStr | None = Field(None, description="taken, and not looked at")

    model_config = ConfigDict(json_schema_extra={"example": {"input": "this is great news!", "model": "mood"}})


class Score(_Body):
    label: str
    score: float


class Entity(_Body):
    entity_group: str
    score: float
    word: str
    start: int
    end: int


class Answer(_Body):
    answer: str
    score: float
    start: int
    end: int


class Ood(_Body):
    distance: float = Field(description="of Mahalanobis, to the nearest class")
    threshold: float = Field(description="one in a hundred training texts is farther")
    outlier: bool


class Prediction(_Body):
    """What a head predicts for an input: some of these, by its kind."""

    label: str | None = Field(None, description="null where the head is not sure enough")
    labels: list[str] = Field([], description="of a head with several labels a text")
    scores: list[Score] = Field([], description="the likeliest first")
    value: float = Field(0, description="of a regression")
    entities: list[Entity] = Field([], description="of a head on words; start and end in characters")
    answer: str = Field("", description="of a head on questions; empty for none")
    score: float = 0
    start: int = 0
    end: int = 0
    truncated: bool
    ood: Ood | None = None


class Predictions(_Body):
    head: str
    version: int
    task: str
    problem: str
    predictions: list[Prediction]


class ByHead(_Body):
    heads: dict[str, Predictions]


class Word(_Body):
    text: str
    start: int
    end: int
    weight: float = Field(description="by how much the score falls without it")


class Explanation(_Body):
    head: str
    version: int
    label: str
    score: float
    method: Literal["occlusion"]
    words: list[Word]


class Card(_Body):
    name: str
    version: int
    task: str
    problem: str
    labels: list[str]
    pairs: bool
    features: list[str]
    threshold: float
    ood: bool
    explain: bool
    bundle: str
    fingerprint: str
    previous: int | None


class Cards(_Body):
    default: str
    heads: list[Card]


class Embedding(_Body):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(_Body):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(_Body):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class ModelCard(_Body):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Body):
    object: Literal["list"]
    data: list[ModelCard]


class Status(_Body):
    status: str


class EncoderInfo(_Body):
    model: str
    revision: str
    fingerprint: str
    precision: str


class Info(_Body):
    version: str
    encoder: EncoderInfo
    heads: list[str]
    limits: dict[str, float]
    keys: bool


class Error(_Body):
    error: str
    error_type: str


class OpenAIError(_Body):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrors(_Body):
    error: OpenAIError


OPEN = ("/", "/health", "/ready")  # to GET without a key; and /static/
_Plain = list[Score] | list[Entity] | Answer | list[list[Score]] | list[list[Entity]] | list[Answer]
_REASONS = {
    400: "the body is not JSON",
    401: "a key is needed",
    403: "not allowed",
    404: "there is no such head",
    408: "the body came too slowly",
    409: "there is no such version, or it is the last head",
    413: "more than is allowed; the error says how much that is",
    422: "the body has another form; the error says which",
    429: "too much waits already: try again after Retry-After seconds",
    503: "no encoder is ready: try again after Retry-After seconds",
    504: "not answered in time",
}
_OF_A_TEXT = (400, 403, 404, 408, 413, 422, 429, 503, 504)


def _route(
    summary: str,
    tag: str,
    out: Any = None,
    body: type[BaseModel] | None = None,
    refused: tuple[int, ...] = (),
    **more: Any,
) -> dict[str, Any]:
    error = OpenAIErrors if out in (EmbeddingList, ModelList) else Error
    responses: dict[int, dict[str, Any]] = {
        status: {"model": error, "description": _REASONS[status]} for status in refused
    }
    for status in {429, 503} & {*refused}:
        responses[status]["headers"] = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}
    if isinstance(out, type) and issubclass(out, Response):
        more["response_class"] = out
        responses[200] = {"description": "answered"}
    elif out is not None:
        responses[200] = {"model": out, "description": "answered"}
    route: dict[str, Any] = {"summary": summary, "tags": [tag], "responses": responses, **more}
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        route["openapi_extra"] = {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        }
    return route


_CREATED = {201: {"model": Card, "description": "a new head is served"}}
ROUTES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/predict"): _route(
        "Labels, entities or answers of the default head, or of several",
        "predict",
        _Plain | ByHead,
        Predict,
        _OF_A_TEXT,
    ),
    ("POST", "/"): _route("The same, as Hugging Face's clients ask", "predict", _Plain | ByHead, Predict, _OF_A_TEXT),
    ("POST", "/v1/heads/{name}"): _route(
        "What a head predicts, as Hugging Face's clients ask", "predict", _Plain, Pipelines, _OF_A_TEXT
    ),
    ("POST", "/v1/heads/{name}/predict"): _route(
        "What a head predicts", "predict", Predictions, PredictHead, _OF_A_TEXT
    ),
    ("POST", "/v1/heads/{name}/explain"): _route(
        "How much each word counted for a head's answer", "predict", Explanation, Explain, _OF_A_TEXT
    ),
    ("POST", "/v1/explore"): _route(
        "Tokens, tables, layers and outputs of a text, or of two as a pair",
        "explore",
        dict[str, Any],
        Explore,
        _OF_A_TEXT,
    ),
    ("GET", "/v1/heads"): _route("The heads that are served", "heads", Cards),
    ("PUT", "/v1/heads/{name}"): _route("Serve a bundle under a name from now on", "heads", Card, Put, _OF_A_TEXT),
    ("DELETE", "/v1/heads/{name}"): _route(
        "Serve a head no longer", "heads", None, None, (403, 404, 409), status_code=204
    ),
    ("POST", "/v1/heads/{name}/rollback"): _route("Serve the version before", "heads", Card, None, (403, 404, 409)),
    ("POST", "/embed"): _route("Vectors, as text-embeddings-inference", "embed", list[list[float]], Embed, _OF_A_TEXT),
    ("POST", "/v1/embeddings"): _route("Vectors, as OpenAI", "embed", EmbeddingList, Embeddings, _OF_A_TEXT),
    ("GET", "/v1/models"): _route("What /v1/embeddings takes for a model", "embed", ModelList),
    ("GET", "/health"): _route("Whether the service lives", "service", Status),
    ("GET", "/ready"): _route("Whether it can answer", "service", Status, None, (503,)),
    ("GET", "/info"): _route("What is served, and the limits of requests", "service", Info),
    ("GET", "/metrics"): _route("Counters, as Prometheus reads them", "service", PlainTextResponse),
    ("GET", "/docs"): _route("This, for people", "service", HTMLResponse),
    ("GET", "/"): _route("A page to try it", "service", HTMLResponse),
}
ROUTES["PUT", "/v1/heads/{name}"]["responses"] |= _CREATED
_BODIES = (Pipelines, Predict, PredictHead, Explain, Explore, Put, Embed, Embeddings)


def example(model: type[BaseModel]) -> str:
    """A body of that form."""
    return json.dumps(model.model_config["json_schema_extra"]["example"])  # type: ignore[index]


def describe(app: FastAPI, keyed: bool) -> None:
    """Make /openapi.json tell of the bodies, and of keys where they are needed."""

    @cache
    def openapi() -> dict[str, Any]:
        found = FastAPI.openapi(app)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for model in _BODIES:
            schemas[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
        for name in ("HTTPValidationError", "ValidationError"):  # the framework's own, which is never sent
            schemas.pop(name, None)
        for path, methods in found["paths"].items():
            error = "OpenAIErrors" if path in ("/v1/embeddings", "/v1/models") else "Error"
            for method, route in methods.items():
                told = route["responses"]
                if "HTTPValidationError" in str(told.get("422", "")):
                    del told["422"]
                if keyed and not (method == "get" and path in OPEN):
                    route["security"] = [{"key": []}]
                    told["401"] = {
                        "description": _REASONS[401],
                        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}},
                    }
        (name,) = found["paths"]["/v1/heads/{name}"]["put"]["parameters"]
        name["schema"]["pattern"] = f"^{NAME}$"
        if keyed:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return found

    app.openapi = openapi  # type: ignore[method-assign]


def page(openapi: dict[str, Any], address: str) -> bytes:
    """/docs: what /openapi.json tells, for people who have come to that address."""
    from jinja2 import Environment

    text = (resources.files("bertray") / "templates" / "docs.html").read_text()
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(text)
        .render(address=address, **openapi)
        .encode()
    )
