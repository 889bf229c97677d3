"""The command line: `fastvim COMMAND …`.

A command's module imports the library when the command runs, so that help needs no torch.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import io
import os
import select
import sys
import time
from typing import NamedTuple

from fastvim_cli.arguments import UsageError
from fastvim_cli.console import escape_logs, note
from fastvim_cli.failures import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    Ended,
    explained,
    tell_torchrun,
)
from fastvim_cli.imports import without_collections
from fastvim_cli.interrupts import interruptible


class Command(NamedTuple):
    """A line of the help page, and the module here whose `run` takes the command's arguments."""

    help: str
    module: str


# `fit`, `validate` and `test` are one module: it gets the command's name as the first argument.
COMMANDS = {
    "fit": Command("train a model as a recipe says", "train"),
    "validate": Command("evaluate a checkpoint on the validation images", "train"),
    "test": Command("evaluate a checkpoint, or published weights, on the test images", "train"),
    "predict": Command("classify image files and folders", "predict"),
    "reconstruct": Command("draw what a masked autoencoder makes of images", "reconstruct"),
    "segment": Command("draw the class of every pixel of image files", "segment"),
    "detect": Command("draw boxes and masks of the objects in image files", "detect"),
    "channels": Command("evaluate channel models on subsets of the channels", "channels"),
    "data": Command("check a recipe's images; mean and deviation of their channels", "data"),
    "convert": Command("turn published weights into a safetensors file", "convert"),
    "export": Command("write a model as ONNX or another program that runs alone", "export"),
    "benchmark": Command("time models, each checked for correctness first", "benchmark"),
    "models": Command("list the models and the engines that compute them", "models"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    What ends a command is one line on standard error: of a mistake of the user with code 2, of the
    machine, as a full disk, with code 1, of Ctrl-C with code 130. `--debug`, anywhere, shows the
    traceback instead. A reader of the output that has closed it ends the command without a word.

    Args:
        argv: the words after `fastvim`; those of the process when None.
    """
    parent = os.getppid()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be any bytes
    escape_logs()
    try:
        with interruptible():
            code = _dispatch(words)
            sys.stdout.flush()
        return code
    except Ended as end:
        if end.line:
            note(f"fastvim: {end.line}")
            tell_torchrun(end.line)
        return end.code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _closed_output():
            return EXIT_FAILURE
        if debug:
            raise
        line, code = explained(error)
        if not _told_by(parent):
            print(f"fastvim: error: {line}", file=sys.stderr)
        tell_torchrun(line)
        return code
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        advice = f"; {interrupt}" if str(interrupt) else ""
        print(f"fastvim: interrupted{advice}", file=sys.stderr)
        exec("")  # or Python ends by the signal, where it broke off code that was a text, as here
        return EXIT_INTERRUPTED


def _closed_output() -> bool:
    """Whether the reader of the output has closed it, as `| head` does; the rest goes nowhere."""
    output, poll = sys.stdout.fileno(), select.poll()
    poll.register(output, select.POLLOUT)
    closed = any(events & select.POLLERR for _, events in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # Python flushes at its end as well
    return closed


def _told_by(parent: int) -> bool:
    """Whether the first process of a run told what stops this one, which it had started.

    A mistake in an option stops all processes, with one and the same line. One that stops this
    process alone leaves the first process waiting.

    Args:
        parent: the process that started this one.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for _ in range(0 if first else 30):
        if os.getppid() != parent:
            return True
        time.sleep(0.1)
    return False


def _dispatch(words: list[str]) -> int:
    """Run the command that the words name; what it returns is the exit code, None for 0."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help_page())
        return 0
    if words[0] == "--version":
        print(f"fastvim {importlib.metadata.version('fastvim')}")
        return 0
    name, arguments = words[0], words[1:]
    if name not in COMMANDS:
        matches = difflib.get_close_matches(name, COMMANDS, n=1)
        near = f" (nearest: {matches[0]})" if matches else ""
        raise UsageError(f"unknown command '{name}'{near}; see fastvim --help")
    module = COMMANDS[name].module
    # Of a connection that ends torch warns with pages of its own frames; our errors say it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with without_collections():
        run = importlib.import_module(f"fastvim_cli.{module}").run
    return run(words if module == "train" else arguments) or 0


def _help_page() -> str:
    commands = [f"  {name:<12} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastvim COMMAND [ARGUMENT …]",
            "",
            "Fast vision Mamba: train, evaluate and use.",
            "",
            *commands,
            "",
            "fastvim COMMAND --help tells a command's arguments. Everywhere:",
            "  --debug    show the traceback of an error",
            "  --version  print the version",
        ]
    )
