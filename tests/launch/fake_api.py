"""The part of the Cloud TPU API that the launch scripts use, served on loopback."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

PARENT = "projects/p/locations/us-east5-a"


class FakeApi:
    """Queued resources by name; every created one goes through `states`, one a look."""

    def __init__(self, states: list[str]):
        self.states = states
        self.resources: dict[str, dict[str, Any]] = {}
        self.left: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str, Any]] = []
        self.port = 0

    def answer(self, method: str, url: str, body: Any) -> tuple[int, dict[str, Any]]:
        self.requests.append((method, url, body))
        parsed = urlparse(url)
        kind, _, name = parsed.path.removeprefix(f"/v2/{PARENT}/").partition("/")
        if kind == "operations":
            return 200, {"name": f"{PARENT}/operations/{name}", "done": True}
        if method == "POST" and kind == "queuedResources":
            name = parse_qs(parsed.query)["queuedResourceId"][0]
            self.resources[name] = body
            self.left[name] = list(self.states)
            return 200, {"name": f"{PARENT}/operations/create", "done": False}
        owner = name.rstrip("0123456789-") if kind == "nodes" else name
        owner = name if name in self.resources else owner
        if owner not in self.resources:
            what = f"Resource '{PARENT}/{kind}/{name}' was not found"
            return 404, {"error": {"code": 404, "message": what, "status": "NOT_FOUND"}}
        if kind == "nodes":
            return 200, {
                "name": f"{PARENT}/nodes/{name}",
                "state": "READY",
                "health": "HEALTHY",
                "apiVersion": "V2",
                "createTime": "2026-11-22T08:00:00.123456Z",
                "networkEndpoints": [{"ipAddress": f"10.0.0.{i}"} for i in range(4)],
            }
        if method == "DELETE":
            del self.resources[owner]
            return 200, {"name": f"{PARENT}/operations/delete", "done": False}
        left = self.left[owner]
        state = left.pop(0) if len(left) > 1 else left[0]
        resource = {**self.resources[owner], "name": f"{PARENT}/queuedResources/{owner}"}
        return 200, {**resource, "state": {"state": state}}


@contextmanager
def serve(states: list[str]) -> Iterator[FakeApi]:
    """Serves a FakeApi on a free port of loopback."""
    api = FakeApi(states)

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or "null")
            status, answer = api.answer(self.command, self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do_PATCH = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.port = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
