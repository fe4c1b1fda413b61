"""A fuzzer of HTTP APIs: good requests whose answers are known, among all kinds of bad ones, over many connections.

A seed says what is sent, byte by byte; only how the threads meet in the service is left to chance.
"""

import json
import random
import socket
import threading
from collections import Counter
from http.client import HTTPException, HTTPResponse

_SECONDS = 30  # in which any answer has to be there
_SCALARS = [None, True, False, 0, -1, 1, 1.5, 10**18, "", "a", "\x00", "🎉", [], {}, [[]], [None], ["a", 1], {"a": "b"}]
_SCALARS += [[["a", "b"]], {"question": "a", "context": "b"}, {"question": 1, "context": []}, ["a"] * 3, [{}], "\u202e"]
_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-0", "9" * 400, "0x10", "1_000", "01", "1.", ".5", "1e-999"]
_STRINGS = [
    rb'"\ud800"',
    rb'"\udc00\ud800"',
    rb'"\u0000"',
    b'"\x00"',
    b'"\x1f"',
    b'"\xff\xfe"',
    b'"\xc0\xaf"',
    b'"\xed\xa0\x80"',
]
_STRINGS += [rb'"\x41"', rb'"\u12"', b'"', b"'a'", b'"\n"', b'"\xf4\x90\x80\x80"', b'"a']
_TYPES = [
    "text/plain",
    "application/xml",
    "multipart/form-data",
    "application/x-www-form-urlencoded",
    "a",
    "\xe4;;=",
    "*",
]
_HEADERS = [
    b"Authorization: Bearer \xff\xfe", b"Authorization:", b"Origin: \xff", b"Origin: http://[", b"Sec-Fetch-Site: \xff",
    b"Accept: \xe2\x82\xac", b"Cookie: " + b"a=b;" * 2_000, b"X-Long: " + b"y" * 30_000, b"Content-Encoding: gzip",
    b"Range: bytes=0-1", b"If-None-Match: *", b"Expect: 100-continue", b"Expect: nothing", b"X-Forwarded-For: ::::",
    b"Forwarded: for=\"", b"Accept-Language: " + b"x," * 500, b"Upgrade: h2c", b"Upgrade: websocket", b"TE: trailers",
    b"X-HTTP-Method-Override: DELETE", b"Sec-Fetch-Site: cross-site", b"Host: [",
    b"Content-Type: application/json; charset=utf-7", b"Via: \x7f",
]  # fmt: skip
_METHODS = ["HEAD", "OPTIONS", "TRACE", "PATCH", "PUT", "DELETE", "LINK", "PROPFIND", "M-SEARCH", "GET", "QUERY"]
_PATHS = [
    "/", "/predict", "/embed", "/v1/embeddings", "/v1/models", "/v1/heads", "/v1/heads/mood", "/v1/heads/mood/predict",
    "/v1/heads/mood/explain", "/health", "/ready", "/info", "/metrics", "/docs", "/openapi.json",
    "/static/app.js", "/v1/explore",
]  # fmt: skip
_LOST = [
    "/v1/heads/nobody/predict", "/v1/heads/%00/predict", "/v1/heads/%ff%fe/explain", "/v1/heads/..%2f..%2fetc/predict",
    "/static/..%2fapi.py", "/static/%2e%2e/api.py", "/static/nothing.js", "//predict", "/%70%72edict/x", "/v1//heads/x",
    "/v1/heads/mood%2fpredict/predict", "/predict%00", "/v1/heads/%F0%9F%8E%89", "/?a=%", "/.env",
    "/v1/heads/mood%0a/predict",
    "/v1/heads/" + "n" * 9_000 + "/predict", "/" + "%25" * 3_000, "/;a=b", "/predict;jsessionid=1", "/*",
    "/v1/heads//predict",
]  # fmt: skip
_GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\r\n" * 10 + b"x",
    b"GET / HTTP/9.9\r\n\r\n", b"GET  /  HTTP/1.1\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"\x00" * 100 + b"\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nA\x00b: c\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", b"GET / HTTP/1.1\r\n folded: x\r\n\r\n",
    b"CONNECT a:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /ä HTTP/1.1\r\nHost: x\r\n\r\n".encode(), b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
]  # fmt: skip


class Fuzzer:
    """Sends requests and looks at what comes back."""

    def __init__(self, address, good, limits, seed):
        """
        Args:
            address: (host, port).
            good: [(path, body, what says whether the content of its answer is right)].
            limits: of /info.
        """
        self.address, self.good, self.limits, self.seed = address, good, limits, seed
        self.sent, self.statuses, self.wrong = Counter(), Counter(), []
        self._lock = threading.Lock()

    def run(self, requests, threads):
        """Send so many requests; `wrong` holds what should not have been."""
        each = [threading.Thread(target=self._run, args=(n, requests // threads), daemon=True) for n in range(threads)]
        for thread in each:
            thread.start()
        for thread in each:
            thread.join()

    def _run(self, number, requests):
        rng, wire = random.Random(f"{self.seed} {number}"), _Wire(self.address)
        kinds = [name.removeprefix("_send_") for name in sorted(dir(self)) if name.startswith("_send_")]
        rare = {"too_much": 0.2, "half": 1.0, "long": 0.2, "garbage": 1.0}
        weights = [rare.get(kind, 12.0 if kind == "good" else 2.0) for kind in kinds]
        for _ in range(requests):
            (kind,) = rng.choices(kinds, weights)
            if rng.random() < 0.15:
                wire.close()
            told = b""
            try:
                told, reason, status = getattr(self, f"_send_{kind}")(rng, wire)
            except TimeoutError:
                reason, status = f"no answer in {_SECONDS} s", 0
                wire.close()
            except (OSError, HTTPException, ValueError) as error:
                reason, status = repr(error), 0
                wire.close()
            with self._lock:
                self.sent[kind] += 1
                self.statuses[status] += 1
                if reason:
                    self.wrong.append((kind, reason, told[:400]))
        wire.close()

    # --- kinds of requests, each of which gives (what was sent, what is wrong with the answer, status) ------------

    def _send_good(self, rng, wire):
        path, body, is_right = rng.choice(self.good)
        data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode()
        if rng.random() < 0.1:
            path = "".join(f"%{ord(c):02x}" if c.isalpha() and rng.random() < 0.3 else c for c in path)
        headers = [rng.choice([b"Content-Type: application/json", b"X-Nothing: 1", b"Accept: */*"])]
        message = _message("POST", path, data, headers, rng if rng.random() < 0.2 else None)
        status, content, _ = wire.ask(message, rng=rng if rng.random() < 0.1 else None)
        if status != 200:
            return message, f"{status} {content[:300]!r}", status
        return message, "" if is_right(json.loads(content)) else f"the answer of another: {content[:300]!r}", status

    def _send_mutated(self, rng, wire):
        path, body, _ = rng.choice(self.good)
        data = bytearray(json.dumps(body).encode())
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(data) + 1)
            change = rng.random()
            if change < 0.3:
                data[place:place] = rng.randbytes(rng.randint(1, 4))
            elif change < 0.6:
                del data[place : place + rng.randint(1, 8)]
            elif change < 0.8:
                data[place : place + 1] = bytes([rng.choice(b'{}[]",:\\0-etrufalsn \n')])
            else:
                data = data[:place] + data[rng.randrange(len(data) + 1) :]
        return self._told(wire, _message("POST", path, bytes(data)), {200, 400, 404, 413, 422})

    def _send_wrong_types(self, rng, wire):
        path, body, _ = rng.choice(self.good)
        body = dict(body)
        for _ in range(rng.randint(1, 3)):
            names = [*body, "top_k", "raw_scores", "truncate", "heads", "parameters", "ood", "normalize", "model", "x"]
            body[rng.choice(names)] = rng.choice(_SCALARS)
        data = json.dumps(rng.choice([body, body, body, *_SCALARS])).encode()
        return self._told(wire, _message("POST", path, data), {200, 400, 404, 413, 422})

    def _send_deep(self, rng, wire):
        depth, kind = rng.choice([5, 100, 900, 1_020, 5_000, 100_000]), rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
        inner = kind[0] * depth + b"1" + kind[1] * (depth if rng.random() < 0.8 else depth - 1)
        key = rng.choice([b'"inputs"', b'"parameters"', b'"heads"', b'"inputs":"a","parameters":{"top_k"'])
        data = b"{" + key + b":" + inner + (b"}}" if b"{" in key else b"}")
        return self._told(wire, _message("POST", _path(rng), rng.choice([data, inner])), {400, 404, 405, 422})

    def _send_numbers_and_strings(self, rng, wire):
        value = rng.choice([*(number.encode() for number in _NUMBERS), *_STRINGS])
        form = rng.choice(
            [b'{"inputs":%s}', b'{"inputs":["a",%s]}', b'{"inputs":"a","top_k":%s}', b'{"inputs":"a",%s:1}', b"%s"]
        )
        return self._told(wire, _message("POST", _path(rng), form.replace(b"%s", value)), {200, 400, 404, 405, 422})

    def _send_empty(self, rng, wire):
        data = rng.choice([b"", b" ", b"{}", b"[]", b"null", b'""', b"\xef\xbb\xbf{}", b'{"inputs":null}', b"\x00"])
        return self._told(wire, _message("POST", _path(rng), data), {400, 404, 405, 422})

    def _send_content_type(self, rng, wire):
        path, body, is_right = rng.choice(self.good)
        header = b"Content-Type: " + rng.choice(_TYPES).encode("latin-1")
        message = _message("POST", path, json.dumps(body).encode(), [header])
        status, content, _ = wire.ask(message)  # it is not looked at
        right = status == 200 and is_right(json.loads(content))
        return message, "" if right else f"{status} {content[:300]!r}", status

    def _send_headers(self, rng, wire):
        path, body, is_right = rng.choice(self.good)
        headers = rng.sample(_HEADERS, rng.randint(1, 3))
        message = _message("POST", path, json.dumps(body).encode(), headers)
        status, content, _ = wire.ask(message)
        if status == 200:
            return message, "" if is_right(json.loads(content)) else "the answer of another", status
        return message, "" if status in (400, 403, 405) else f"{status} {content[:300]!r}", status

    def _send_method(self, rng, wire):
        method, path = rng.choice(_METHODS), rng.choice([*_PATHS, *_LOST])
        if method in ("PUT", "DELETE"):
            path = path.replace("mood", "nobody")
        body = rng.choice(
            [b"", b"{}", b'{"bundle":"nobody"}', b'{"bundle":"../x"}', b'{"bundle":"/etc"}', b'{"bundle":5}']
        )
        return self._told(wire, _message(method, path, body), {200, 307, 400, 403, 404, 405, 422}, method)

    def _send_lost(self, rng, wire):
        return self._told(wire, _message("POST", rng.choice(_LOST), b'{"inputs":"a"}'), {200, 404, 405})

    def _send_long(self, rng, wire):
        """Texts that are long, or whose characters are many bytes."""
        piece = rng.choice(["a ", "🎉", "שלום ", "é", "word. ", "\u202e", "\U0010ffff", "漢字", "a", "\x01", "   "])
        text = (piece * (self.limits["characters"] // len(piece)))[: self.limits["characters"]]
        data = json.dumps({"inputs": text}).encode()
        return self._told(wire, _message("POST", "/v1/heads/mood/predict", data), {200})

    def _send_too_much(self, rng, wire):
        inputs = rng.choice(
            [
                "a" * (self.limits["characters"] + 1),
                ["a"] * (self.limits["texts"] + 1),
                [""] * 300_000,
                ["a", "🎉" * (self.limits["characters"] + 1)],
                "a" * self.limits["body"],
            ]
        )
        data = json.dumps({"inputs": inputs}).encode()
        told = self._told(wire, _message("POST", rng.choice(["/predict", "/embed"]), data), {413})
        wire.close()
        return told

    def _send_half(self, rng, wire):
        path, body, _ = rng.choice(self.good)
        message = _message("POST", path, json.dumps(body).encode())
        wire.close()
        with socket.create_connection(self.address, timeout=_SECONDS) as other:
            other.sendall(message[: rng.randrange(1, len(message) + 1)])
            if rng.random() < 0.5:
                other.shutdown(socket.SHUT_WR)
                while other.recv(65_536):  # until it is closed there
                    pass
        return message, "", 0

    def _send_garbage(self, rng, wire):
        wire.close()
        message = rng.choice([*_GARBAGE, rng.randbytes(rng.randint(1, 200)) + b"\r\n\r\n"])
        with socket.create_connection(self.address, timeout=_SECONDS) as other:
            other.sendall(message)
            other.shutdown(socket.SHUT_WR)
            try:
                answer = other.recv(65_536)
            except ConnectionResetError:
                answer = b""
        status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0
        return message, f"{answer[:300]!r}" if status >= 500 else "", status

    def _told(self, wire, message, statuses, method="POST"):
        status, content, headers = wire.ask(message, method)
        reason = "" if status in statuses else f"{status} {content[:300]!r}"
        if not reason and status >= 400 and method != "HEAD" and content != b"Invalid HTTP request received.":
            error = json.loads(content)["error"]
            line = error["message"] if isinstance(error, dict) else error
            if not line or "\n" in line or len(line) > 1_500:
                reason = f"not a line: {line[:300]!r}"
            if headers["x-content-type-options"] != "nosniff":
                reason = "without headers"
        return message, reason, status


class _Wire:
    """A connection that is kept as long as it can be."""

    def __init__(self, address):
        self.address, self._socket = address, None

    def close(self):
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ask(self, message, method="POST", rng=None):
        """Status, content and headers of an answer; with `rng` the message goes in pieces."""
        kept = self._socket is not None
        try:
            return self._ask(message, method, rng)
        except (ConnectionError, HTTPException):
            self.close()
            if not kept:
                raise
        return self._ask(message, method, rng)  # the other side had closed it before

    def _ask(self, message, method, rng):
        if self._socket is None:
            self._socket = socket.create_connection(self.address, timeout=_SECONDS)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        place = rng.randrange(len(message)) if rng else len(message)
        self._socket.sendall(message[:place])
        self._socket.sendall(message[place:])
        answer = HTTPResponse(self._socket, method=method)
        try:
            answer.begin()
            content = answer.read()
            if answer.will_close:
                self.close()
            return answer.status, content, answer.headers
        finally:
            answer.close()


def _message(method, path, data=b"", headers=(), chunked=None):
    """A request; with `chunked`, a source of chance, its body in chunks."""
    lines = [f"{method} {path} HTTP/1.1".encode(), *headers]
    if not any(header.startswith(b"Host:") for header in headers):
        lines.append(b"Host: 127.0.0.1")
    if chunked is None:
        return b"\r\n".join([*lines, b"Content-Length: %d" % len(data), b"", data])
    parts, rest = [], data
    while rest:
        size = chunked.randint(1, max(1, len(data) // 3))
        parts.append(b"%x\r\n%s\r\n" % (len(rest[:size]), rest[:size]))
        rest = rest[size:]
    return b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", b"".join(parts) + b"0\r\n\r\n"])


def _path(rng):
    return rng.choice(["/predict", "/", "/embed", "/v1/heads/mood/predict", "/v1/embeddings", "/v1/heads/mood"])
