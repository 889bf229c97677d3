"""A published file, fetched once into the usual caches, or taken from the user's own folder."""

from __future__ import annotations

import errno
import hashlib
import http.client
import itertools
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastvim.errors import MachineError, UserError, one_line
from fastvim.storage import is_machine, problem

_logger = logging.getLogger(__name__)

WEIGHTS_FOLDER = "FASTVIM_WEIGHTS"  # environment variable: a folder of files under published names
_HUB = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 3
_PAUSE = 1.0  # seconds before the second attempt, twice as many before the third
_CHUNK = 1 << 20  # bytes
_TRANSIENT = (408, 429, 500, 502, 503, 504)
# What a connection that breaks raises, while it is opened or read.
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class _BrokenOffError(Exception):
    """The connection ended before the file did; what came lies in the part file."""


def cache_folder() -> Path:
    """Where this library keeps converted files and notes: `fastvim` below torch.hub's files."""
    return Path(torch.hub.get_dir()).expanduser() / "checkpoints" / "fastvim"


def fetch(url: str, sha256: str | None = None) -> Path:
    """The file behind an address: out of the user's folder, the cache, or the network.

    `FASTVIM_WEIGHTS` names a folder that is used instead of the network. Files of the Hugging Face
    hub lie in its own cache (`HF_HOME`), others where torch.hub keeps them (`TORCH_HOME`). A file
    appears complete or not at all; an interrupted download goes on where it stopped.

    Args:
        url: of the file.
        sha256: expected of a fetched file. None: the one noted when it was fetched first.

    Raises:
        UserError: the file cannot be had, or has other bytes than expected; with its address, and
            where to put it by hand.
    """
    file = url.rpartition("/")[2]
    if folder := os.environ.get(WEIGHTS_FOLDER):
        path = Path(folder).expanduser() / file
        if not path.is_file():
            raise UserError(
                f"{path} is missing: put {url} there, or unset {WEIGHTS_FOLDER} to fetch it"
            )
        return path
    hub = _HUB.fullmatch(url)
    try:
        path = _from_hub(url, *hub.groups()) if hub else _from_address(url, sha256)
        _compare(url, path, sha256)
    except OSError as error:
        kind = MachineError if is_machine(error) else UserError
        raise failure(url, disk_problem(error), kind) from error
    return path


def here(url: str) -> Path | None:
    """Where the file behind an address lies on this machine; None if it has to be fetched."""
    file = url.rpartition("/")[2]
    folder = os.environ.get(WEIGHTS_FOLDER)
    if not folder and (hub := _HUB.fullmatch(url)):
        from huggingface_hub import try_to_load_from_cache

        repository, revision, name = hub.groups()
        found = try_to_load_from_cache(repository, name, revision=revision)
        return Path(found) if isinstance(found, str) else None
    path = (Path(folder).expanduser() if folder else cache_folder().parent) / file
    return path if path.is_file() else None


def forget(url: str, path: Path) -> bool:
    """Remove a fetched file that turned out to be broken, and what was noted of it.

    Returns:
        Whether it was removed: a file of the user's own folder stays.
    """
    if os.environ.get(WEIGHTS_FOLDER):
        return False
    for each in (path.resolve(), path, _note(url)):  # the hub's cache has a link to the file
        each.unlink(missing_ok=True)
    return True


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def disk_problem(error: OSError) -> str:
    """What keeps the cache from being written, in words."""
    return f"{error.filename or cache_folder().parent}: {problem(error)}"


def failure(url: str, reason: str, kind: type[UserError] = UserError) -> UserError:
    """The error of a file that cannot be had."""
    file = url.rpartition("/")[2]
    return kind(
        f"cannot fetch {url}: {reason}; or put {file} by hand into a folder and set "
        f"{WEIGHTS_FOLDER} to that folder"
    )


def _from_hub(url: str, repository: str, revision: str, file: str) -> Path:
    """Through the hub's own client, which keeps its cache whole; of a cached file no question."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import LocalEntryNotFoundError

    where = (repository, file)
    try:
        return Path(hf_hub_download(*where, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(hf_hub_download(*where, revision=revision))
    except Exception as error:  # its versions use other HTTP libraries, and pass on their errors
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        raise failure(url, one_line(error.__cause__ or error)) from error


def _from_address(url: str, sha256: str | None) -> Path:
    """Into torch.hub's folder; one process fetches, others wait for it."""
    import filelock

    path = cache_folder().parent / url.rpartition("/")[2]
    if path.is_file():
        return path
    cache_folder().mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    tag = _etag_file(part)
    with filelock.FileLock(cache_folder() / f"{path.name}.lock"):
        if path.is_file():
            return path
        try:
            _download(url, part)
            tag.unlink(missing_ok=True)
            _compare(url, part, sha256)
            part.replace(path)
        except _BrokenOffError as error:
            raise failure(url, f"{error}; the same command goes on where it stopped") from error
        except OSError:
            tag.unlink(missing_ok=True)
            raise
        finally:
            if not tag.is_file():  # without the mark a download cannot go on
                part.unlink(missing_ok=True)
    return path


def _download(url: str, part: Path) -> None:
    """The whole file into `part`, in a few attempts that each go on where the last stopped."""
    for attempt in range(_ATTEMPTS):
        try:
            return _attempt(url, part)
        except _BrokenOffError:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_PAUSE * 2**attempt)


def _attempt(url: str, part: Path) -> None:
    from tqdm import tqdm

    headers, tag = {"User-Agent": "fastvim"}, _etag_file(part)
    have = part.stat().st_size if part.is_file() and tag.is_file() else 0
    if have:  # the rest, if the file is still the same; else all of it
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
    with _open(urllib.request.Request(url, headers=headers), tag) as response:
        goes_on = response.status == 206
        have = have if goes_on else 0
        chunks = _chunks(response)
        first = next(chunks, b"")
        _check_answer(url, response, have, first)
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        tag.unlink(missing_ok=True)
        etag = response.headers.get("ETag", "")
        if etag.startswith('"'):  # a weak one does not tell equal bytes
            tag.write_text(etag)
        bar = tqdm(
            desc=url.rpartition("/")[2],
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            disable=None,  # no bar but on a terminal
        )
        with part.open("ab" if goes_on else "wb") as stream, bar:
            for chunk in itertools.chain([first], chunks):
                stream.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    if total is not None and have != total:
        raise _BrokenOffError(f"{have:,} of {total:,} bytes came")


def _open(request: urllib.request.Request, tag: Path) -> Any:
    """The answer of a server that has the file; proxies are those of the environment."""
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        answer = f"the server answers {error.code} {error.reason}"
        if error.code == 416:  # the part is as long as the file, or longer
            tag.unlink(missing_ok=True)
        if error.code in (416, *_TRANSIENT):
            raise _BrokenOffError(answer) from error
        raise failure(request.full_url, answer) from error
    except _BROKEN as error:
        raise _BrokenOffError(one_line(getattr(error, "reason", error))) from error


def _check_answer(url: str, response: Any, start: int, first: bytes) -> None:
    """The bytes begin where they were asked for, and are not a web page."""
    markup = start == 0 and first.lstrip()[:1] == b"<"
    if markup or response.headers.get_content_type() == "text/html":
        raise failure(url, "the answer is a web page, not the file (a login page?)")
    told = response.headers.get("Content-Range", "")
    if start and not told.startswith(f"bytes {start}-"):
        raise failure(url, f"the server sends {told or 'no range'}, not the bytes from {start} on")


def _chunks(response: Any) -> Iterator[bytes]:
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except _BROKEN as error:
        raise _BrokenOffError(f"the connection broke: {one_line(error)}") from error


def _compare(url: str, path: Path, sha256: str | None) -> None:
    """Compare a fetched file with the known checksum, or the noted one; note it the first time."""
    note = _note(url)
    status, noted = path.stat(), _read_note(note, url)
    now = {"url": url, "size": status.st_size, "time": status.st_mtime_ns}
    if noted is not None and now.items() <= noted.items():
        return
    found = digest(path)
    if noted is not None and noted["sha256"] != found:
        raise UserError(
            f"{url} has other bytes than when it was fetched first: SHA-256 {found}, then "
            f"{noted['sha256']}; remove {note} to accept them, {path} to fetch it again"
        )
    if noted is None and sha256 not in (None, found):
        raise UserError(
            f"{url} has SHA-256 {found}, expected {sha256}: to use it all the same, put it into "
            f"a folder and set {WEIGHTS_FOLDER} to that folder"
        )
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({**now, "sha256": found}))
    except OSError as error:
        note.unlink(missing_ok=True)
        _logger.warning("the checksum of %s is not noted: %s", path, disk_problem(error))


def _note(url: str) -> Path:
    """Where size, time and checksum of a fetched file are noted."""
    return cache_folder() / f"{url.rpartition('/')[2]}.json"


def _read_note(note: Path, url: str) -> dict[str, Any] | None:
    """What was noted of this address; None for a note that is missing, damaged or of another."""
    try:
        noted = json.loads(note.read_text())
        return noted if noted["url"] == url and noted["sha256"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _etag_file(part: Path) -> Path:
    """Where the server's mark of a part file's version stands."""
    return part.with_name(part.name + ".etag")
