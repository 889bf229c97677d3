"""`fastvim fit`, `validate` and `test`: the commands whose options come from classes."""

from __future__ import annotations

import logging
import warnings

import lightning as L
import torch
from jsonargparse import Namespace

from fastvim.benchmark.fit_speed import FitSpeed
from fastvim.errors import UserError
from fastvim_cli.console import say
from fastvim_cli.train import timed
from fastvim_cli.train.cli import DataCLI, TrainingCLI
from fastvim_cli.train.config_errors import options_as_written
from fastvim_cli.train.published import as_published

__all__ = ["TrainingCLI", "load_data", "options_as_written", "run", "time_fit"]


def run(words: list[str]) -> None:
    """Run one of the three commands.

    Args:
        words: the command's name, then its arguments. `validate` and `test` take the name of
            published weights as the first of them, in place of a configuration.

    Raises:
        UserError: see `TrainingCLI.execute` and `as_published`.
    """
    _quiet()
    command, *arguments = words
    if command == "fit" or not arguments or arguments[0].startswith("-"):
        TrainingCLI(command, arguments).execute()
        return
    if not arguments[1:]:
        raise UserError(f"fastvim {command} {arguments[0]}: expected --data.root DIR as well")
    published = as_published(arguments[0])
    cli = TrainingCLI(command, arguments[1:], published.configuration)
    results = cli.execute()
    if cli.trainer.is_global_zero:
        say(*published.compare(results))


def load_data(words: list[str]) -> tuple[L.LightningDataModule, bool, Namespace]:
    """The data module of a recipe, whether labels are used, and the recipe.

    Args:
        words: `--config=FILE`, and values that override the recipe's.

    Raises:
        UserError: a mistake in the recipe or in the data's arguments.
    """
    _quiet()
    cli = DataCLI(words)
    return cli.datamodule, cli.uses_labels, cli.config


def time_fit(
    recipe: str, words: list[str], seconds: float, images: int
) -> tuple[FitSpeed, torch.device]:
    """The speed of a run of `fit`, and its device; see `fastvim_cli.train.timed.time_fit`.

    Args:
        recipe: a file, or a name below `recipes/`.
        words, seconds, images: as there.

    Raises:
        UserError: no such recipe, or a mistake in it or in the words.
    """
    _quiet()
    return timed.time_fit(timed.find_recipe(recipe), words, seconds, images)


def _quiet() -> None:
    """Keep Lightning's notices off the terminal; its warnings about our own choices too."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Where a profiler prints its table.
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)
    for message in (
        ".*does not have many workers.*",  # a choice of the recipe
        ".*Checkpoint directory .* exists and is not empty.*",  # nothing in it is overwritten
        ".*is smaller than the logging interval.*",  # every epoch is logged anyway
        ".*callbacks used to create the checkpoint need to be provided.*",  # evaluation has less
        ".*No seed found.*",
        ".*in eval mode at the start of training.*",
        ".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing changes it in place
    ):
        warnings.filterwarnings("ignore", message)
    for category in (DeprecationWarning, FutureWarning):  # for Lightning's authors
        warnings.filterwarnings("ignore", category=category, module="lightning")
