"""A hub of models on loopback, as far as the client of Hugging Face's needs one to download."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(models):
    """The address of a hub with folders as models, and a list of what it is asked: (command, path)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked.append((self.command, self.path))
            status, headers, content = self._found()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def _found(self):
            for name, folder in models.items():
                files = sorted(folder.iterdir())
                path = self.path.partition("?")[0]
                if path.startswith(f"/api/models/{name}/revision/"):
                    return answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]})
                if path == f"/api/models/{name}/tree/{COMMIT}":
                    return answer([told(file) for file in files])
                for file in files:
                    if path == f"/{name}/resolve/{COMMIT}/{file.name}":
                        headers = {"ETag": f'"{told(file)["oid"]}"', "X-Repo-Commit": COMMIT}
                        return 200, headers, file.read_bytes()
            return 404, {"X-Error-Code": "RepoNotFound"}, b""

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def told(file):
    return {
        "type": "file",
        "path": file.name,
        "size": file.stat().st_size,
        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
    }


def answer(content):
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()
