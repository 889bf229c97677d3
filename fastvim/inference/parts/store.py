"""Where parts lie: a folder or an address of fsspec. A file is there whole or not at all."""

from __future__ import annotations

import os
import shutil
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
from fastvim.storage import written

_DRAFT = "draft-"  # begins the name of a file without a name yet
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

    def tidy(self) -> None:  # noqa: B027  # most stores leave nothing behind
        """Remove what killed processes have begun."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the folder with all its files."""

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
        draft = self._draft()
        with written(draft) as file:
            file.write(content)
        try:
            os.link(draft, self.path(name))  # fails where there is one, unlike a renaming
        except FileExistsError:
            return
        except OSError:  # a file system without links
            if not os.path.exists(self.path(name)):
                os.replace(draft, self.path(name))
        finally:
            Path(draft).unlink(missing_ok=True)

    def tidy(self) -> None:
        for path in Path(self.root).glob(f"{_DRAFT}{socket.gethostname()}-*"):
            if not _is_alive(path.name.removesuffix(".part").rpartition("-")[2]):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    @contextmanager
    def writing(self, name: str = "") -> Iterator[Draft]:
        path = self.path(name) if name else self._draft()
        with written(path) as file:
            yield (draft := Draft(file, name))
        if draft.name != name:
            os.replace(path, self.path(draft.name))

    def _draft(self) -> str:
        """A path that no other process uses."""
        return self.path(f"{_DRAFT}{socket.gethostname()}-{os.getpid()}")


def _is_alive(process: str) -> bool:
    """Whether a process of this machine may still run."""
    if os.name != "posix" or not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


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

    def remove(self) -> None:
        opened, root = self._opened()
        retried(lambda: opened.rm(root, recursive=True), self.root)

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
