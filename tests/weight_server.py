"""A server of files on the loopback address, with ranges, marks of versions, and faults."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

LOGIN = b"<!DOCTYPE html><html><body>Please log in</body></html>"


class WeightServer(ThreadingHTTPServer):
    """Serves `files`, and what the Hugging Face hub says beside them.

    Attributes:
        files: bytes by path, such as "/v0/a.ckpt".
        faults: by path, one for each answer in turn: a status; "half", the length of the whole and
            half of the bytes; "short", half of the bytes and their length; "login", a web page;
            "unnamed", a web page that is not called one. "" is no fault.
        requests: method, path and range of every request.
    """

    daemon_threads = True
    files: dict[str, bytes]
    faults: dict[str, list[int | str]]
    requests: list[tuple[str, str, str | None]]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: WeightServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, asked))
        waiting = self.server.faults.get(self.path, [])
        fault = waiting.pop(0) if waiting else ""
        content = self.server.files.get(self.path)
        if content is None or isinstance(fault, int):
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        kind = "text/html" if fault == "login" else "application/octet-stream"
        if fault in ("login", "unnamed"):
            content = LOGIN
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        start = 0
        if asked and self.headers.get("If-Range", etag) == etag:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first)
            if start >= len(content):
                self.send_error(416)
                return
            stop = int(last) + 1 if last else len(content)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            content = content[start:stop]
        else:
            self.send_response(200)
        half = content[: len(content) // 2] if fault in ("half", "short") else content
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(half if fault == "short" else content)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(half)
        self.close_connection = fault == "half"

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[WeightServer]:
    """A server that runs while the block does."""
    server = WeightServer(("127.0.0.1", 0), _Handler)
    server.files, server.faults, server.requests = {}, {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def stand_in(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Let the server of this address be the Hugging Face hub."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
