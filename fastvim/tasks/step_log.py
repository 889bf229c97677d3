"""What a training step logs, so that the host does not wait for a GPU."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from fastvim.tasks.callbacks.progress import ProgressBar


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
    bar = trainer.progress_bar_callback
    shown = bar is not None and not isinstance(bar, ProgressBar)
    task.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=shown)
    task.log("train/lr", rate, on_step=True, on_epoch=False)
    epoch: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": batch_size}
    task.log("train/loss_epoch", loss, sync_dist=True, **epoch)
