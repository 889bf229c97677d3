"""Pipes, sockets and devices in the place of a file: one line at once, wherever a file is read."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvim.data.arrays import read_array
from fastvim.data.coco import read_instances
from fastvim.data.decoding import decode, stored_size
from fastvim.data.files import ImageFiles
from fastvim.data.folders import ClassFolders
from fastvim.data.masks import read_names, read_values
from fastvim.data.pixels import PictureReader, UnreadableImageError
from fastvim.data.remote import UnreadableFileError
from fastvim.data.table import read_table
from fastvim.errors import UserError
from fastvim.inference.parts.sources import Source
from fastvim.tasks.checkpoints import newest_whole
from fastvim.tasks.resuming import told_by
from fastvim.weights import read
from fastvim_cli.train.config_files import read_config

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "image": ("image.png", lambda path: decode(path, str(path), None)),
    "array": ("image.npy", lambda path: read_array(str(path))),
    "mask": ("mask.png", lambda path: read_values(path, PictureReader())),
    "class_file": ("names.txt", lambda path: read_names(path, 2)),
    "tar": ("train.tar", ClassFolders),
    "table": ("table.csv", lambda path: read_table(str(path))),
    "parquet": ("table.parquet", lambda path: read_table(str(path))),
    "list": ("list.txt", lambda path: Source((), str(path)).identity()),
    "coco": ("instances.json", lambda path: read_instances(path, path.parent)),
    "safetensors": ("weights.safetensors", read),
    "pickled": ("weights.pth", read),
    "checkpoint": ("a.ckpt", lambda path: told_by(str(path))),
    "last": ("last.ckpt", lambda path: newest_whole([path])),
    "config": ("recipe.yaml", lambda path: read_config(str(path))),
}


@pytest.fixture(autouse=True)
def in_seconds() -> Iterator[None]:
    """A reader that waits fails."""

    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(path.parent)  # the address of a socket is short
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_one_line(reader, kind, tmp_path, monkeypatch):
    name, action = READERS[reader]
    make(kind, tmp_path / name, monkeypatch)
    with pytest.raises(UserError, match=f"{name}: a {kind}, expected a file") as raised:
        action(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_its_size_is_not_known(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    assert stored_size(tmp_path / "image.png") == ((0, 0), 1)


def test_one_image_of_several_is_damaged(tmp_path):
    """Training takes the next image, and the commands go on with the others."""
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat" / "0.png")
    os.mkfifo(tmp_path / "0.npy")
    files = ImageFiles(
        ClassFolders(tmp_path), str(tmp_path), PictureReader(), lambda x: x, None, False
    )
    with pytest.raises(UnreadableImageError, match=r"cat/0\.png: a pipe, expected a file"):
        files[0]
    with pytest.raises(UnreadableFileError, match="a pipe"):
        read_array(str(tmp_path / "0.npy"))
