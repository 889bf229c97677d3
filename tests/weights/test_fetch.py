"""Files of weights that are fetched: caches, interruptions, and what a network does wrong."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from weight_server import stand_in

from fastvim.errors import UserError
from fastvim.weights import fetch

CONTENT = bytes(range(256)) * 40_000  # 10 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = "/v0/weights.ckpt"
HUB_PATH = "/some/model/resolve/main/weights.pth"
HUB_URL = f"https://huggingface.co{HUB_PATH}"


@pytest.fixture
def url(server):
    server.files[PATH] = CONTENT
    server.files[HUB_PATH] = CONTENT
    return server.address + PATH


def kept(caches: Path) -> Path:
    return caches / "torch" / "hub" / "checkpoints" / "weights.ckpt"


def left_over(caches: Path) -> list[str]:
    """Files in torch.hub's cache that are not locks."""
    files = (caches / "torch").rglob("*")
    return sorted(f.name for f in files if f.is_file() and f.suffix != ".lock")


def refused(url: str, *parts: str, sha256: str | None = None) -> None:
    """The file cannot be had; one line tells why, the address, and where to put it."""
    with pytest.raises(UserError) as error:
        fetch.fetch(url, sha256)
    line = str(error.value)
    assert "\n" not in line
    for part in (url, "FASTVIM_WEIGHTS", *parts):
        assert part in line


def test_a_file_is_fetched_once(url, server, caches):
    for _ in range(2):
        assert fetch.fetch(url) == kept(caches)
        assert kept(caches).read_bytes() == CONTENT
    assert server.requests == [("GET", PATH, None)]
    assert left_over(caches) == ["weights.ckpt", "weights.ckpt.json"]
    note = json.loads((fetch.cache_folder() / "weights.ckpt.json").read_text())
    assert (note["url"], note["size"], note["sha256"]) == (url, len(CONTENT), SHA256)


def test_a_file_of_the_hub_lies_in_its_cache_and_is_not_asked_for_again(url, server, caches):
    path = fetch.fetch(HUB_URL)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(caches / "hub")
    count = len(server.requests)
    assert fetch.fetch(HUB_URL) == path == fetch.here(HUB_URL)
    assert len(server.requests) == count


def test_the_users_folder_is_taken_and_the_network_is_not(url, server, caches, monkeypatch):
    (caches / "mine").mkdir()
    monkeypatch.setenv("FASTVIM_WEIGHTS", str(caches / "mine"))
    for address in (url, HUB_URL):
        file = caches / "mine" / address.rpartition("/")[2]
        refused(address, f"{file} is missing")
        assert fetch.here(address) is None
        file.write_bytes(b"mine")
        assert fetch.fetch(address) == file == fetch.here(address)
    assert not server.requests


@pytest.mark.parametrize("faults", [["half"], [503, "half", ""], [500, 429, ""]])
def test_a_download_goes_on_after_an_interruption(url, server, caches, faults):
    server.faults[PATH] = list(faults)
    assert fetch.fetch(url).read_bytes() == CONTENT
    ranges = [asked for _, _, asked in server.requests]
    resumed = faults.index("half") + 1 if "half" in faults else None
    half = f"bytes={len(CONTENT) // 2}-"
    assert ranges == [half if i == resumed else None for i in range(len(ranges))]
    assert left_over(caches) == ["weights.ckpt", "weights.ckpt.json"]


def test_the_next_process_goes_on_where_this_one_stopped(url, server, caches):
    server.faults[PATH] = ["half", 503, 503]
    refused(url, "503", "goes on where it stopped")
    assert not kept(caches).exists()
    assert fetch.fetch(url).read_bytes() == CONTENT
    assert server.requests[-1] == ("GET", PATH, f"bytes={len(CONTENT) // 2}-")


def test_the_rest_of_another_version_is_not_appended(url, server, caches):
    server.faults[PATH] = ["half", 503, 503]
    refused(url)
    server.files[PATH] = CONTENT[::-1]
    assert fetch.fetch(url).read_bytes() == CONTENT[::-1]


def test_a_part_as_long_as_the_file_begins_anew(url, server, caches):
    server.faults[PATH] = ["half", 503, 503]
    refused(url)
    with kept(caches).with_name("weights.ckpt.part").open("ab") as part:
        part.write(CONTENT)
    assert fetch.fetch(url).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (404, "404 Not Found"),
        (403, "403 Forbidden"),
        (500, "500 Internal Server Error"),
        ("login", "a web page"),
        ("unnamed", "a web page"),
    ],
)
def test_what_a_server_does_wrong_is_one_line(url, server, caches, fault, message):
    server.faults[PATH] = [fault] * 3
    refused(url, message)
    assert left_over(caches) == []
    server.faults.clear()
    assert fetch.fetch(url).read_bytes() == CONTENT


@pytest.mark.parametrize("fault", [404, 403, "half"])
def test_what_the_hub_does_wrong_is_one_line(url, server, caches, fault, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.faults[HUB_PATH] = ["" if fault == "half" else fault, *[fault] * 8]
    refused(HUB_URL)
    assert fetch.here(HUB_URL) is None
    server.faults.clear()
    assert fetch.fetch(HUB_URL).read_bytes() == CONTENT


@pytest.mark.parametrize("hub", [False, True])
def test_without_a_network_the_line_says_where_to_put_the_file(caches, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        stand_in(monkeypatch, nowhere)
        refused(HUB_URL if hub else nowhere + PATH)
    assert left_over(caches) == []


def test_a_server_that_stops_sending_is_given_up(url, server, caches, monkeypatch):
    monkeypatch.setattr(fetch, "_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        refused(f"http://127.0.0.1:{silent.getsockname()[1]}{PATH}", "timed out")


@pytest.mark.parametrize("again", ["fetched", "changed"])
def test_other_bytes_than_last_time_are_refused(url, server, caches, again):
    fetch.fetch(url)
    other = CONTENT[::-1]
    if again == "fetched":
        kept(caches).unlink()
        server.files[PATH] = other
    else:
        kept(caches).write_bytes(other)
    with pytest.raises(UserError, match="other bytes") as error:
        fetch.fetch(url)
    note = fetch.cache_folder() / "weights.ckpt.json"
    for part in (SHA256, hashlib.sha256(other).hexdigest(), str(note)):
        assert part in str(error.value)
    if again == "fetched":
        assert left_over(caches) == ["weights.ckpt.json"]
    note.unlink()  # accepts them
    assert fetch.fetch(url).read_bytes() == other


def test_a_known_checksum_is_compared(url, server, caches):
    refused(url, SHA256, "0" * 64, sha256="0" * 64)
    assert left_over(caches) == []
    assert fetch.fetch(url, SHA256).read_bytes() == CONTENT


def test_a_full_disk_leaves_nothing(url, caches):
    part = kept(caches).with_name("weights.ckpt.part")
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    refused(url, "the disk is full")
    assert left_over(caches) == []
    assert not part.is_symlink()


@pytest.fixture
def unwritable(monkeypatch):
    """A folder that this user cannot write into."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        else:
            folder.chmod(0o555)
        monkeypatch.setenv("TORCH_HOME", name)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_a_cache_that_cannot_be_written_is_one_line(url, unwritable):
    refused(url, str(unwritable), "Permission denied")


def test_a_cache_that_cannot_be_made_is_one_line(url, caches, monkeypatch):
    (caches / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(caches / "file"))
    refused(url, "Not a directory")


def test_a_cached_file_is_read_from_a_cache_that_cannot_be_written(url, unwritable, caplog):
    folder = unwritable / "hub" / "checkpoints"
    os.seteuid(os.getuid())
    folder.mkdir(parents=True)
    (folder / "weights.ckpt").write_bytes(CONTENT)
    os.seteuid(65534 if os.getuid() == 0 else os.getuid())
    assert fetch.fetch(url) == folder / "weights.ckpt"
    assert "the checksum" in caplog.text


def _fetch(url: str) -> bytes:
    return fetch.fetch(url).read_bytes()


def test_two_processes_fetch_at_once(url, server, caches):
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(_fetch, [url] * 4)) == [CONTENT] * 4
    assert [path for _, path, _ in server.requests] == [PATH]
    assert left_over(caches) == ["weights.ckpt", "weights.ckpt.json"]
