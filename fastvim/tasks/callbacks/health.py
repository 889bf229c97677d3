"""The first step at which something stops being finite, and the module where it does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastvim.errors import UserError
from fastvim.tasks.checkpoints import LastCheckpoint, last_whole
from fastvim.tasks.replayed import Replayed
from fastvim.tasks.sharding import local
from fastvim.tasks.tensors import TensorsOf

PARTS = ("the loss", "a gradient", "a weight")


class Finite(L.Callback):
    """Stops the run at the first loss, gradient or weight that is not finite.

    Nothing waits for a GPU: each step leaves there its loss, and whether gradients and weights are
    finite, for all steps to be read together every `log_every_n_steps` steps, and before a
    checkpoint is written. Gradients under 16-mixed overflow by design, when the scale of the loss
    is too large, and are not looked at.
    """

    def __init__(self) -> None:
        self._unread: list[tuple[Tensor, int, int]] = []  # see PARTS; optimiser steps, batch
        self._gradient: Tensor | None = None
        self._tensors: TensorsOf | None = None
        self._of_gradients, self._of_weights = Replayed(_health), Replayed(_health)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tensors = TensorsOf(pl_module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        if trainer.precision != "16-mixed":
            assert self._tensors is not None
            given = (each.grad for each in self._tensors.find()[0])
            self._gradient = self._of_gradients(_parts(given))

    def on_train_batch_end(
        self, trainer: Any, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach().float()
        gradient, self._gradient = self._gradient, None
        assert self._tensors is not None
        weight = self._of_weights(_parts(self._tensors.find()[0]))
        parts = [loss if part is None else part for part in (loss, gradient, weight)]
        self._unread.append((torch.stack(parts), trainer.global_step, batch_idx))
        patience = trainer.log_every_n_steps if loss.is_cuda else 1
        if len(self._unread) >= patience or trainer.is_last_batch:
            self._read(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._read(trainer, pl_module)

    def _read(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        # Gathered from all processes, so that all stop at the same step.
        everywhere: Any = pl_module.all_gather(torch.stack([parts for parts, _, _ in unread]))
        finite = everywhere.view(-1, len(unread), len(PARTS)).isfinite().all(dim=0)
        if finite.all():
            return
        index = int(finite.all(dim=1).int().argmin())
        _, step, batch_idx = unread[index]
        part = PARTS[int(finite[index].int().argmin())]
        resume = any(isinstance(each, LastCheckpoint) for each in trainer.checkpoint_callbacks)
        again = "--ckpt_path last --name_modules true" if resume else "--name_modules true"
        raise UserError(
            f"{part} is not finite at step {step} (epoch {trainer.current_epoch}, "
            f"batch {batch_idx}); {last_whole(trainer)}; the same command with {again} names the "
            "module"
        )


class NameModules(L.Callback):
    """Checks every module's results, and every gradient and weight, and stops at the first bad one.

    Each check waits for the GPU. A run that resumes from its last checkpoint takes the steps that
    it took before: it comes to the damage again, and names where it arises.
    """

    def __init__(self) -> None:
        self._found: str | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, module in pl_module.named_modules():
            if name:
                module.register_forward_hook(self._checks(name))

    def _checks(self, name: str) -> Any:
        def check(module: nn.Module, inputs: Any, outputs: Any) -> None:
            if self._found is None and module.training and not _finite(tree_leaves(outputs)):
                source = "" if _finite(tree_leaves(inputs)) else ", nor is its input"
                self._found = (
                    f"the result of {name} ({type(module).__name__}) is not finite{source}"
                )

        return check

    def on_train_batch_start(self, *args: Any) -> None:
        self._found = None

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        if self._found is None and not _finite([loss]):
            self._found = "the loss is not finite, though all results of modules are"
        self._tell(trainer)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        if trainer.precision != "16-mixed":
            # The backward pass comes to the last parameter first.
            for name, parameter in reversed(list(pl_module.named_parameters())):
                if self._found is None and not _finite([parameter.grad]):
                    self._found = f"the gradient of {name} is not finite, though the loss is"
        self._tell(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if self._found is None and not _finite([parameter]):
                self._found = f"{name} is not finite after the update, though its gradient is"
        self._tell(trainer)

    def _tell(self, trainer: L.Trainer) -> None:
        """Stop all processes where one has found something."""
        found: list[Any] = [self._found]
        if trainer.world_size > 1:
            found = [None] * trainer.world_size
            dist.all_gather_object(found, self._found)
        if told := next(filter(None, found), None):
            step, epoch = trainer.global_step, trainer.current_epoch
            raise UserError(f"{told} (after {step} steps, in epoch {epoch})")


def _parts(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """What this process holds of tensors that may not be finite."""
    parts = [local(each) for each in tensors if each is not None]
    return [part for part in parts if part.numel() and part.is_floating_point()]


@torch.no_grad()
def _health(parts: list[Tensor]) -> Tensor | None:
    """0 on the tensors' device, or infinity where a value is not finite; None of nothing.

    The loss scaler's check, at a scale of 1: no tensor is changed, and unlike with a norm there is
    no result of each tensor to make and to read.
    """
    if not parts:
        return None
    found = parts[0].new_zeros(1, dtype=torch.float32)
    torch._amp_foreach_non_finite_check_and_unscale_(parts, found, torch.ones_like(found))
    return -torch.log1p(-found[0])


def _finite(values: Iterable[Any]) -> bool:
    tensors = [local(each.detach()) for each in values if isinstance(each, Tensor)]
    return all(bool(each.isfinite().all()) for each in tensors if each.is_floating_point())
