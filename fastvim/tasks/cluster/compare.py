"""What all processes must have before the first step: the same data, place and weights."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastvim.tasks.cluster.peers import Peers

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CompareStart(L.Callback):
    """Compares data, step, epoch and weights of all processes before the first step.

    Args:
        peers: the processes.
    """

    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if self.peers.size == 1:
            return
        data = trainer.datamodule
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        facts = {
            "the list of images": data.digest("train") if hasattr(data, "digest") else None,
            "the number of training batches": trainer.num_training_batches,
            "the step": trainer.global_step,
            "the epoch": trainer.current_epoch,
            "the batch": batches,
            "the sum over all weights": weights_digest(pl_module),
        }
        advice = "expected the same data and checkpoints, on disks that all machines share"
        self.peers.compare(facts, advice)


def weights_digest(module: nn.Module) -> str | None:
    """A digest of all weights, bit by bit; None where each process has a part of them."""
    weights = [*module.parameters(), *module.buffers()]
    if any(isinstance(weight, DTensor) for weight in weights):
        return None
    sums = torch.stack([_sum(weight.detach()) for weight in weights])
    return sha256(sums.cpu().numpy().tobytes()).hexdigest()[:12]


def _sum(weight: Tensor) -> Tensor:
    """The sum of the bits of a tensor, as integers; each with its place, or swaps were not seen."""
    flat = weight.contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    bits = flat if flat.dtype == torch.bool else flat.view(_INTEGERS[flat.element_size()])
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return (bits.long() * places).sum()
