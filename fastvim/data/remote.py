"""Read a local or remote file, retrying transient errors."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastvim.data.pixels import DAMAGED
from fastvim.errors import UserError
from fastvim.extras import install
from fastvim.storage import require_file

_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

TIMEOUT = 300.0  # seconds of one attempt at a URL
S3 = ("s3://", "s3a://")
RETRIED_STATUS = (408, 429)  # HTTP statuses, as well as 500 and above
# Permanent errors: never retried.
PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
)
PERMANENT_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")
NETWORK_LIBRARIES = ("aiobotocore", "aiohttp", "botocore", "fsspec", "http", "urllib3")


class UnreadableFileError(UserError):
    """A file that cannot be fetched or decoded."""

    kind = DAMAGED

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's error with the traceback as message: keep the last line.
        line = message.strip().rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(" ".join(line.split()))


def is_url(path: str) -> bool:
    """Whether fsspec opens the path, as in `s3://BUCKET/KEY` or `simplecache::s3://BUCKET/KEY`."""
    return "://" in path or "::" in path


def join(root: str, path: str) -> str:
    """`path` below `root`, a directory or a URL; an absolute path or a URL stays as it is."""
    if is_url(path):
        return path
    path = os.path.expanduser(path)
    if not root or os.path.isabs(path):
        return path
    if is_url(root):
        return f"{root.rstrip('/')}/{path}"
    return str(Path(os.path.expanduser(root), path))


def read_bytes(
    url: str,
    *,
    attempts: int = 4,
    wait: float = 0.5,
    storage_options: dict[str, Any] | None = None,
) -> bytes:
    """The content of a file.

    Refused and broken connections, time-outs, answers of a server in trouble (408, 429, 5xx) and
    bodies shorter than announced are tried again after `wait`, `2 * wait`, `4 * wait`, … seconds;
    a missing or forbidden file is not. The retries of S3's libraries are turned off, but aiohttp
    repeats a request once when the server drops the connection. Every process opens its own
    connections, so the workers of a DataLoader may call this.

    Args:
        url: a local path, or a URL of any protocol that fsspec knows, chains such as
            `simplecache::s3://BUCKET/KEY` included.
        attempts: at least 1.
        wait: seconds before the second attempt, at least 0.
        storage_options: arguments of the fsspec filesystem, such as `{"anon": True}` for S3.

    Raises:
        UnreadableFileError: naming the URL, the attempts and the last error.
        UserError: for an argument out of range, options or a protocol that fsspec does not know,
            or a package that is not installed.
    """
    if is_url(url):
        return retried(lambda: _fetch(url, storage_options or {}), url, attempts, wait)
    if "\0" in url:
        raise UnreadableFileError(f"{url}: no such file: no name holds a NUL")
    path = Path(os.path.expanduser(url))
    try:
        require_file(path)
    except UserError as error:
        raise UnreadableFileError(str(error)) from error
    return retried(path.read_bytes, url, attempts, wait)


def retried(
    action: Callable[[], _Result], url: str, attempts: int = 4, wait: float = 0.5
) -> _Result:
    """What `action` returns, tried again as `read_bytes` says, with its errors.

    Args:
        action: on the file.
        url: of the file, for messages.
        attempts: at least 1.
        wait: seconds before the second attempt, at least 0.
    """
    if attempts < 1 or wait < 0:
        raise UserError(f"attempts {attempts}, wait {wait}: expected at least 1 and at least 0")
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            status = _http_status(error)
            reason = f"{type(error).__name__}: {error}"
            if not _is_of_file(error, status):
                raise
            if not _is_transient(error, status):
                raise UnreadableFileError(f"{url}: {_explain(error, status)}") from error
            if attempt == attempts:
                times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
                raise UnreadableFileError(f"{url}: unreadable in {times} ({reason})") from error
            _logger.debug("%s: attempt %d of %d failed: %s", url, attempt, attempts, reason)
            time.sleep(wait * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _fetch(url: str, storage_options: dict[str, Any]) -> bytes:
    opened = filesystem(url, storage_options)
    limit = {"timeout": TIMEOUT} if opened.async_impl else {}
    return opened.cat_file(opened._strip_protocol(url), **limit)


# Keyed by process, thread, server and options. A worker must neither use nor close a connection of
# its parent: a fork shares the parent's event queue, so closing it there closes it for both.
_filesystems: dict[tuple[Any, ...], Any] = {}


def filesystem(url: str, storage_options: dict[str, Any]) -> Any:
    """The fsspec filesystem of a URL, made once for each thread of each process."""
    protocol, _, rest = url.rpartition("::")[2].partition("://")
    place = (url.rpartition("::")[0], protocol, rest.partition("/")[0])
    key = (os.getpid(), threading.get_ident(), *place, repr(storage_options))
    if key not in _filesystems:
        options = {"skip_instance_cache": True, **storage_options}
        if url.startswith(S3):
            options.setdefault("max_concurrency", 1)  # else a second request asks for the size
            once = {"retries": {"total_max_attempts": 1}}
            options["config_kwargs"] = once | options.get("config_kwargs", {})
        try:
            import fsspec

            _filesystems[key], _ = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise UserError(f"{url}: {error}; {install('microscopy')}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{url}: cannot be opened: {error}") from error
        if url.startswith(S3):
            _filesystems[key].retries = 1
    return _filesystems[key]


def _http_status(error: BaseException) -> int | None:
    """The HTTP status that an error carries."""
    for name in ("status", "status_code", "code"):  # aiohttp, Azure, Google
        if isinstance(status := getattr(error, name, None), int) and 100 <= status < 600:
            return status
    # s3fs raises an OSError with botocore's error as its cause.
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None


def _is_of_file(error: Exception, status: int | None) -> bool:
    """Whether the file or the network is at fault, as opposed to a bug."""
    library = type(error).__module__.partition(".")[0]
    return status is not None or isinstance(error, OSError) or library in NETWORK_LIBRARIES


def _is_transient(error: Exception, status: int | None) -> bool:
    """Whether the error is transient."""
    if status is not None and status != 200:
        return status >= 500 or status in RETRIED_STATUS
    return not isinstance(error, PERMANENT) and type(error).__name__ not in PERMANENT_NAMES


def _explain(error: Exception, status: int | None) -> str:
    if isinstance(error, FileNotFoundError) or status == 404:
        return "no such file"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"access denied ({error})"
    return f"{type(error).__name__}: {error}"
