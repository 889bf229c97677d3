"""The argument parser of the commands that are not Lightning's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fastvim.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError: one line and exit code 2, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")
