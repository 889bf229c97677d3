"""Arguments of the commands that are not Lightning's."""

from __future__ import annotations

import argparse
from typing import NoReturn

import torch

from fastvim.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError: one line and exit code 2, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def usable_device(name: str) -> torch.device:
    """The device of that name, or a UserError where this machine has none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable on this machine") from error
