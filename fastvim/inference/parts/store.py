"""Where parts lie: a folder or an address of fsspec. A file is there whole or not at all."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from fastvim.data.remote import filesystem, is_url, join, retried
from fastvim.errors import UserError

_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")  # of fsspec's listings


def open_store(root: str) -> Store:
    """The store at a path, or at an address such as `s3://BUCKET/FOLDER`."""
    root = root.removeprefix("file://")
    if is_url(root):
        return Address(root.rstrip("/"))
    return Folder(os.path.expanduser(root))


@dataclass
class Draft:
    """A file that is being filled, and the name that it takes where no error ends it."""

    file: IO[bytes]
    name: str


@dataclass(frozen=True)
class Store(ABC):
    """A flat folder of files.

    Args:
        root: its path or address.
    """

    root: str

    def below(self, folder: str) -> Store:
        """A folder in this one."""
        return type(self)(self.path(folder))

    def path(self, name: str) -> str:
        """Path or address of a file."""
        return join(self.root, name)

    @abstractmethod
    def times(self) -> dict[str, float]:
        """The names of the files, and when each was written, in seconds since 1970."""

    @abstractmethod
    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes of a file from `start` up to `end`."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """A file, open to be read here and there."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file whole."""

    @abstractmethod
    def write_first(self, name: str, content: bytes) -> None:
        """Write a file whole, unless another process has done so."""

    @abstractmethod
    def writing(self, name: str = "") -> AbstractContextManager[Draft]:
        """A file to fill, of any size; a name that its content decides is set before the end."""


class Folder(Store):
    """A folder of this machine, or of a file system that machines share."""

    def times(self) -> dict[str, float]:
        try:
            with os.scandir(self.root) as entries:
                return {entry.name: entry.stat().st_mtime for entry in entries}
        except FileNotFoundError:
            return {}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        with open(self.path(name), "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def open(self, name: str) -> IO[bytes]:
        return open(self.path(name), "rb")

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as draft:
            draft.file.write(content)

    def write_first(self, name: str, content: bytes) -> None:
        with self._complete() as (part, file):
            file.write(content)
            _to_disk(file)
            try:
                os.link(part, self.path(name))  # fails where there is one, unlike a renaming
            except FileExistsError:
                return
            except OSError:  # a file system without links
                if not os.path.exists(self.path(name)):
                    part.replace(self.path(name))

    @contextmanager
    def writing(self, name: str = "") -> Iterator[Draft]:
        with self._complete() as (part, file):
            yield (draft := Draft(file, name))
            _to_disk(file)
            part.replace(self.path(draft.name))

    @contextmanager
    def _complete(self) -> Iterator[tuple[Path, IO[bytes]]]:
        """A file that is gone afterwards, unless it was renamed."""
        Path(self.root).mkdir(parents=True, exist_ok=True)
        part = Path(self.path(f".{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"))
        try:
            with part.open("wb") as file:
                yield part, file
        finally:
            part.unlink(missing_ok=True)


class Address(Store):
    """A folder behind fsspec. Each file is one write, which its server makes visible at its end."""

    def times(self) -> dict[str, float]:
        def listed() -> list[dict[str, Any]]:
            opened.invalidate_cache(root)  # other machines write too
            try:
                return opened.ls(root, detail=True)
            except FileNotFoundError:
                return []

        opened, root = self._opened()
        found = retried(listed, self.root)
        return {entry["name"].rstrip("/").rpartition("/")[2]: _seconds(entry) for entry in found}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        opened, root = self._opened()
        path = f"{root}/{name}"
        return retried(lambda: opened.cat_file(path, start=start, end=end), self.path(name))

    def open(self, name: str) -> IO[bytes]:
        opened, root = self._opened()
        return retried(lambda: opened.open(f"{root}/{name}", "rb"), self.path(name))

    def write(self, name: str, content: bytes) -> None:
        opened, root = self._opened()
        self._put(lambda: opened.pipe_file(f"{root}/{name}", content), name)

    def write_first(self, name: str, content: bytes) -> None:
        if name not in self.times():
            self.write(name, content)

    @contextmanager
    def writing(self, name: str = "") -> Iterator[Draft]:
        opened, root = self._opened()
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, "draft")
            with open(local, "wb") as file:
                yield (draft := Draft(file, name))
            self._put(lambda: opened.put_file(local, f"{root}/{draft.name}"), draft.name)

    def _put(self, action: Any, name: str) -> None:
        try:
            retried(action, self.path(name))
        except NotImplementedError as error:
            raise UserError(f"{self.root}: cannot be written to, expected a folder") from error

    def _opened(self) -> tuple[Any, str]:
        opened = filesystem(self.root, {})
        return opened, opened._strip_protocol(self.root).rstrip("/")


def _seconds(entry: dict[str, Any]) -> float:
    """When a file of fsspec's listings was written; now where the listing does not say."""
    for key in _TIMES:
        if isinstance(told := entry.get(key), datetime):
            return told.timestamp()
        if isinstance(told, (int, float)):
            return float(told)
    return time.time()


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
