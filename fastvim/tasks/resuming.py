"""Go on from a checkpoint: what must be as it was, and other batches, counted in images."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastvim.errors import OptionError, UserError
from fastvim.tasks.checkpoint_fields import check_fields
from fastvim.tasks.optim import count_steps
from fastvim.weights import METADATA_KEY
from fastvim.weights.fit import differences
from fastvim.weights.unpickle import read_pickled

_logger = logging.getLogger(__name__)

KEY = "batches"  # of a checkpoint
TASK = "task"
# Options that make the groups of the optimiser.
_GROUPS = ("layer_decay", "blocks_per_decay", "lr_scales", "no_decay", "decay_vectors")


def told_by(path: str) -> dict[str, Any]:
    """The metadata of a training checkpoint; its weights are not read.

    Raises:
        UserError: a file that is none, as one of weights alone.
    """
    file = Path(path)
    content = {} if file.suffix == ".safetensors" else read_pickled(file, mmap=True)
    if "loops" not in content:
        raise UserError(
            f"{path} is no training checkpoint: a file of weights alone is given as "
            f"--model.checkpoint {path}, not as --ckpt_path"
        )
    check_fields(file, content)
    told: dict[str, Any] = content.get(METADATA_KEY, {})
    return told


def require_same_model(task: Any, checkpoint: dict[str, Any]) -> None:
    """Compare the network of a checkpoint with a task's.

    Options that leave names and shapes of the weights alone may differ, which is said. Rates of
    dropping are settings of training.

    Raises:
        UserError: other names or shapes, where options differ; names these options.
    """
    network = ("model", "model_args", "num_classes", *task.head_options)
    changed = _changes(task, checkpoint, network)
    if not differences(task.state_dict(), checkpoint["state_dict"]):
        changed = [each for each in changed if "drop" not in each.partition(" ")[0]]
        if changed and task.trainer.is_global_zero:
            _logger.warning("the same weights in another model: %s", "; ".join(changed))
    elif changed := [*_other_task(task, checkpoint), *changed]:
        raise UserError(
            f"the checkpoint is of another model: {'; '.join(changed)} (--model.checkpoint starts "
            "from its weights)"
        )


def _other_task(task: Any, checkpoint: dict[str, Any]) -> list[str]:
    own, stored = type(task).__name__, checkpoint.get(TASK)
    return [] if stored in (None, own) else [f"model is {own}, {stored} in the checkpoint"]


def _changes(task: Any, checkpoint: dict[str, Any], names: Iterable[str]) -> list[str]:
    """The options of those names that differ, as the user writes them, with both values."""
    found = []
    own, stored = (
        {**options, **{f"model_args.{k}": v for k, v in (options.get("model_args") or {}).items()}}
        for options in (dict(task.hparams), checkpoint.get("hyper_parameters", {}))
    )
    for name in {**own, **stored}:
        if name == "model_args" or name.partition(".")[0] not in names:
            continue
        here, there = (_plain(options.get(name)) for options in (own, stored))
        if here != there:
            found.append(f"model.{name} is {_told(here)}, {_told(there)} in the checkpoint")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _told(value: Any) -> str:
    return "not given" if value is None else str(value)


def batches_of(task: Any) -> dict[str, int]:
    """What the counters of a checkpoint of a `Task` are in."""
    trainer = task.trainer
    return {
        "batch_size": task.data.batch_size,
        "processes": trainer.world_size,
        "accumulated": trainer.accumulate_grad_batches,
        "seed": task.data.seed,
    }


def go_on(task: Any, checkpoint: dict[str, Any]) -> None:
    """Count the progress of a checkpoint in this run's batches, and take its trained weights.

    Where weights were averaged and no longer are, `state_dict` has the averages.
    """
    for name in ("optimizer_states", "lr_schedulers"):
        if name not in checkpoint:
            raise UserError(
                f"the checkpoint has no {name}, as one of weights alone: a training cannot go on "
                "from it (--model.checkpoint starts from its weights)"
            )
    _adapt(task, checkpoint)
    _check_groups(task, checkpoint)
    if task.trainer.max_steps != -1:
        _begin_next_epoch(checkpoint["loops"]["fit_loop"])
    if task.ema_decay is None and (trained := checkpoint.get("current_model_state")):
        checkpoint["state_dict"] = trained
        if task.trainer.is_global_zero:
            _logger.warning("ema_decay is off: the averages of the checkpoint are left out")


def _adapt(task: Any, checkpoint: dict[str, Any]) -> None:
    """Count what a checkpoint has done in the batches of this run.

    In a run limited in epochs the number of optimiser steps is counted anew as well, since the
    schedule follows it. In one limited in steps it stays.

    Raises:
        OptionError: in the middle of an epoch, for another order of the images, or for batches or
            steps that do not begin where the checkpoint ends.
    """
    before, now = checkpoint.get(KEY), batches_of(task)
    if before is None or before == now:
        return
    progress = checkpoint["loops"]["fit_loop"]
    epochs = progress["epoch_progress"]["current"]
    batches = progress["epoch_loop.batch_progress"]
    complete = epochs["processed"] == epochs["started"] or batches["is_last_batch"]
    done = batches["current"]["processed"]
    used, per_epoch, _ = count_steps(task.trainer, task.data)
    if complete:
        done, steps = used, 0
    else:
        done = _batches_done(before, now, done)
        steps = done // now["accumulated"]
    shift = done - batches["current"]["processed"]
    for counts in (batches["current"], batches["total"]):
        for name in counts:
            counts[name] += shift
    if task.trainer.max_steps != -1 or task.global_batch == _images_a_step(before):
        return
    whole = epochs["processed"] + (epochs["processed"] != epochs["started"] and complete)
    step = whole * per_epoch + steps
    if task.trainer.is_global_zero:
        _logger.warning(
            "%d images a step, %d before: step %d of the checkpoint is step %d here",
            *(task.global_batch, _images_a_step(before), checkpoint["global_step"], step),
        )
    checkpoint["global_step"] = step
    optimizer = progress["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    total = optimizer["step"]["total"]
    total |= dict.fromkeys(total, step)
    progress["epoch_loop.state_dict"]["_batches_that_stepped"] = step


def _check_groups(task: Any, checkpoint: dict[str, Any]) -> None:
    """Raise UserError where the optimiser's state is of other groups of parameters."""
    own = [len(group["params"]) for group in task.make_optimizer().param_groups]
    theirs = [
        len(group["params"])
        for state in checkpoint["optimizer_states"]
        for group in state["param_groups"]
    ]
    if own != theirs:
        changed = [*_other_task(task, checkpoint), *_changes(task, checkpoint, _GROUPS)]
        raise UserError(
            f"the checkpoint's optimiser has {len(theirs)} groups, {sum(theirs)} weights; expected "
            f"{len(own)} of {sum(own)}: {'; '.join(changed) or 'other weights are trained'}"
        )


def _batches_done(before: dict[str, int], now: dict[str, int], batches: int) -> int:
    """Batches of this run that hold the images that the checkpoint has done in its epoch."""
    images = batches * before["batch_size"] * before["processes"]
    where = f"as the checkpoint ends in the middle of an epoch, after {images} of its images"
    if now["seed"] != before["seed"]:
        raise OptionError("seed", now["seed"], f"{before['seed']}, {where}")
    size = now["batch_size"] * now["processes"]
    if images % (size * now["accumulated"]):
        if images % size == 0:
            expected = f"{before['accumulated']}, or a divisor of {images // size} batches, {where}"
            raise OptionError("accumulate_grad_batches", now["accumulated"], expected)
        processes = "" if now["processes"] == 1 else f" of {now['processes']} processes"
        expected = f"{before['batch_size']} as before, or a size{processes} that divides them"
        raise OptionError("batch_size", now["batch_size"], f"{expected}, {where}")
    return images // size


def _images_a_step(batches: dict[str, int]) -> int:
    return batches["batch_size"] * batches["processes"] * batches["accumulated"]


def _begin_next_epoch(progress: dict[str, Any]) -> None:
    """Resume at the next epoch if the checkpoint was written at the end of one.

    Lightning does this in runs limited in epochs. In a run limited in steps it would end the same
    epoch twice.

    Args:
        progress: of the fit loop. In the middle of an epoch nothing changes.
    """
    epochs, batches = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    if epochs["current"]["processed"] != epochs["current"]["started"]:
        return
    for counts in (epochs["total"], epochs["current"]):
        counts["completed"] = counts["processed"]
        counts["ready"] = counts["started"] + 1
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
