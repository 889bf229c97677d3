"""`fastvim fit`, `validate` and `test`: LightningCLI with this library's defaults.

A configuration has the sections `model` (a task), `data` and `trainer`; any value can be
overridden on the command line. Everything that a run writes lies under `trainer.default_root_dir`.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from rich import get_console
from rich.table import Table

from fastvim.errors import UserError
from fastvim.tasks.callbacks.checkpointing import (
    AtomicCheckpointIO,
    ExportWeights,
    FiniteLoss,
    LastCheckpoint,
)
from fastvim.tasks.callbacks.curves import LearningCurves
from fastvim.tasks.callbacks.report import Report
from fastvim.tasks.callbacks.run_log import RunLog, SeedSteps, describe
from fastvim.tasks.task import Task
from fastvim_cli.config_errors import explain

TRAINER_DEFAULTS = {
    "enable_model_summary": False,
    # Our data modules divide the images among the processes themselves.
    "use_distributed_sampler": False,
}

# The arguments of a data module that prediction needs again.
IMAGE_SETTINGS = (
    *("img_size", "in_chans", "mean", "std"),
    *("base_size", "eval_size", "crop_pct", "interpolation"),
)


class ProgressBar(RichProgressBar):
    """Lightning's, without the number of the log folder, and counting epochs from one."""

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or -1
        text = f"epoch {current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")
        return text.ljust(len(self.validation_description))  # equally long, or the bars flicker

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class TrainingCLI(LightningCLI):
    """LightningCLI for one command, without Lightning's subcommands.

    `model` is a `fastvim.tasks.Task`: a LightningModule that says what chooses `best.ckpt` and
    what is exported.

    Args:
        command: "fit", "validate" or "test".
        args: the words after the command.
    """

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        super().__init__(
            model_class=Task,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfigCallback if command == "fit" else None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"fastvim {command}",
                "description": f"{command} as a configuration says",
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="Checkpoint to go on from or to evaluate: a file, or 'last' or 'best' of the run.",
        )
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int | None,
            help="Write last.ckpt every so many optimiser steps, besides after every epoch.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            message = explain(str(error), parser.get_defaults().keys())
            if message.startswith("Problems parsing config"):  # does not say which
                message = f"{' '.join(_config_files(args))}: {message}"
            raise UserError(message) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self.config_init.trainer
        self.root = Path(settings.default_root_dir or self._root_of_config())
        fitting = self.command == "fit"
        kwargs["default_root_dir"] = str(self.root)
        kwargs["plugins"] = [AtomicCheckpointIO(), *_as_list(settings.plugins)]
        kwargs["callbacks"] = [*_as_list(settings.callbacks), *self._callbacks()]
        if settings.logger is None:
            kwargs["logger"] = _loggers(self.root) if fitting else False
        if settings.enable_progress_bar is None and not get_console().is_terminal:
            kwargs["enable_progress_bar"] = False  # a bar in a log file is noise
        if settings.deterministic is None and not _uses_accelerator(settings.accelerator):
            kwargs["deterministic"] = True
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"trainer: {error}") from error

    def _root_of_config(self) -> str:
        """`runs/NAME` for a configuration NAME.yaml."""
        files = self.config.config or []
        return os.path.join("runs", Path(str(files[-1])).stem if files else "unnamed")

    def _callbacks(self) -> list[Callback]:
        """What every run has, beside what the configuration and the task add."""
        settings = self.config_init.trainer
        callbacks: list[Callback] = []
        if settings.enable_progress_bar is not False and get_console().is_terminal:
            callbacks.append(ProgressBar())
        arguments = self.config.data.init_args
        images = {name: arguments[name] for name in IMAGE_SETTINGS if name in arguments}
        if self.command == "test":
            normalisation = {name: images[name] for name in ("mean", "std") if name in images}
            callbacks.append(Report(str(self.root), **normalisation))
        if self.command != "fit":
            return callbacks
        callbacks += [
            SeedSteps(int(self.config.seed_everything)),
            FiniteLoss(),
            RunLog(get_console()),
            LearningCurves(str(self.root / "curves.png")),
            ExportWeights(str(self.root / "model.safetensors"), images),
        ]
        if settings.enable_checkpointing is not False:
            folder = str(self.root / "checkpoints")
            callbacks += [
                ModelCheckpoint(
                    folder, "best", monitor=self.model.monitor, mode=self.model.monitor_mode
                ),
                # The last: its file then holds the other's state of the same moment.
                LastCheckpoint(folder, self.config.checkpoint_every_n_steps),
            ]
        return callbacks

    def execute(self) -> None:
        """Run the command.

        Raises:
            UserError: a mistake in the configuration, or a loss that is not finite.
            KeyboardInterrupt: on Ctrl-C, after Lightning has put things in order.
        """
        console = get_console()
        checkpoint = self._checkpoint()
        self.model.resuming = checkpoint is not None
        inputs = {"model": self.model, "datamodule": self.datamodule, "ckpt_path": checkpoint}
        results: Mapping[str, float] = {}
        try:
            if self.command == "fit":
                self.trainer.fit(**inputs)
            elif self.command == "validate":
                (results,) = self.trainer.validate(**inputs, verbose=False)
            else:
                (results,) = self.trainer.test(**inputs, verbose=False)
        except MisconfigurationException as error:
            raise UserError(str(error)) from error
        except SystemExit:
            if self.trainer.interrupted:  # Lightning turns Ctrl-C into an exit
                advice = "--ckpt_path last goes on" if self.command == "fit" else ""
                raise KeyboardInterrupt(advice) from None
            raise
        if self.trainer.is_global_zero:
            if results:
                line = "   ".join(describe(*item) for item in results.items())
                console.print(line, highlight=False, soft_wrap=True)
            if scores := self.model.class_scores():
                console.print(_class_table(scores))
            console.print(f"results in {self.root}/", highlight=False, soft_wrap=True)

    def _checkpoint(self) -> str | None:
        """The file that `--ckpt_path` means."""
        name, folder = self.config.ckpt_path, self.root / "checkpoints"
        fitting = self.command == "fit"
        if name is None:
            if not fitting and not self.config.model.init_args.get("checkpoint"):
                raise UserError(f"nothing to {self.command}: give --ckpt_path last, best or FILE")
            return None
        if name not in ("last", "best"):
            if not os.path.exists(name):
                raise UserError(f"no checkpoint at {name}")
            return name
        # A second run in the same folder numbers its files, as in last-v1.ckpt.
        files = sorted(folder.glob(f"{name}*.ckpt"), key=os.path.getmtime)
        if files:
            return str(files[-1])
        if not fitting:
            raise UserError(f"no {name} checkpoint in {folder}")
        # Not an error: a scheduler restarts a preempted run with one and the same command.
        get_console().print(f"no checkpoint in {folder} yet: starting afresh", highlight=False)
        return None


def run(words: list[str]) -> None:
    """Run one of the three commands.

    Args:
        words: the command's name, then its arguments.

    Raises:
        UserError: see `TrainingCLI.execute`.
    """
    _quiet()
    TrainingCLI(words[0], words[1:]).execute()


def _quiet() -> None:
    """Keep Lightning's notices off the terminal; its warnings about our own choices too."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # a choice of the recipe
        ".*Checkpoint directory .* exists and is not empty.*",  # nothing in it is overwritten
        ".*is smaller than the logging interval.*",  # every epoch is logged anyway
        ".*callbacks used to create the checkpoint need to be provided.*",  # evaluation has less
        ".*No seed found.*",
        ".*in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", message)
    for category in (DeprecationWarning, FutureWarning):  # for Lightning's authors
        warnings.filterwarnings("ignore", category=category, module="lightning")


def _class_table(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """A line for each class, a column for each score; a class that is absent has none."""
    table = Table("class", *scores, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in next(iter(scores.values())):
        values = (of[name] for of in scores.values())
        table.add_row(name, *("-" if math.isnan(value) else f"{value:.2%}" for value in values))
    return table


def _loggers(root: Path) -> list[Logger]:
    """CSV and TensorBoard files of one start of a run, in `logs/version_N`, N counting up."""
    table = CSVLogger(root, "logs", flush_logs_every_n_steps=1)
    return [table, TensorBoardLogger(root, "logs", version=table.version)]


def _config_files(args: list[str]) -> list[str]:
    """What `--config` names among the arguments."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    return parser.parse_known_args(args)[0].config


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _uses_accelerator(choice: Any) -> bool:
    return choice != "cpu" and torch.accelerator.is_available()
