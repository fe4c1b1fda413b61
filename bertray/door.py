"""The door of a service: who may come in, what every answer carries, and how an error is told. Knows nothing of what
is asked."""

import hashlib
import hmac
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bertray import schemas
from bertray.batcher import Late, Overloaded, Unavailable
from bertray.errors import BertrayError, where
from bertray.monitor import Monitor
from bertray.progress import log
from bertray.service import TooMuch, Wrong

_LOOKED_AT = (b"authorization", b"host", b"origin", b"sec-fetch-site")
_KINDS = {
    400: "malformed",
    401: "authentication",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    413: "too_large",
    422: "validation",
    429: "overloaded",
    500: "internal",
    503: "unavailable",
    504: "timeout",
}
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Refused(Exception):
    """A request is answered with an error: status, and a line."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def tell_errors(app: FastAPI) -> None:
    """Make an application answer with a line what it refuses, and what goes wrong."""
    app.add_exception_handler(HTTPException, _as_refused)
    for kind in (Refused, BertrayError, Exception):
        app.add_exception_handler(kind, _as_error)


def _as_refused(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    line = {404: "There is no such path. See /docs.", 405: "This path has no such method. See /docs."}
    refused = Refused(error.status_code, line.get(error.status_code, str(error.detail)))
    if error.status_code == 405:  # the framework tells of one route of the path
        alike = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
        refused.headers = {"allow": ", ".join(sorted({method for route in alike for method in route.methods}))}
    return _error(refused, request.scope["path"])


def _as_error(request: Request, error: Exception) -> Response:
    return _error(_refused(error), request.scope["path"])


def _error(error: Refused, path: str) -> Response:
    kind = _KINDS.get(error.status, "error")
    content: dict[str, Any] = {"error": str(error), "error_type": kind}
    if path.endswith(("/v1/embeddings", "/v1/models")):
        content = {"error": {"message": str(error), "type": kind, "param": None, "code": kind}}
    return Response(orjson.dumps(content), error.status, error.headers, "application/json")


def _refused(error: Exception) -> Refused:
    """The answer to a request that an error ended."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, TooMuch):
        return Refused(413, str(error))
    if isinstance(error, Wrong):
        return Refused(422, str(error))
    if isinstance(error, Overloaded):
        return Refused(429, str(error), retry_after=str(math.ceil(error.seconds)))
    if isinstance(error, Late):
        return Refused(504, str(error))
    if isinstance(error, Unavailable):
        return Refused(503, str(error), retry_after="5")
    log.error("serve: %s: a bug of ours", where(error))
    return Refused(500, "This is a mistake of the service. Its log tells more.")


class Door:
    """What every request passes: who may come in, what is counted, and that an error is told in a line."""

    def __init__(
        self, app: ASGIApp, monitor: Monitor, keys: Sequence[str], origins: Sequence[str], hosts: Sequence[str] = ()
    ) -> None:
        """hosts: the names that it may be called by; any, if there are none."""
        self._app, self._monitor, self._origins, self._hosts = app, monitor, {*origins}, {*hosts}
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # the server leaves the content out
            scope = {**scope, "method": "GET"}
        begun, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            self._check(scope, path)
            await self._app(scope, receive, answer)
        except Exception as error:
            if not status:  # else the framework has told it
                await _error(_refused(error), path)(scope, receive, answer)
        if status >= 400:
            self._monitor.refused(_KINDS.get(status, "gone"))
        route = getattr(scope.get("route"), "path", "none")
        self._monitor.answered(route, status, time.perf_counter() - begun)

    def _check(self, scope: Scope, path: str) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in _LOOKED_AT}
        if self._hosts and self._is_misnamed(headers.get(b"host", "")):
            raise Refused(403, f"This service is for {', '.join(sorted(self._hosts))}. For other names give it --keys.")
        if scope["method"] not in ("GET", "HEAD") and self._is_foreign(headers):
            raise Refused(403, "Pages of other sites may not call this service. Allow them with --cors ORIGIN.")
        if not self._keys or (path in schemas.OPEN and scope["method"] == "GET") or path.startswith("/static/"):
            return
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        right = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, whichever it is
        if scheme.lower() != "bearer" or not any(right):
            raise Refused(401, "A key is needed: send the header Authorization: Bearer KEY.", www_authenticate="Bearer")

    def _is_misnamed(self, host: str) -> bool:
        """Whether it is called by a name that a site may have pointed at this machine."""
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        return bool(name) and name not in self._hosts

    def _is_foreign(self, headers: Mapping[bytes, str]) -> bool:
        """Whether a page of another site calls, that may not. Browsers tell, but over plain http only whose page it is
        (as Go's http.CrossOriginProtection)."""
        origin, site = headers.get(b"origin", ""), headers.get(b"sec-fetch-site")
        if {origin, "*"} & self._origins:
            return False
        if site is not None:
            return site in ("cross-site", "same-site")
        return bool(origin) and origin.partition("://")[2] != headers.get(b"host")
