"""A proxy before a store over HTTP that now and then answers 500 or breaks the connection off, also half way and also
after the store has done what it was asked."""

import contextlib
import http.client
import random
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We are unlucky.</Message></Error>"


class Flaky(ThreadingHTTPServer):
    """Serves on a free port of loopback; `harm` counts what it has done, `asked` holds what it was asked."""

    daemon_threads = True

    def __init__(self, target, share, seed=0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.share, self.rng, self.lock = target, share, random.Random(seed), threading.Lock()
        self.harm = {"500": 0, "reset before": 0, "reset after": 0, "cut short": 0}
        self.requests = 0
        self.asked = []  # (command, path, range) of each
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def lot(self):
        """What to do with the next request: empty leaves it alone."""
        with self.lock:
            self.requests += 1
            if self.rng.random() >= self.share:
                return ""
            kind = self.rng.choice(list(self.harm))
            self.harm[kind] += 1
            return kind

    def handle_error(self, request, client_address):
        pass  # clients give up on broken connections: that is what this is for


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self):
        body = self._body()
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        kind = self.server.lot()
        if kind == "500":
            return self._answer(500, {"Content-Type": "application/xml"}, _ERROR)
        if kind == "reset before":
            return self._reset()
        status, headers, content = self._forward(body)
        if kind == "reset after":
            return self._reset()
        return self._answer(status, headers, content, cut=kind == "cut short")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forward(self, body):
        connection = http.client.HTTPConnection(*self.server.target, timeout=60)
        kept = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")}
        connection.request(self.command, self.path, body, kept | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")}
        connection.close()
        return answer.status, headers, content

    def _answer(self, status, headers, content, cut=False):
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if cut:
            self.wfile.write(content[: len(content) // 2])
            return self._reset()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self):
        """Break off without a word: the other side sees a connection reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_):
        pass
