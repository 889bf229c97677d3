"""`fastvim fit`, `validate` and `test`: LightningCLI with this library's defaults.

A configuration has the sections `model` (a task), `data` and `trainer`; any value can be
overridden on the command line. Everything that a run writes lies under `trainer.default_root_dir`.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import json
import math
import os
import pydoc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich import get_console

from fastvim.data.base import DataModule
from fastvim.data.classes import KnownClasses
from fastvim.errors import MachineError, UserError
from fastvim.options import COUNT, NOT_NEGATIVE, SEED, check, check_given
from fastvim.storage import is_machine, problem
from fastvim.tasks import strategies
from fastvim.tasks.callbacks.refused import refuse_callbacks
from fastvim.tasks.callbacks.run_log import describe
from fastvim.tasks.checkpoints import (
    CheckedCheckpointIO,
    last_whole,
    newest_whole,
)
from fastvim.tasks.resuming import told_by
from fastvim.tasks.run_folder import newest, started_again
from fastvim.tasks.task import Task
from fastvim.weights import find, known_classes
from fastvim_cli.console import say, table
from fastvim_cli.train.class_paths import admit, require_plain
from fastvim_cli.train.config_errors import causes, explain, of_one_of_several, options_as_written
from fastvim_cli.train.config_files import MOST_SHOWN, check_size, checked_configs, read_config
from fastvim_cli.train.every_run import as_list, callbacks, loggers
from fastvim_cli.train.fitting import fit
from fastvim_cli.train.logs import ConfigFile
from fastvim_cli.train.own_code import own_errors
from fastvim_cli.train.trainer_options import (
    check_strategy,
    check_trainer,
    read_integers_first,
    trainer_mistake,
)

TRAINER_DEFAULTS = {
    "enable_model_summary": False,
    # Our data modules divide the images among the processes themselves.
    "use_distributed_sampler": False,
}

# Of options that are texts, as the interval of Lightning's Timer: a member stands for its text.
yaml.SafeDumper.add_multi_representer(
    enum.Enum, lambda dumper, member: dumper.represent_data(member.value)
)


class TrainingCLI(LightningCLI):
    """LightningCLI for one command, without Lightning's subcommands.

    `model` is a `fastvim.tasks.Task`: a LightningModule that says what chooses `best.ckpt` and
    what is exported.

    Args:
        command: "fit", "validate" or "test".
        args: the words after the command.
        base: a configuration that those of `--config` and `args` override.
    """

    def __init__(
        self, command: str, args: list[str], base: Mapping[str, Any] | None = None
    ) -> None:
        self.command = command
        self.base = [] if base is None else [json.dumps(base)]  # a text is read as a file is
        read_integers_first(L.Trainer.__init__)
        super().__init__(
            model_class=Task,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=ConfigFile if command == "fit" else None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"fastvim {command}",
                "description": _description(command),
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
            help="Checkpoint to resume or to evaluate: a file, or 'last' or 'best' of the run.",
        )
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int | None,
            help="Write last.ckpt after this many optimiser steps as well as after each epoch.",
        )
        parser.add_argument(
            "--name_modules",
            type=bool,
            default=False,
            help="Name the first module whose result is not finite; eager and slow.",
        )
        parser.add_argument(
            "--retry_checkpoints",
            type=bool,
            default=False,
            help="Where the disk refuses a checkpoint, go on and try again at the next one. False: "
            "stop, as nothing is left of what would be computed.",
        )
        parser.add_argument(
            "--seconds_before_limit",
            type=float,
            default=60.0,
            help="Save, stop and go on in a job that follows this long before SLURM's time limit.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        files, overrides = _split_configs(args)
        texts = list(overrides)

        def tell(text: str) -> None:
            texts.append(text)
            admit(texts)

        admit(texts)
        mistakes: list[UserError] = []
        try:
            with checked_configs(tell) as mistakes:
                self.config = parser.parse_args(
                    [f"--config={config}" for config in [*self.base, *files]] + overrides
                )
        except argparse.ArgumentError as error:
            if mistakes:
                raise mistakes[0] from error
            message = explain(str(error), parser.get_defaults().keys())
            if message.startswith("Problems parsing config"):  # does not say which
                message = f"{' '.join(files)}: {message}"
            raise UserError(message) from error
        require_plain(self.config)
        if not isinstance(self.config.seed_everything, bool):
            check_given(SEED, seed_everything=self.config.seed_everything)
        check_given(COUNT, checkpoint_every_n_steps=self.config.checkpoint_every_n_steps)
        check(NOT_NEGATIVE, seconds_before_limit=self.config.seconds_before_limit)

    def instantiate_classes(self) -> None:
        with own_errors(self.config), options_as_written(self.config):
            try:
                super().instantiate_classes()
            except ValueError as error:
                # jsonargparse wraps what a logger, a callback or the like raises. An error of its
                # own package speaks to the user; one of Python's, as of a bug, keeps its traceback.
                *_, cause = found = list(causes(error))
                own = type(cause).__module__ != "builtins"
                if any(isinstance(each, UserError) for each in found):
                    raise
                if own or isinstance(cause, ModuleNotFoundError):
                    raise UserError(f"trainer: {cause}") from error
                if told := of_one_of_several(str(error)):
                    raise UserError(told) from error
                raise

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self.config_init.trainer
        check_trainer(settings, self.command)
        strategies.register()
        self.root = Path(os.path.expanduser(settings.default_root_dir or self._root_of_config()))
        kwargs["default_root_dir"] = str(self.root)
        kwargs["plugins"] = [CheckedCheckpointIO(), *as_list(settings.plugins)]
        own = callbacks(self.command, self.root, self.config, self.model)
        chosen = as_list(settings.callbacks)
        refuse_callbacks(chosen)
        if any(isinstance(callback, ProgressBar) for callback in chosen):
            own = [callback for callback in own if not isinstance(callback, ProgressBar)]
        elif settings.enable_progress_bar is None and not get_console().is_terminal:
            kwargs["enable_progress_bar"] = False  # a bar in a log file is noise
        kwargs["callbacks"] = [*chosen, *own]
        kwargs["logger"] = settings.logger or False
        if self.command == "fit":
            kwargs["logger"] = loggers(self.root, settings.logger)
        if settings.deterministic is None and not _uses_accelerator(settings.accelerator):
            kwargs["deterministic"] = True
        try:
            trainer: L.Trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            raise UserError(f"trainer: {trainer_mistake(error)}") from error
        check_strategy(trainer, settings.strategy)
        return trainer

    def _root_of_config(self) -> str:
        """`runs/NAME` for a configuration NAME.yaml."""
        files = self.config.config or []
        return os.path.join("runs", Path(str(files[-1])).stem if files else "unnamed")

    def execute(self) -> Mapping[str, float]:
        """Run the command and return the metrics of an evaluation.

        Raises:
            UserError: a mistake in the configuration, or a loss that is not finite.
            Ended: a signal or another process ends a training.
            KeyboardInterrupt: on Ctrl-C in an evaluation.
        """
        results: Mapping[str, float] = {}
        if self.command == "fit":
            fit(self)
        else:
            results = self._evaluate()
        for name, value in results.items():
            if name.endswith("loss") and not math.isfinite(value):
                raise UserError(f"{name} is {value}: results that are not finite are no answer")
        if self.trainer.is_global_zero:
            if results:
                print("   ".join(describe(*item) for item in results.items()))
            if scores := self.model.class_scores():
                print(_class_table(scores))
            say(f"results in {self.root}/")
        return results

    def _evaluate(self) -> Mapping[str, float]:
        checkpoint = self.checkpoint()
        self.take(checkpoint)
        run = self.trainer.validate if self.command == "validate" else self.trainer.test
        inputs = {"model": self.model, "datamodule": self.datamodule, "ckpt_path": checkpoint}
        with self.mistakes():
            (results,) = run(**inputs, verbose=False)
        return results

    @contextlib.contextmanager
    def mistakes(self) -> Iterator[None]:
        """Raise what a configuration causes inside Lightning as a UserError.

        Raises:
            UserError: a mistake in the configuration.
            KeyboardInterrupt: on Ctrl-C, after Lightning has put things in order.
        """
        try:
            with own_errors(self.config), options_as_written(self.config):
                yield
        except OSError as error:
            if not is_machine(error):
                raise
            where = error.filename or self.root
            raise MachineError(f"{where}: {problem(error)}; {last_whole(self.trainer)}") from error
        except MisconfigurationException as error:
            raise trainer_mistake(error) from error
        except (RuntimeError, ModuleNotFoundError) as error:
            # What Lightning's callbacks say of a metric or a package that is not there, or stop at.
            told = "conditioned on metric" in str(error) or "Requirement" in str(error)
            if told or isinstance(error, TrainingSpikeException):
                raise UserError(f"trainer.callbacks: {error}") from error
            raise
        except SystemExit:
            if self.trainer.interrupted:  # Lightning turns Ctrl-C into an exit
                raise KeyboardInterrupt from None
            raise

    def take(self, checkpoint: str | None) -> None:
        """Let model and data know the checkpoint that gives the weights and the classes."""
        self.model.resuming = checkpoint is not None
        if self.config.name_modules:
            self.model.capture = False
        if isinstance(self.datamodule, DataModule):
            self.datamodule.known = self._known_classes(checkpoint)

    def _known_classes(self, checkpoint: str | None) -> KnownClasses | None:
        """The classes of the weights that are resumed or evaluated, where they tell them."""
        source = checkpoint or (None if self.command == "fit" else self.model.checkpoint)
        if source is None:
            return None
        names, ids = known_classes(told_by(source) if checkpoint else find(source).metadata)
        return KnownClasses(source, names, ids) if names else None

    def checkpoint(self, restarts: int = 0) -> str | None:
        """The file that `--ckpt_path` means, or that a run which is started again goes on from.

        Args:
            restarts: see `started_again`.
        """
        name, folder = self.config.ckpt_path, self.root / "checkpoints"
        fitting = self.command == "fit"
        if fitting and (found := started_again(self.root, restarts)):
            again = newest_whole([each.path for each in found])
            say(f"started again: goes on from {again}")
            return str(again)
        if name is None:
            if not fitting and not self.config.model.init_args.get("checkpoint"):
                raise UserError(f"nothing to {self.command}: give --ckpt_path last, best or FILE")
            return None
        if name not in ("last", "best"):
            name = os.path.expanduser(name)
            if not os.path.exists(name):
                raise UserError(f"no checkpoint at {name}")
            return name
        if name == "last":
            files = [each.path for each in newest(self.root)]
            if files and fitting:
                others = sorted(folder.glob("*.ckpt"), key=os.path.getmtime, reverse=True)
                return str(newest_whole(list(dict.fromkeys([*files, *others]))))
        else:  # a second run in the same folder numbers its files, as in best-v1.ckpt
            files = sorted(folder.glob("best*.ckpt"), key=os.path.getmtime, reverse=True)
        if files:
            return str(files[0])
        if not fitting or name == "best":
            raise UserError(f"no {name} checkpoint in {folder}")
        # Not an error: a scheduler restarts a preempted run with one and the same command.
        say(f"no last checkpoint in {folder} yet: starting afresh")
        return None


class DataCLI(TrainingCLI):
    """Reads a configuration as `TrainingCLI` does, and makes only the data module.

    Args:
        args: the words after the command.
    """

    def __init__(self, args: list[str]) -> None:
        super().__init__("validate", args)

    def instantiate_classes(self) -> None:
        only_data = Namespace(data=self.config.data)
        with own_errors(only_data), options_as_written(only_data):
            self.datamodule = self.parser.instantiate_classes(only_data).data
        task: Any = pydoc.locate(self.config.model.class_path)
        self.uses_labels = bool(task.uses_labels)


def _class_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each class, a column for each score; "-" where a class is absent."""
    rows = []
    for name in next(iter(scores.values())):
        values = (by_class[name] for by_class in scores.values())
        rows.append((name, *("-" if math.isnan(value) else f"{value:.2%}" for value in values)))
    return table(("class", *scores), rows)


def _split_configs(words: list[str]) -> tuple[list[str], list[str]]:
    """The files that `--config` names, and the other words.

    jsonargparse reads from left to right, but an option makes sense only after the file that says
    which class it belongs to.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    found, others = parser.parse_known_args(words)
    for word in others:
        if not _is_text(word):
            raise UserError(f"{word}: expected text in UTF-8, which config.yaml and the logs are")
        check_size(word.partition("=")[2] or word, word[:MOST_SHOWN])
    files = [os.path.expanduser(file) for file in found.config]
    for file in files:
        read_config(file)
    return files, others


def _is_text(word: str) -> bool:
    """Whether a word of the command line has no bytes that are no UTF-8."""
    return word == word.encode("utf-8", "replace").decode("utf-8")


def _description(command: str) -> str:
    text = f"{command} as a configuration says"
    name = f"; fastvim {command} NAME --data.root DIR takes published weights as published"
    return text if command == "fit" else text + name


def _uses_accelerator(choice: Any) -> bool:
    return choice != "cpu" and torch.accelerator.is_available()
