"""`fastvim data check --config RECIPE`: what is wrong with a set of images, before a run."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastvim_cli.arguments import at_least
from fastvim_cli.console import note, say, track

if TYPE_CHECKING:
    from fastvim.data.base import DataModule

DESCRIPTION = """\
Opens all images of a recipe's data as training would, and prints their sizes, modes and classes,
what is wrong (files that are missing, damaged or of another kind, labels that say nothing), what
looks odd, and how the splits compare. Exit code 2 where training would go wrong. Any value of the
recipe can be overridden, as in fastvim fit:
fastvim data check --config recipes/coco/fastvim_tiny.yaml --data.root /path/to/coco
"""

SHOWN = 12  # samples in a picture

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own; the others are the recipe's."""
    add = parser.add_argument
    add("--config", metavar="FILE", action="append", required=True, help="a recipe")
    help = "files read at a time (default: 4)"
    add("--workers", type=at_least(1), default=4, metavar="N", help=help)
    add("--no-read", dest="read", action="store_false", help="look at the lists of files alone")
    help = "folder for a picture of a few samples with their labels, as training sees them"
    add("--out", metavar="DIR", help=help)


def check(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Check the training, validation and test images of a recipe.

    Args:
        arguments: of `add_arguments`.
        overrides: values of the recipe, as `fastvim fit` takes them.

    Raises:
        UserError: something is wrong that a run would stop at.
    """
    from fastvim.data.base import DataModule
    from fastvim.data.checks import check_data, findings
    from fastvim.errors import UserError, counted
    from fastvim_cli.train import load_data, options_as_written
    from fastvim_cli.train.own_code import own_errors

    words = [f"--config={file}" for file in arguments.config] + overrides
    data, with_labels, config = load_data(words)
    if not isinstance(data, DataModule):
        raise UserError(f"{type(data).__name__} cannot be checked")
    sample, workers = None if arguments.read else 0, arguments.workers
    with own_errors(config), options_as_written(config):
        data.prepare_data()
        reports = check_data(
            data, sample=sample, workers=workers, with_labels=with_labels, watch=track
        )
    say(*"\n".join(map(str, reports)).split("\n"))
    errors, warnings, left_out = findings(reports)
    if arguments.out:
        try:
            say(f"samples in {_draw(data, arguments.out, with_labels)}")
        except UserError as error:
            note(f"no picture of samples: {error}")
    if errors:
        wrong = sum(number for number, _ in errors.values())
        raise UserError(f"{counted(wrong, 'mistakes')} would stop a run: {errors}")
    if left_out:
        say(f"left out: {left_out}")
    elif not warnings:
        print("nothing wrong")


def check_before_fit(data: DataModule, with_labels: bool) -> None:
    """The short form of the check, at the start of a run: pixels of a sample of the files.

    Args:
        data: of the run.
        with_labels: whether training uses the labels.

    Raises:
        UserError: something is wrong that the run would stop at, or would learn.
    """
    from fastvim.data.checks import SAMPLE, check_data, findings
    from fastvim.errors import UserError

    data.prepare_data()
    reports = check_data(data, ("train", "val"), sample=SAMPLE, with_labels=with_labels)
    errors, warnings, _ = findings(reports)
    if errors:
        raise UserError(f"{errors}; see fastvim data check")
    for report in reports:
        for kind, issue in report.left_out.items():
            warnings[f"{report.split}: {kind}, left out"] = issue
        if report.skips:  # what the lists drop is said when they are opened
            for kind, issue in report.dropped.items():
                warnings[f"{report.split}: {kind}, left out in training"] = issue
    for kind, (number, first) in warnings.items():
        _logger.warning("%s: %d, first: %s; see fastvim data check", kind, number, first)


def _draw(data: DataModule, out: str, with_labels: bool) -> Path:
    """Draw a few training samples of the first epoch; returns the picture's path."""
    from fastvim.data.checks import training_samples
    from fastvim.pictures.samples import draw_samples
    from fastvim.storage import save_picture

    samples = training_samples(data, SHOWN)
    names = data.class_names if with_labels else []
    mean, std = getattr(data, "mean", (0.0,)), getattr(data, "std", (1.0,))
    path = Path(os.path.expanduser(out), "train.png")
    save_picture(path, draw_samples(samples, names, mean, std, "training samples with labels"))
    return path
