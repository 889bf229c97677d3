"""`fastvim data check --config RECIPE`: what is wrong with a set of images, before a run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fastvim_cli.arguments import at_least
from fastvim_cli.console import track

if TYPE_CHECKING:
    from fastvim.data.issues import SplitReport

DESCRIPTION = """\
Reads all images of a recipe's data with boxes, or with a class for each pixel, and counts what is
wrong: missing files and annotations, unknown categories, boxes of zero size, values out of range,
images that cannot be read. Any value of the recipe can be overridden, as in fastvim fit:
fastvim data check --config recipes/coco/fastvim_tiny.yaml --data.root /path/to/coco
"""
ROLES = ("train", "val", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own; the others are the recipe's."""
    add = parser.add_argument
    add("--config", metavar="FILE", action="append", required=True, help="a recipe")
    add(
        "--workers",
        type=at_least(1),
        default=4,
        metavar="N",
        help="files read at a time (default: 4)",
    )
    add("--no-read", dest="read", action="store_false", help="look at the lists of files alone")


def check(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Check the training, validation and test images of a recipe.

    Args:
        arguments: of `add_arguments`.
        overrides: values of the recipe, as `fastvim fit` takes them.

    Raises:
        UserError: something is wrong that a run would stop at.
    """
    from fastvim.data.base import DataModule
    from fastvim.errors import UserError
    from fastvim_cli.train import load_data

    data = load_data([f"--config={file}" for file in arguments.config] + overrides)
    if not isinstance(data, DataModule):
        raise UserError(f"{type(data).__name__} cannot be checked")
    data.prepare_data()
    reports: dict[str, SplitReport] = {}
    for role in ROLES:
        report = data.check(role)
        reports.setdefault(report.split, report)
    for split, report in reports.items():
        if arguments.read:
            errors = report.read(arguments.workers)
            for error in track(errors, f"reading {split}", len(report.files)):
                if error is not None:
                    report.errors.add(error.kind, str(error))
        print(report)
    wrong = sum(n for report in reports.values() for n, _ in report.errors.values())
    if wrong:
        raise UserError(f"{wrong:,} mistakes would stop a run")
    if not any(report.dropped or report.warnings for report in reports.values()):
        print("nothing wrong")
