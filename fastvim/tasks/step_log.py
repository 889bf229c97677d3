"""What a training step logs, at little cost to the host and without waiting for a GPU."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from fastvim.tasks.callbacks.progress import ProgressBar

# Name, and what Lightning's `log` is told, of the values of a step.
_STEP: dict[str, Any] = {"on_step": True, "on_epoch": False}
_EPOCH: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}


def log_step(task: L.LightningModule, loss: Tensor, batch_size: int | None = None) -> None:
    """Log the loss of a training step, and the highest rate of any group.

    Lightning would wait for a GPU twice in every step: to copy a Python number there, and to read
    what is logged for a bar, be there one or not. So the rate is a tensor of the CPU, and
    `ProgressBar` reads the loss itself.

    Args:
        task: in its training step.
        loss: of the step.
        batch_size: images in the batch; None lets Lightning read it off the first tensor.
    """
    trainer = task.trainer
    highest = max(group["lr"] for group in trainer.optimizers[0].param_groups)
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    rate = torch.tensor(highest, dtype=dtype, device="cpu")
    values = {"train/loss": loss.detach(), "train/lr": rate, "train/loss_epoch": loss.detach()}
    if _update(task, values, batch_size):
        return
    bar = trainer.progress_bar_callback
    shown = bar is not None and not isinstance(bar, ProgressBar)
    task.log("train/loss", loss, prog_bar=shown, **_STEP)
    task.log("train/lr", rate, **_STEP)
    task.log("train/loss_epoch", loss, batch_size=batch_size, **_EPOCH)


def _update(task: Any, values: dict[str, Tensor], batch_size: int | None) -> bool:
    """Give values to what `log` keeps of them; False in the first batch of an epoch.

    What `log` does in every other batch changes nothing, and takes as long as the launches of the
    loss: it compares the options with those of the batch before, and moves the values' metrics,
    with deep copies of their options, to the device where they are.
    """
    trainer = task.trainer
    kept = trainer._results
    if trainer._logger_connector._first_loop_iter is not False:
        return False
    metrics = [kept.get(f"{task._current_fx_name}.{name}") for name in values]
    if any(metric is None for metric in metrics):
        return False
    for metric, value in zip(metrics, values.values(), strict=True):
        size = kept._extract_batch_size(metric, batch_size, metric.meta)
        metric.forward(value, size)
        metric.has_reset = False
    return True
