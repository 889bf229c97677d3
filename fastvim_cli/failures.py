"""What ends a command, as one line: mistakes of the user, failures of the machine, the unexpected.

Nothing here imports the library: a command that fails early need not wait for it.
"""

from __future__ import annotations

import argparse
import errno
import json
import locale
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from fastvim_cli.arguments import UsageError
from fastvim_cli.console import printable

EXIT_FAILURE = 1  # of the machine, or of a program
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130

MOST_CHARACTERS = 1000  # of a line
# Errors of the operating system that another input may avoid; the rest are the machine's.
_MISTAKES = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL)


class Ended(Exception):
    """A command ends before its work is done, as it was told to.

    Args:
        line: for the user; empty where another process tells.
        code: exit code.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line, code)
        self.line, self.code = line, code


class Failure(NamedTuple):
    """A line for the user, and the exit code."""

    line: str
    code: int


def explained(error: Exception) -> Failure:
    """What an error that ends a command says to the user."""
    failure = _expected(error) or _unexpected(error)
    return failure._replace(line=_one_line(failure.line))


def _expected(error: Exception) -> Failure | None:
    """A mistake in the input or a failure of the machine; None for any other error."""
    if isinstance(error, ModuleNotFoundError):
        from fastvim.extras import needed_extra

        needed = needed_extra(error)
        return Failure(needed, EXIT_MISTAKE) if needed else None
    library = sys.modules.get("fastvim.errors")  # imported, if it raised the error
    if told := in_worker(error):
        name, message = told
        mistaken = name.startswith("fastvim.") and name.endswith("Error")
        return Failure(message, EXIT_MISTAKE) if mistaken else None
    mistakes = (UsageError, argparse.ArgumentError)
    if isinstance(error, mistakes) or (library and isinstance(error, library.UserError)):
        machine = library is not None and isinstance(error, library.MachineError)
        return Failure(str(error), EXIT_FAILURE if machine else EXIT_MISTAKE)
    if lost := re.match(r"DataLoader worker \((.*?)\) (.*)", str(error), re.DOTALL):
        text = f"a worker of the loader was lost ({lost[1]}): it {lost[2]}"
        return Failure(text, EXIT_FAILURE)
    if _is_out_of_memory(error):
        return Failure(f"not enough memory: {error or 'for an array'}", EXIT_FAILURE)
    if isinstance(error, OSError) and error.errno is not None:
        place = "" if error.filename is None else f"{error.filename}: "
        code = EXIT_MISTAKE if error.errno in _MISTAKES else EXIT_FAILURE
        return Failure(f"{place}{error.strerror}", code)
    encoding = locale.getpreferredencoding(False)
    if isinstance(error, UnicodeError) and encoding.lower() != "utf-8":
        text = f"{error}: text is {encoding} here; PYTHONUTF8=1 in the environment makes it UTF-8"
        return Failure(text, EXIT_FAILURE)
    if isinstance(error, FileNotFoundError):
        return Failure(str(error), EXIT_MISTAKE)
    return None


def in_worker(error: BaseException) -> tuple[str, str] | None:
    """Name and message of an error of a loader's worker, which torch puts into a text."""
    _, wrapped, text = str(error).rpartition("Original Traceback (most recent call last):\n")
    found = re.search(r"^([\w.]+)(?:: (.*))?\Z", text.rstrip(), re.MULTILINE | re.DOTALL)
    return (found[1], found[2] or "") if wrapped and found else None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory could not be had; torch says it of a CPU's in words alone."""
    words = ("DefaultCPUAllocator", "CUDA out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _unexpected(error: Exception) -> Failure:
    """An error that nothing above explains: what it is, and where it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    name, message = in_worker(error) or (type(error).__name__, str(error))
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    text = f"unexpected {name}: {message}{place}; --debug shows the traceback"
    return Failure(text, EXIT_FAILURE)


def _one_line(text: str) -> str:
    """A text in one line that is not endless."""
    text = " ".join(text.split())
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS - 200]} … {text[-200:]}"
    return printable(text)


def tell_torchrun(line: str) -> None:
    """Write the line where torchrun's report, the last on the terminal, takes its cause from."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        quoted = {"py_callstack": f"fastvim: error: {line}", "timestamp": str(int(time.time()))}
        error = {"message": {"message": line, "extraInfo": quoted}}
        Path(file).write_text(json.dumps(error))
