"""A run of `fastvim fit` whose loader and step are timed, alone and together."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from rich import get_console

from fastvim.benchmark.fit_speed import FitSpeed, Parts
from fastvim.benchmark.photographs import draw_folders
from fastvim.data.base import DataModule
from fastvim.data.images import ImageData
from fastvim.errors import OptionError, UserError
from fastvim_cli.train.cli import TrainingCLI
from fastvim_cli.train.fitting import fit

CLASSES, ENTRIES = 10, 1 << 15  # of generated images; each file is listed several times
# The run takes as many batches as it is timed for, and keeps nothing.
FIXED = (
    *("min_epochs=null", "min_steps=null", "max_steps=-1", "limit_train_batches=1.0"),
    *("limit_val_batches=0", "num_sanity_val_steps=0", "overfit_batches=0"),
    *("enable_progress_bar=false", "enable_checkpointing=false", "logger=false"),
)


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or a name below `recipes/`.

    Raises:
        UserError: there is none.
    """
    path = Path(os.path.expanduser(name))
    below = Path("recipes", name)
    for each in (path, below, below.with_name(f"{below.name}.yaml")):
        if each.is_file():
            return each
    raise UserError(f"--fit {name}: no such file, nor one below recipes/")


def time_fit(
    recipe: Path, words: list[str], seconds: float, images: int
) -> tuple[FitSpeed, torch.device]:
    """Time a run as `fastvim fit` makes it; nothing of it is kept.

    Args:
        recipe: a configuration.
        words: that override its values.
        seconds: for each part, at least.
        images: JPEG files that are made where neither names a `root` of the data.

    Returns:
        The times, and the device of the run.

    Raises:
        UserError: a mistake in the configuration; a run of several processes.
    """
    with TemporaryDirectory(prefix="fastvim-", ignore_cleanup_errors=True) as folder:
        words = ["--trainer.devices=1", *words]
        if not _has_root(recipe, words):
            words.append(f"--data.root={_draw(Path(folder, 'images'), images)}")
        fixed = [f"--trainer.{each}" for each in FIXED]
        fixed.append(f"--trainer.default_root_dir={folder}/run")
        cli = TrainingCLI("fit", [f"--config={recipe}", *words, *fixed])
        return _run(cli, seconds)


def _run(cli: TrainingCLI, seconds: float) -> tuple[FitSpeed, torch.device]:
    data, trainer = cli.datamodule, cli.trainer
    if trainer.world_size > 1:
        raise OptionError("trainer.devices", trainer.world_size, "1: one process is timed")
    if not isinstance(data, DataModule):
        raise UserError(f"{type(data).__name__} has no loader that tells how long it is waited for")
    device, make = trainer.strategy.root_device, data.train_dataloader
    made: list[Parts] = []

    def train_dataloader() -> Any:
        made[:] = [Parts(make(), data.batch_size, device, seconds, stop)]
        return made[0]

    def stop() -> None:
        trainer.should_stop = True

    data.train_dataloader = train_dataloader  # type: ignore[method-assign]
    console = get_console()
    before, console.quiet = console.quiet, True
    try:
        fit(cli)
    finally:
        console.quiet = before
    assert made[0].speed is not None
    return made[0].speed, device


def _has_root(recipe: Path, words: list[str]) -> bool:
    """Whether the data are given."""
    names = ("--data.root", "--data.init_args.root")
    if any(word.partition("=")[0] in names for word in words):
        return True
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        data = content["data"]
        kind, options = data["class_path"], data.get("init_args") or {}
    except (KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError):
        return True  # whatever is wrong with it, the run tells
    if options.get("root"):
        return True
    if kind.rpartition(".")[2] != ImageData.__name__:
        raise UserError(f"--data.root is missing: images are made for ImageData, not for {kind}")
    return False


def _draw(root: Path, images: int) -> Path:
    """Class folders that list each of some files often enough for epochs to be long."""
    draw_folders(root, {"train": images, "val": 2 * CLASSES}, CLASSES)
    for file in sorted((root / "train").rglob("*.jpg")):
        for number in range(1, -(-ENTRIES // images)):
            os.link(file, file.with_name(f"{file.stem}_{number}.jpg"))
    return root
