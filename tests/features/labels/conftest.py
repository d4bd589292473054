"""A small OpenAI-compatible server that misbehaves in the ways that real ones do, as a fixture."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Say = Callable[[dict[str, Any]], str]


@dataclass
class Server:
    """What it does to the n-th attempt, and what it saw."""

    say: Say
    """The content of a reply to a request."""
    trouble: list[str] = field(default_factory=list)
    """For the first attempts: ok, 429, 500, timeout, cut (half a body), html, refuse; ok afterwards."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Every request that came in."""
    answered: list[str] = field(default_factory=list)
    """The user message of every request that was answered in full: what a provider would have billed."""
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def serving() -> Callable[..., AbstractContextManager[Server]]:
    """Opens a server: what it says, and the trouble of its first attempts."""

    def open_one(say: Say, trouble: Sequence[str] = ()) -> AbstractContextManager[Server]:
        return _running(Server(say, list(trouble)))

    return open_one


@contextmanager
def _running(server: Server) -> Iterator[Server]:
    lock, over = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.asked)
                server.asked.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
            trouble = server.trouble[number] if number < len(server.trouble) else "ok"
            if trouble == "timeout":
                over.wait()  # so nothing else can be too slow
            if trouble in ("429", "500", "400", "401"):
                self._send(int(trouble), {"error": {"message": "no"}}, {"Retry-After": "0"})
            elif trouble == "html":
                self._raw(200, b"<html>busy</html>", "text/html")
            elif trouble == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [{"mess')
                self.close_connection = True
            elif trouble == "half":
                self._raw(200, b'{"choices": [{"mess', "application/json")
            else:
                reply = {
                    "choices": [{"index": 0, "message": {"role": "assistant", "content": server.say(body)}}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10},
                }
                with lock:
                    server.answered.append(body["messages"][-1]["content"])
                self._send(200, reply, {})

        def _send(self, status: int, record: dict[str, Any], headers: dict[str, str]) -> None:
            self._raw(status, json.dumps(record).encode(), "application/json", headers)

        def _raw(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has given up
                self.close_connection = True

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    try:
        yield server
    finally:
        over.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()
