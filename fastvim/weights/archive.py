"""Torch's files, sealed: what is read is what was written.

Torch's zip format holds a CRC-32 of each record: of every tensor, and of the pickle with all else.
Torch computes them when it writes and does not look at them when it reads. The seal is a SHA-256 of
the names, places, sizes and CRC-32 of all records. It stands in the archive's comment, where torch
and other readers pass over it. Sealing a file costs milliseconds, whatever its size.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from fastvim.errors import MachineError, UserError
from fastvim.storage import problem, require_file, written

_MARK = b"fastvim sha256 "
# What reading damaged archives has been seen to raise, beside OSError.
_DAMAGE = (
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    LookupError,
    NotImplementedError,  # a bit that says compressed or encrypted
    RuntimeError,
    OverflowError,
    struct.error,
)


def write_archive(path: str | os.PathLike[str], content: Any) -> None:
    """Write what `torch.save` takes, sealed; complete or not at all, see `written`."""
    with written(path) as file:
        with _checksums():
            _save(content, file)
        with zipfile.ZipFile(file) as archive:
            comment = _MARK + seal(archive)
        # The last two bytes are the length of the comment, which torch leaves empty.
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", len(comment)) + comment)


def _save(content: Any, file: IO[bytes]) -> None:
    """`torch.save`, with the error of the disk where torch raises one of its own after it."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        earlier: BaseException | None = error
        while earlier is not None and not isinstance(earlier, OSError):
            earlier = earlier.__context__
        raise earlier or error from None


def check_archive(path: str | os.PathLike[str]) -> bool:
    """Compare a zip archive with its seal and its CRC-32; a file that did not change, only once.

    Returns:
        Whether it has a seal.

    Raises:
        UserError: it is damaged, or no zip archive.
    """
    require_file(path)
    path = os.path.realpath(path)
    try:
        now = os.stat(path)
        return _check(path, now.st_ino, now.st_size, now.st_mtime_ns)
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {problem(error)}") from error


@functools.lru_cache
def _check(path: str, *_status: int) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            sealed = archive.comment.startswith(_MARK)
            if sealed and archive.comment != _MARK + seal(archive):
                raise UserError(f"{path} is damaged: its list of records is not as written")
            records = [info for info in archive.infolist() if not info.compress_type]
            if sealed or any(info.CRC for info in records):  # torch can be told to compute none
                for info in records:
                    _read_through(archive, info)
    except UserError:
        raise
    except _DAMAGE as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not zipfile.is_zipfile(path):
            what = "it ends before its content does" if os.path.getsize(path) else "it is empty"
        raise UserError(f"{path} is damaged: {what}") from error
    return sealed


def _read_through(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Read a record, which compares its CRC-32."""
    with archive.open(info) as record:
        while record.read(1 << 20):
            pass


def seal(archive: zipfile.ZipFile) -> bytes:
    """SHA-256, in hexadecimal, of what the archive lists of its records."""
    listed = [
        (info.filename, info.header_offset, info.compress_type, info.file_size, info.CRC)
        for info in archive.infolist()
    ]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest().encode()


@contextmanager
def _checksums() -> Iterator[None]:
    """Have torch compute CRC-32, whatever the process has chosen for its own files."""
    chosen = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(chosen)


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a zip archive does."""
    with Path(path).open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
