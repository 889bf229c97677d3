"""Parameter groups and the learning-rate schedule, shared by every task."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Sequence
from typing import Any

from timm.models import group_parameters
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from torch import optim

from fastvim.errors import UserError
from fastvim.tasks.protocols import TaskData


def parameter_groups(
    model: Any,
    weight_decay: float,
    layer_decay: float | None = None,
    blocks_per_decay: int = 1,
    no_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Split the trainable parameters by weight decay and, with `layer_decay`, by depth.

    Every parameter of two or more dimensions decays, except the names in the model's
    `no_weight_decay()` (a mixer's 1-D parameters, stored stacked as (2, E), are listed there).

    Args:
        model: a timm-style model; `layer_decay` needs its `group_matcher`.
        weight_decay: of the decaying groups.
        layer_decay: factor of the rate from one layer to the one below it; None for one rate.
            The groups then carry `lr_scale`, which timm's schedulers multiply into the rate.
        blocks_per_decay: how many consecutive blocks share one factor. 2 is the published
            fine-tuning of these models, which are twice as deep as a ViT.
        no_decay: further parameter names that don't decay; shell patterns such as `pos_embed*`.
    """
    exempt = {*model.no_weight_decay(), *no_decay}
    layer_of: dict[str, int] = {}
    if layer_decay is not None:
        layer_of = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last_layer = max(layer_of.values(), default=0)

    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not any(fnmatch.fnmatch(name, p) for p in exempt)
        # The head and the final norm are layer `last_layer`: they train at the full rate.
        layers_above = last_layer - layer_of.get(name, last_layer)
        exponent = math.ceil(layers_above / blocks_per_decay)
        if (exponent, decays) not in groups:
            groups[exponent, decays] = {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": 1.0 if layer_decay is None else layer_decay**exponent,
            }
        groups[exponent, decays]["params"].append(parameter)
    return list(groups.values())


def count_steps(trainer: Any, data: TaskData) -> tuple[int, int]:
    """Optimiser steps of one epoch, and of the whole run.

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
        raise UserError(f"limit_train_batches={limit} leaves none of {batches} batches to train on")
    per_epoch = math.ceil(used / trainer.accumulate_grad_batches)
    ends = [per_epoch * trainer.max_epochs, trainer.max_steps]  # -1 means without end
    total = min((end for end in ends if end >= 0), default=0)
    if total == 0:
        raise UserError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    return per_epoch, total


def warmup_cosine(
    optimizer: optim.Optimizer, total_steps: int, warmup_steps: int, warmup_lr: float, min_lr: float
) -> CosineLRScheduler:
    """Linear warm-up from `warmup_lr`, then a cosine from the optimiser's rate to `min_lr`.

    Both count optimiser steps. The cosine starts when the warm-up ends.
    """
    return CosineLRScheduler(
        optimizer,
        t_initial=total_steps - warmup_steps,
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )


class WeightDecayCosine:
    """Weight decay that follows half a cosine over the run, in every group that has any.

    Args:
        optimizer: its groups' `weight_decay` is where they start.
        end: where they end.
        total_steps: optimiser steps of the run.
    """

    def __init__(self, optimizer: optim.Optimizer, end: float, total_steps: int) -> None:
        self._optimizer = optimizer
        self._starts = [group["weight_decay"] for group in optimizer.param_groups]
        self._end, self._total_steps = end, total_steps

    def step_update(self, num_updates: int) -> None:
        """Set the decay for a number of optimiser steps."""
        left = (1 + math.cos(math.pi * min(num_updates / self._total_steps, 1.0))) / 2
        # A restored optimiser has new group objects, in the same order.
        for group, start in zip(self._optimizer.param_groups, self._starts, strict=True):
            if start > 0:
                group["weight_decay"] = self._end + (start - self._end) * left


def warmup_linear(
    optimizer: optim.Optimizer, total_steps: int, warmup_steps: int, warmup_lr: float, min_lr: float
) -> PolyLRScheduler:
    """Linear warm-up from `warmup_lr`, then a line from the optimiser's rate to `min_lr`.

    Both count optimiser steps. The line starts when the warm-up ends.
    """
    return PolyLRScheduler(
        optimizer,
        t_initial=total_steps - warmup_steps,
        power=1.0,
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def warmup_steps_down(
    optimizer: optim.Optimizer,
    total_steps: int,
    warmup_steps: int,
    warmup_lr: float,
    drops: Sequence[float],
) -> MultiStepLRScheduler:
    """Linear warm-up from `warmup_lr`, then the optimiser's rate, and a tenth of it at each drop.

    Args:
        optimizer: at the peak rate.
        total_steps: optimiser steps of the run.
        warmup_steps: length of the warm-up.
        warmup_lr: where the warm-up starts.
        drops: fractions of `total_steps` after which the rate falls.
    """
    return MultiStepLRScheduler(
        optimizer,
        # The rate falls after this many steps; timm counts one ahead.
        decay_t=[round(drop * total_steps) + 1 for drop in drops],
        decay_rate=0.1,
        warmup_t=warmup_steps,
        warmup_lr_init=warmup_lr,
        warmup_prefix=False,
        t_in_epochs=False,
    )
