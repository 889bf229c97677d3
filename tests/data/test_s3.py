"""Cells from a real S3 server over HTTP, behind a proxy that injects faults."""

from __future__ import annotations

import http.client
import io
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from fastvim.data.channels import ChannelData
from fastvim.data.jumpcp import CellData
from fastvim.data.remote import UnreadableFileError, read_bytes
from fastvim_cli import main

pytest.importorskip("s3fs")
pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
moto_server = pytest.importorskip("moto.server")

CELLS = 20
KEYS = {"key": "nobody", "secret": "nothing"}


class Proxy(ThreadingHTTPServer):
    """Passes requests on; `faults` of the next GETs of objects: a status, "cut" or "reset"."""

    def __init__(self, target: tuple[str, int], address: tuple[str, int]) -> None:
        super().__init__(address, Handler)
        self.target = target
        self.faults: list[int | str] = []
        self.gets: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def storage_options(self) -> dict[str, Any]:
        return {**KEYS, "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{self.server_port}"}}


class Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.gets.append(self.path)
            fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif isinstance(fault, int):
            code = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}[fault]
            self._answer(fault, {}, f"<Error><Code>{code}</Code></Error>".encode())
        else:
            self._pass_on(cut=fault == "cut")

    def do_HEAD(self) -> None:
        self._pass_on()

    def _pass_on(self, cut: bool = False) -> None:
        connection = http.client.HTTPConnection(*self.server.target)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        headers = {name: value for name, value in answer.getheaders() if _end_to_end(name)}
        self._answer(answer.status, headers, body, cut)
        connection.close()

    def _answer(self, status: int, headers: dict, body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args: object) -> None:
        pass


def _end_to_end(name: str) -> bool:
    return name.lower() not in (
        "connection",
        "content-length",
        "transfer-encoding",
        "date",
        "server",
    )


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    """A moto server whose bucket `plate` holds a small set in the layout of JUMP-CP."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id=KEYS["key"],
        aws_secret_access_key=KEYS["secret"],
    )
    client.create_bucket(Bucket="plate")

    def put(name: str, data: bytes) -> None:
        client.put_object(Bucket="plate", Key=name, Body=data)

    paths = [f"s3://plate/cells/{index}.npy" for index in range(CELLS)]
    wells = ["A01" if index % 2 else "A02" for index in range(CELLS)]
    for index in range(CELLS):
        put(f"cells/{index}.npy", npy(np.full((8, 16, 16), index, np.uint8)))
    cells = io.BytesIO()
    pd.DataFrame({"path": paths, "ID": range(CELLS), "well_loc": wells}).to_parquet(cells)
    put("cells.parquet", cells.getvalue())
    put("plate_map.csv", b"well_position,broad_sample\nA01,BRD-1\nA02,\n")
    put("metadata.tsv", b"broad_sample\ttarget\tcontrol_type\nBRD-1\tTNF\t\n\t\tnegcon\n")
    put("half.npy", npy(np.zeros((8, 16, 16), np.uint8))[:1000])
    splits = ["train"] * 12 + ["val"] * 8
    relative = [f"cells/{index}.npy" for index in range(CELLS)]
    table = pd.DataFrame({"path": relative, "label": wells, "split": splits})
    put("table.csv", table.to_csv(index=False).encode())
    yield host, port
    server.stop()


@pytest.fixture
def proxy(server: tuple[str, int]) -> Iterator[Proxy]:
    proxy = Proxy(server, ("127.0.0.1", 0))
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def open_cells(proxy: Proxy, stage: str = "fit", **settings: Any) -> CellData:
    settings = {"img_size": 16, "batch_size": 2, "num_workers": 0, "wait": 0.01, **settings}
    data = CellData(
        root="s3://plate",
        cells="cells.parquet",
        plate_map="plate_map.csv",
        metadata="metadata.tsv",
        storage_options=proxy.storage_options,
        **settings,
    )
    data.setup(stage)
    return data


def test_an_object_takes_one_request(proxy: Proxy) -> None:
    data = read_bytes("s3://plate/cells/3.npy", storage_options=proxy.storage_options)
    assert data == npy(np.full((8, 16, 16), 3, np.uint8))
    assert proxy.gets == ["/plate/cells/3.npy"]


@pytest.mark.parametrize("fault", [500, 503, "cut", "reset"])
def test_faults_that_pass(proxy: Proxy, fault: int | str) -> None:
    proxy.faults = [fault] * 3
    options = {"storage_options": proxy.storage_options, "wait": 0.01}
    data = read_bytes("s3://plate/cells/3.npy", **options)
    assert data == npy(np.full((8, 16, 16), 3, np.uint8))
    assert len(proxy.gets) == 4


@pytest.mark.parametrize(
    ("fault", "attempts"), [(500, 3), ("cut", 3), ("reset", 3), (403, 1), (None, 1)]
)
def test_faults_that_stay(proxy: Proxy, fault: int | str | None, attempts: int) -> None:
    proxy.faults = [fault] * 20 if fault else []
    name = "cells/3.npy" if fault else "cells/none.npy"
    options = {"storage_options": proxy.storage_options, "wait": 0.01, "attempts": 3}
    with pytest.raises(UnreadableFileError) as caught:
        read_bytes(f"s3://plate/{name}", **options)
    told = {3: "unreadable in 3 attempts (", 1: "access denied" if fault else "no such file"}
    assert str(caught.value).startswith(f"s3://plate/{name}: {told[attempts]}")
    requests = len(proxy.gets)
    assert attempts <= requests <= (2 * attempts if fault == "reset" else attempts)


def test_refused_connections(server: tuple[str, int]) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = reserved.getsockname()
    options = {**KEYS, "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{address[1]}"}}
    url = "s3://plate/cells/3.npy"
    with pytest.raises(UnreadableFileError, match=r"in 2 attempts .*Could not connect"):
        read_bytes(url, attempts=2, wait=0.01, storage_options=options)
    proxies: list[Proxy] = []
    timer = threading.Timer(0.3, lambda: proxies.append(Proxy(server, address)))
    timer.start()
    assert len(read_bytes(url, attempts=7, wait=0.05, storage_options=options)) == 128 + 8 * 256
    timer.join()
    proxies[0].shutdown()
    proxies[0].server_close()


@pytest.mark.parametrize("workers", [0, 2])
def test_cells_are_the_same_with_and_without_faults(proxy: Proxy, workers: int) -> None:
    expected = list(open_cells(proxy).train_dataloader())
    data = open_cells(proxy, num_workers=workers, attempts=9)
    proxy.faults = [500, "cut", 503, "reset", 500, "cut"]
    got = list(data.train_dataloader())
    assert proxy.faults == []
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert data.class_names == ["negcon", "TNF"]
    for images, targets in data.val_dataloader():
        values = images[:, 0, 8, 8] * data.std[0] + data.mean[0]
        assert torch.equal(values.round().int() % 2, targets.int())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_object_that_stays_unreadable(proxy: Proxy, workers: int) -> None:
    data = open_cells(proxy, attempts=2, num_workers=workers)
    proxy.faults = [500] * 40
    with pytest.raises(UnreadableFileError) as caught:
        list(data.train_dataloader())
    assert str(caught.value).startswith("s3://plate/cells/")
    assert "unreadable in 2 attempts (" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_objects_are_skipped_and_counted(proxy: Proxy, workers: int) -> None:
    data = open_cells(proxy, attempts=2, num_workers=workers, on_error="skip", batch_size=6)
    dataset = data._datasets["train"]
    dataset._paths[[1, 5]] = b"s3://plate/none.npy", b"s3://plate/half.npy"
    targets = torch.cat([targets for _, targets in data.train_dataloader()])
    assert (len(targets), data.skipped) == (12, 2)


def test_a_plain_table_on_s3(proxy: Proxy) -> None:
    settings = {"in_chans": 8, "mean": (1.0,), "std": (2.0,), "img_size": 16, "num_workers": 2}
    data = ChannelData("s3://plate", storage_options=proxy.storage_options, **settings)
    data.setup("validate")
    ((images, targets),) = data.val_dataloader()
    assert (images[:, 0, 8, 8] * 2 + 1).tolist() == list(range(12, 20))
    assert targets.tolist() == [1, 0] * 4


def test_statistics_of_a_table_on_s3(proxy: Proxy, capsys: pytest.CaptureFixture) -> None:
    import json

    proxy.faults = [500]
    options = ["--storage-options", json.dumps(proxy.storage_options)]
    assert main(["data", "stats", "s3://plate/table.csv", "--split", "val", *options]) == 0
    assert "mean: [15.5, 15.5" in capsys.readouterr().out
