"""Arguments of the commands that are not Lightning's. Nothing here imports torch early."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch


MOST_SIDE = 1 << 16  # pixels that an image is resized to, or seen at once
MOST_SEED = 2**32 - 1


class UsageError(Exception):
    """A mistake on the command line; argparse would catch an error of its own kind again."""


class Parser(argparse.ArgumentParser):
    """argparse's parser, with mistakes as exceptions, which `main` prints in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option `--device`, for `usable_device`."""
    parser.add_argument("--device", metavar="DEVICE", help="default: cuda where there is one")


def usable_device(name: str | None) -> torch.device:
    """The device of that name; None for a GPU where there is one, else the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    from fastvim.errors import UserError

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable on this machine") from error
    if device.type == "meta":
        raise UserError(f"--device {name}: computes nothing; expected cpu or a GPU")
    return device


def local_path(text: str) -> Path:
    """A path with its `~` expanded: in `--out=~/x` the shell does not do it."""
    return Path(os.path.expanduser(text))


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """Parses a whole number of at least this, and at most that."""

    def number(text: str) -> int:
        with suppress(ValueError):
            if least <= int(text) and (most is None or int(text) <= most):
                return int(text)
        expected = f"{least} or more" if most is None else f"{least} to {most}"
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")

    return number


def number_where(allowed: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """Parses a number that is allowed; `expected` says in a message which are."""

    def number(text: str) -> float:
        with suppress(ValueError):
            if allowed(float(text)):
                return float(text)
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")

    return number
