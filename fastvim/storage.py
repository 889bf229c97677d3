"""Files that are written completely or not at all, and what a disk refuses, in words."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastvim.errors import MachineError, UserError

if TYPE_CHECKING:
    from PIL import Image

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
}
_MISTAKES = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)  # of a path that was given
_LONGEST_NAME = 255  # bytes, of the usual file systems
_PART = ".part"
_ENDLESS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write and to read, which becomes `path` when the block ends without an error.

    `path` is then complete and on the disk. Until then, and after an error or a kill, it is what
    it was before. What a kill leaves is `NAME.part`, and the next writer of `path` takes it over.

    Args:
        path: the file; its folder is made if need be. A link is followed.

    Raises:
        MachineError: the disk is full or read-only, a permission is missing, or the like.
        UserError: `path` is a folder or a device, or below a file.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            raise UserError(f"cannot write {os.fspath(path)}: it is there, and is not a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _part_of(target)
        with _opened(part) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                part.replace(target)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        _sync_folder(target.parent)
    except OSError as error:
        raise refusal(path, error) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, as `written` does; of names that are not UTF-8 the bytes escaped."""
    with written(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def save_picture(path: str | os.PathLike[str], image: Image.Image) -> None:
    """Write a picture as PNG, as `written` does."""
    with written(path) as file:
        image.save(file, "PNG")


def save_figure(path: str | os.PathLike[str], figure: Any, **options: Any) -> None:
    """Write a `Figure` of matplotlib, in the format that the name ends in, as `written` does."""
    with written(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or "png", **options)


def require_file(path: str | os.PathLike[str]) -> None:
    """Raise UserError for a pipe, a socket or a device: what reads one may wait for ever.

    What is missing, or a folder, is left to the reader.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):
        return
    if kind in _ENDLESS:
        raise UserError(f"{os.fspath(path)}: {_ENDLESS[kind]}, expected a file")


def refusal(path: str | os.PathLike[str], error: OSError) -> UserError:
    """The error of a file that cannot be written, with what is safe."""
    kind = UserError if error.errno in _MISTAKES else MachineError
    kept = "; the file of this name stays as it was" if _exists(path) else ""
    return kind(f"cannot write {os.fspath(path)}: {problem(error)}{kept}")


def is_machine(error: OSError) -> bool:
    """Whether an error is one of a disk, a permission or the like, not of a wrong path."""
    return error.errno not in (None, errno.ENOENT, errno.EINVAL, *_MISTAKES)


def problem(error: OSError) -> str:
    """What a disk refuses, in words."""
    words = _WORDS.get(error.errno or 0)
    return words or " ".join(str(error.strerror or error).split())


def _exists(path: str | os.PathLike[str]) -> bool:
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):
        return False


def _part_of(path: Path) -> Path:
    """The name under which a file is written."""
    name = path.name + _PART
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32] + _PART
    return path.with_name(name)


@contextmanager
def _opened(part: Path) -> Iterator[IO[bytes]]:
    """An empty file under this name, which one process writes at a time."""
    while True:
        with open(part, "r+b", opener=_create) as file:
            _lock(file)
            if not _is_named(file, part):  # the process that had the lock renamed or removed it
                continue
            file.truncate()
            yield file
            return


def _lock(file: IO[bytes]) -> None:
    """Wait for other processes' locks on a file, where its file system has locks."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


@contextmanager
def alone(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let one process at a time into the block, and the others wait for it.

    Args:
        path: a file of no content that they share, in a folder that is there.
    """
    with open(path, "ab", opener=_create) as file:
        _lock(file)
        yield


def remove_parts(files: Iterable[Path]) -> None:
    """Remove those of some `NAME.part` that a kill has left: nobody is writing them.

    For files whose names are not written again; the next writer of a name takes its part over.
    """
    for part in files if fcntl is not None else ():
        with suppress(OSError), open(part, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _create(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_CREAT, 0o666)


def _is_named(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Have the new name on the disk as well."""
    if os.name == "nt":  # opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)
