"""Parameter groups, and the length of a run in steps, shared by every task."""

from __future__ import annotations

import fnmatch
import logging
import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, optim

from fastvim.errors import OptionError, UserError
from fastvim.tasks.protocols import TaskData
from fastvim.tasks.replayed import Replayed

_logger = logging.getLogger(__name__)

STATE = ("exp_avg", "exp_avg_sq", "step")  # of a parameter, in AdamW


def parameter_groups(
    model: Any,
    weight_decay: float,
    layer_decay: float | None = None,
    blocks_per_decay: int = 1,
    no_decay: Collection[str] = (),
    decay_vectors: bool = False,
    lr_scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters by weight decay and by the factor of their learning rate.

    The factor is in the group as `lr_scale`, which `fastvim.tasks.schedules.Schedule` multiplies
    into the rate.

    Args:
        model: a timm-style model; `layer_decay` needs its `group_matcher`.
        weight_decay: of every parameter of two or more dimensions, except the names in the model's
            `no_weight_decay()` (a mixer's 1-D parameters, stored stacked as (2, E), are there).
        layer_decay: factor of the rate from one layer to the one below it; None for one rate.
        blocks_per_decay: how many consecutive blocks share one factor. 2 is the published
            fine-tuning of these models, which are twice as deep as a ViT.
        no_decay: further parameter names that don't decay; shell patterns such as `pos_embed*`.
        decay_vectors: all other parameters decay, those of one dimension too.
        lr_scales: factors of the rate by shell pattern of parameter names.
    """
    told = not decay_vectors and hasattr(model, "no_weight_decay")  # some models of timm do not
    vectors = model.no_weight_decay() if told else set()
    layer_of: dict[str, int] = {}
    if layer_decay is not None:
        layer_of = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last_layer = max(layer_of.values(), default=0)

    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = decay_vectors or (parameter.ndim > 1 and name not in vectors)
        decays = decays and not any(fnmatch.fnmatch(name, pattern) for pattern in no_decay)
        # The head and the final norm are layer `last_layer`: they train at the full rate.
        layers_above = last_layer - layer_of.get(name, last_layer)
        scale = (layer_decay or 1.0) ** math.ceil(layers_above / blocks_per_decay)
        for pattern, factor in (lr_scales or {}).items():
            scale *= factor if fnmatch.fnmatch(name, pattern) else 1.0
        if (scale, decays) not in groups:
            groups[scale, decays] = {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": scale,
            }
        groups[scale, decays]["params"].append(parameter)
    return list(groups.values())


class ListedAdamW(optim.AdamW):
    """AdamW whose fused steps find their tensors in lists, where torch gathers them at every step.

    The kernel is torch's for a learning rate that is a float32 tensor. A step in which a parameter
    has no gradient, and the first one, are torch's own. Where weight decay follows a schedule, the
    kernel is called at every step and not replayed.
    """

    _lists: list[tuple[list[Tensor], ...]] | None = None  # of a group: see `_look_up`
    _rates: Tensor | None = None  # of each group
    _replayed: Replayed | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        every = [parameter.grad for group in groups for parameter in group["params"]]
        gradients = [gradient for gradient in every if gradient is not None]
        self._lists = self._lists or self._look_up()
        if self._lists is None or len(gradients) < len(every):
            super().step()
            self._lists = self._look_up()
            return loss
        rates = torch.tensor([group["lr"] for group in groups], dtype=torch.float32)
        if self._rates is None or self._replayed is None:
            self._rates = torch.empty_like(rates, device=gradients[0].device)
            known = self._rates, groups, self._lists
            self._replayed = Replayed(partial(_step_all, *known))
        on_gpu = self._rates.is_cuda
        self._rates.copy_(rates.pin_memory() if on_gpu else rates, non_blocking=on_gpu)
        settings = [(group["betas"], group["weight_decay"], group["eps"]) for group in groups]
        self._replayed(gradients, settings=settings)
        return loss

    def _look_up(self) -> list[tuple[list[Tensor], ...]] | None:
        """Parameters, averages, squares and counts of steps; None where the kernel is not for them.

        It is for tensors of one kind, all of which have been trained before.
        """
        found = []
        for group in self.param_groups:
            kept = group["params"]
            states = [self.state[each] for each in kept if each in self.state]
            kinds = {(each.dtype, each.device) for each in kept}
            other = not group["fused"] or group["amsgrad"] or group["maximize"]
            if other or len(kinds) != 1 or len(states) != len(kept):
                return None
            found.append((kept, *([state[key] for state in states] for key in STATE)))
        return found

    def forget(self) -> None:
        """Look for the tensors again, some of which are others now."""
        self._lists = self._rates = self._replayed = None

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.forget()


def _step_all(
    rates: Tensor,
    groups: list[dict[str, Any]],
    every: list[tuple[list[Tensor], ...]],
    gradients: list[Tensor],
) -> None:
    """A fused step of all groups, each at its rate."""
    begin = 0
    for group, rate, (parameters, averages, squares, steps) in zip(
        groups, rates, every, strict=True
    ):
        torch._foreach_add_(steps, 1)
        end = begin + len(steps)
        torch._fused_adamw_(
            *(parameters, gradients[begin:end], averages, squares, [], steps),
            lr=rate,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        begin = end


def make_adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], trainer: Any
) -> optim.AdamW:
    """AdamW for the trainer's device and precision: on a GPU fused, which is one kernel for many
    tensors.

    Not with `16-mixed`, whose gradients are scaled: the fused step takes the scale off itself, when
    the gradients have been clipped and looked at.

    Args:
        groups: of parameters.
        lr: learning rate.
        betas: of the averages.
        trainer: Lightning's.
    """
    eps = 1e-8
    if trainer.precision == "16-true":  # where 1e-8 is 0, and so are most squares
        eps = 1e-4
        if trainer.is_global_zero:
            _logger.warning("trainer.precision 16-true: AdamW's eps is %g, not 1e-08", eps)
    fused = trainer.strategy.root_device.type == "cuda" and trainer.precision != "16-mixed"
    # False would rule out steps of several tensors at a time as well.
    optimizer = ListedAdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused or None)
    # Of gradients that are not scaled; Lightning would refuse to clip them.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def place_steps(optimizer: optim.Optimizer) -> None:
    """Put the counts of steps where the optimiser looks for them, after they have been loaded.

    A fused one looks beside its parameters, any other one on the CPU. A checkpoint may come
    from either.
    """
    for group in optimizer.param_groups:
        beside = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step")
            if isinstance(step, Tensor):
                optimizer.state[parameter]["step"] = step.to(parameter.device if beside else "cpu")
    if isinstance(optimizer, ListedAdamW):
        optimizer.forget()


def count_steps(trainer: Any, data: TaskData) -> tuple[int, int, int]:
    """Batches and optimiser steps of one epoch, and optimiser steps of the whole run.

    Lightning's `trainer.estimated_stepping_batches` would open the training loader for good,
    before the position in a checkpoint is restored: a run resumed in the middle of an epoch
    would start that epoch again. Here a loader is made, measured and dropped.

    Raises:
        UserError: the run has no end, or an epoch has no batches.
    """
    batches = len(data.train_dataloader())
    limit = trainer.limit_train_batches
    used = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if used == 0:
        option = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"
        raise OptionError(option, limit, f"enough for one of {batches} batches")
    interval = getattr(trainer, "val_check_interval", 1.0)  # none where it is a time
    if isinstance(interval, int) and interval > used and trainer.check_val_every_n_epoch:
        counted = "or check_val_every_n_epoch null, which counts them over the epochs"
        raise OptionError("val_check_interval", interval, f"at most {used} batches, {counted}")
    per_epoch = math.ceil(used / trainer.accumulate_grad_batches)
    ends = [per_epoch * trainer.max_epochs, trainer.max_steps]  # -1 means without end
    total = min((end for end in ends if end >= 0), default=0)
    if total == 0:
        raise UserError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    return used, per_epoch, total
