"""The command line: `fastvim COMMAND …`.

Each command is imported when it is asked for, so that `fastvim --help` does not wait for Lightning.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from typing import NamedTuple

from fastvim.errors import UserError, nearest

Run = Callable[[list[str]], None]


class Command(NamedTuple):
    """A line of the help page, and how to get at the function that runs the command."""

    help: str
    load: Callable[[], Run]


def _train() -> Run:
    from fastvim_cli.train import run

    return run


def _predict() -> Run:
    from fastvim_cli.predict import run

    return run


def _reconstruct() -> Run:
    from fastvim_cli.reconstruct import run

    return run


def _segment() -> Run:
    from fastvim_cli.segment import run

    return run


def _detect() -> Run:
    from fastvim_cli.detect import run

    return run


def _convert() -> Run:
    from fastvim_cli.convert import run

    return run


def _models() -> Run:
    from fastvim_cli.models import run

    return run


def _benchmark() -> Run:
    from fastvim_cli.benchmark import run

    return run


def _data() -> Run:
    from fastvim_cli.data import run

    return run


def _channels() -> Run:
    from fastvim_cli.channels import run

    return run


# `fit`, `validate` and `test` are one module: it gets the command's name as the first argument.
COMMANDS = {
    "fit": Command("train a model as a recipe says", _train),
    "validate": Command("evaluate a checkpoint on the validation images", _train),
    "test": Command("evaluate a checkpoint on the test images", _train),
    "predict": Command("classify image files and folders", _predict),
    "reconstruct": Command("draw what a masked autoencoder makes of images", _reconstruct),
    "segment": Command("draw the class of every pixel of image files", _segment),
    "detect": Command("draw boxes and masks of the objects in image files", _detect),
    "channels": Command("evaluate channel models on subsets of the channels", _channels),
    "data": Command("check a recipe's images; mean and deviation of their channels", _data),
    "convert": Command("turn published weights into a safetensors file", _convert),
    "benchmark": Command("time models, each checked for correctness first", _benchmark),
    "models": Command("list the models and the engines that compute them", _models),
}
TRAINING = ("fit", "validate", "test")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    A mistake of the user is one line on standard error and code 2; `--debug`, anywhere, shows
    the traceback as well. A defect of ours keeps its traceback.

    Args:
        argv: the words after `fastvim`; those of the process when None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        _dispatch(words)
    except (UserError, FileNotFoundError) as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        sys.stderr.write(f"fastvim: error: {message}\n")
        return EXIT_USER_ERROR
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        advice = f"; {interrupt}" if str(interrupt) else ""
        sys.stderr.write(f"fastvim: interrupted{advice}\n")
        return EXIT_INTERRUPTED
    return 0


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help_page())
        return
    if words[0] == "--version":
        sys.stdout.write(f"fastvim {importlib.metadata.version('fastvim')}\n")
        return
    name, arguments = words[0], words[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'{nearest(name, COMMANDS)}; see fastvim --help")
    COMMANDS[name].load()(words if name in TRAINING else arguments)


def _help_page() -> str:
    lines = [f"  {name:<12} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastvim COMMAND [ARGUMENT …]",
            "",
            "Fast vision Mamba: train, evaluate and use.",
            "",
            *lines,
            "",
            "fastvim COMMAND --help tells a command's arguments. Everywhere:",
            "  --debug    show the traceback of an error",
            "  --version  print the version",
            "",
        ]
    )
