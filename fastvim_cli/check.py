"""`fastvim data check --config RECIPE`: what is wrong with a set of images, before a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

from fastvim_cli.arguments import at_least
from fastvim_cli.console import track

if TYPE_CHECKING:
    from fastvim.data.files import UnreadableImageError
    from fastvim.data.issues import Readable, SplitReport

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
    """Examine the training, validation and test images of a recipe.

    Args:
        arguments: of `add_arguments`.
        overrides: values of the recipe, as `fastvim fit` takes them.

    Raises:
        UserError: something is wrong that a run would stop at.
    """
    from fastvim.data.base import DataModule
    from fastvim.data.dense_data import MISSING_IMAGE
    from fastvim.errors import UserError
    from fastvim_cli.train import TrainingCLI

    words = [f"--config={file}" for file in arguments.config] + overrides
    data = TrainingCLI("validate", [*words, "--trainer.accelerator=cpu"]).datamodule
    if not isinstance(data, DataModule):
        raise UserError(f"{type(data).__name__} cannot be checked")
    data.prepare_data()
    reports: dict[str, SplitReport] = {}
    for role in ROLES:
        report = data.check(role)
        reports.setdefault(report.split, report)
    for split, report in reports.items():
        if arguments.read:
            failures = _read(report.files, arguments.workers)
            for failure in track(failures, f"reading {split}", len(report.files)):
                # The lists have told of missing files.
                if failure is not None and failure.kind != MISSING_IMAGE:
                    report.errors.add(failure.kind, str(failure))
        facts = ", ".join(f"{number:,} {what}" for what, number in report.facts.items())
        lines = [f"{split}: {facts}"]
        for kind, (number, first) in report.errors.items():
            lines.append(f"  {number:,} x {kind}, first: {first}")
        for kind, (number, first) in report.dropped.items():
            lines.append(f"  {number:,} x {kind}, left out in training, first: {first}")
        print("\n".join(lines))
    wrong = sum(n for one in reports.values() for n, _ in one.errors.values())
    if wrong:
        raise UserError(f"{wrong:,} mistakes would stop a run")
    if not any(one.dropped for one in reports.values()):
        print("nothing wrong")


def _read(files: Readable, workers: int) -> Iterator[UnreadableImageError | None]:
    """What is wrong with each sample, in their order."""

    from fastvim.data.files import UnreadableImageError

    def read(index: int) -> UnreadableImageError | None:
        try:
            files.read(index)
        except UnreadableImageError as error:
            return error
        return None

    remaining = iter(range(len(files)))
    with ThreadPoolExecutor(workers) as pool:
        while portion := list(islice(remaining, 8 * workers)):
            yield from pool.map(read, portion)
