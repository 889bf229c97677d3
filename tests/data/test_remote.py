"""Files on disk and behind URLs: transient errors are retried, permanent ones are not."""

from __future__ import annotations

import errno
import multiprocessing
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from fastvim.data import remote
from fastvim.data.remote import UnreadableFileError, join, read_bytes
from fastvim.errors import UserError

pytest.importorskip("fsspec")
CONTENT = bytes(range(256)) * 40


class Server(ThreadingHTTPServer):
    """Answers `CONTENT`, after the faults: a status, "cut" (half the body) or "reset"."""

    def __init__(self, *faults: int | str, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, Handler)
        self.faults = list(faults)
        self.requests = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/cell.npy"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        fault = self.server.faults.pop(0) if self.server.faults else 200
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.send_response(fault if isinstance(fault, int) else 200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if fault == "cut" else CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator:
    servers: list[Server] = []

    def start(*faults: int | str, **settings) -> Server:
        servers.append(Server(*faults, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The requested waits, in seconds; nothing waits for real."""
    naps: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", naps.append)
    return naps


def test_a_local_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(CONTENT)
    assert read_bytes(str(path)) == CONTENT
    assert read_bytes(path.as_uri()) == CONTENT


def test_a_missing_local_file_is_tried_once(tmp_path: Path, naps: list[float]) -> None:
    for url in (str(tmp_path / "x.npy"), (tmp_path / "x.npy").as_uri()):
        with pytest.raises(UnreadableFileError, match=f"^{url}: no such file$"):
            read_bytes(url)
    with pytest.raises(UnreadableFileError, match="IsADirectoryError"):
        read_bytes(str(tmp_path))
    assert naps == []


def test_a_disk_that_fails_for_a_moment(
    tmp_path: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(CONTENT)
    whole, failures = Path.read_bytes, [errno.ESTALE, errno.EIO]

    def read(self: Path) -> bytes:
        if failures:
            raise OSError(failures.pop(), "for a moment")
        return whole(self)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert read_bytes(str(path), wait=0.25) == CONTENT
    assert naps == [0.25, 0.5]


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "cut"])
def test_passing_errors_are_tried_again(serve, naps: list[float], fault: int | str) -> None:
    server = serve(fault, fault, fault)
    assert read_bytes(server.url) == CONTENT
    assert server.requests == 4
    assert naps == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(500, "ClientResponseError: 500"), ("cut", "ClientPayloadError")],
)
def test_attempts_are_bounded(serve, naps: list[float], fault: int | str, reason: str) -> None:
    server = serve(*[fault] * 9)
    with pytest.raises(UnreadableFileError) as caught:
        read_bytes(server.url, attempts=3)
    assert server.requests == 3
    assert str(caught.value).startswith(f"{server.url}: unreadable in 3 attempts (")
    assert reason in str(caught.value)


def test_dropped_connections(serve, naps: list[float]) -> None:
    server = serve(*["reset"] * 5)
    assert read_bytes(server.url) == CONTENT
    server = serve(*["reset"] * 9)
    with pytest.raises(UnreadableFileError, match=r"in 3 attempts \(ServerDisconnectedError"):
        read_bytes(server.url, attempts=3)
    assert server.requests <= 6  # aiohttp, too, asks once more


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "no such file"), (403, "access denied"), (401, "access denied"), (400, "400")],
)
def test_lasting_errors_are_told_at_once(
    serve, naps: list[float], status: int, message: str
) -> None:
    server = serve(status)
    with pytest.raises(UnreadableFileError, match=f"{server.url}: .*{message}"):
        read_bytes(server.url)
    assert (server.requests, naps) == (1, [])


def test_a_server_that_starts_late(serve) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = reserved.getsockname()
    url = f"http://127.0.0.1:{address[1]}/cell.npy"
    with pytest.raises(UnreadableFileError, match=r"in 2 attempts \(ClientConnectorError"):
        read_bytes(url, attempts=2, wait=0.01)
    timer = threading.Timer(0.3, serve, kwargs={"address": address})
    timer.start()
    assert read_bytes(url, attempts=6, wait=0.1) == CONTENT
    timer.join()


def test_a_server_that_does_not_answer(naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cell.npy"
        with pytest.raises(UnreadableFileError, match=r"in 2 attempts \(FSTimeoutError"):
            read_bytes(url, attempts=2)


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ({"attempts": 0}, {"wait": -1.0}):
        with pytest.raises(UserError, match=r"expected at least 1 and at least 0"):
            read_bytes("x", **settings)
    with pytest.raises(UserError, match="nowhere://x: cannot be opened: Protocol not known"):
        read_bytes("nowhere://x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r's3://a/b: .*fsspec.*; needs pip install "fastvim'):
        read_bytes("s3://a/b")


def test_a_defect_is_not_an_unreadable_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(url: str, options: dict) -> bytes:
        raise AttributeError("a defect")

    monkeypatch.setattr(remote, "_fetch", broken)
    with pytest.raises(AttributeError, match="a defect"):
        read_bytes("http://x")


class Files(Dataset):
    def __init__(self, url: str, attempts: int = 4) -> None:
        self.url = url
        self.attempts = attempts

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return len(read_bytes(self.url, attempts=self.attempts, wait=0.01))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_after_the_parent_has_read(serve, context: str) -> None:
    server = serve(200, 500, "cut", 500)
    assert len(read_bytes(server.url)) == len(CONTENT)  # the parent has a connection of its own
    loader = DataLoader(Files(server.url), 2, num_workers=2, multiprocessing_context=context)
    assert [batch.tolist() for batch in loader] == [[len(CONTENT)] * 2] * 4
    assert len(read_bytes(server.url)) == len(CONTENT)


def test_a_fork_leaves_its_parents_connections_alone(
    serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "protocol_version", "HTTP/1.1")  # keeps connections
    monkeypatch.setattr(remote, "TIMEOUT", 3.0)
    server = serve()
    assert read_bytes(server.url, attempts=1) == CONTENT
    process = multiprocessing.get_context("fork").Process(target=read_bytes, args=(server.url,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert read_bytes(server.url, attempts=1) == CONTENT


@pytest.mark.slow
def test_the_error_of_a_worker_is_one_line(serve) -> None:
    server = serve(*[500] * 20)
    with pytest.raises(UnreadableFileError) as caught:
        list(DataLoader(Files(server.url, attempts=2), num_workers=1))
    assert str(caught.value).startswith(f"{server.url}: unreadable in 2 attempts (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("root", "path", "joined"),
    [
        ("", "a/b.npy", "a/b.npy"),
        ("/data", "a/b.npy", "/data/a/b.npy"),
        ("/data/", "/c/b.npy", "/c/b.npy"),
        ("s3://bucket/x/", "a/b.npy", "s3://bucket/x/a/b.npy"),
        ("s3://bucket/x", "s3://other/b.npy", "s3://other/b.npy"),
        ("/data", "https://host/b.npy", "https://host/b.npy"),
    ],
)
def test_join(root: str, path: str, joined: str) -> None:
    assert join(root, path) == joined
