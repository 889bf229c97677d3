"""Learning rates and weight decay over the steps of a run, as published.

A position is the number of optimiser steps done, or the epoch with its fraction: rates that are set
per epoch fraction follow the batches where gradients are accumulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import optim

Curve = Callable[[float], float]  # from a position to a value


class Schedule:
    """Sets the learning rate, and the weight decay if it moves, before every optimiser step.

    The rate of a group is the curve's value times the group's `lr_scale`. A group without weight
    decay keeps none. What it sets depends on the number of steps alone: there is no state.

    Args:
        optimizer: its rates are set at once.
        rate: the learning rate at each position.
        decay: the weight decay at each position; None leaves it alone.
        position: from the number of optimiser steps done to the position; None for that number.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        rate: Curve,
        decay: Curve | None = None,
        position: Callable[[int], float] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._rate, self._decay, self._position = rate, decay, position
        self._settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._decays = [group["weight_decay"] > 0 for group in optimizer.param_groups]
        self.step_update(0)

    def step_update(self, steps: int) -> None:
        """Set the values for the step after `steps` optimiser steps."""
        position = steps if self._position is None else self._position(steps)
        rate = self._rate(position)
        # A restored optimiser has new group objects, in the same order.
        for group, decays in zip(self.optimizer.param_groups, self._decays, strict=True):
            group["lr"] = rate * group.get("lr_scale", 1.0)
            if self._decay is not None and decays:
                group["weight_decay"] = self._decay(position)

    def restore(self, steps: int) -> None:
        """As `step_update`, with all settings of the groups as they were before any step."""
        for group, settings in zip(self.optimizer.param_groups, self._settings, strict=True):
            group.update(settings)
        self.step_update(steps)

    def state_dict(self) -> dict[str, Any]:
        """Nothing; Lightning asks for it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the number of steps says it all."""


def line(start: float, end: float, share: float) -> float:
    """The value at a share 0 to 1 of the way from start to end."""
    return start + (end - start) * share


def half_cosine(start: float, end: float, length: float) -> Curve:
    """Half a cosine from `start` at position 0 to `end` at `length`, and the end beyond."""

    def value(position: float) -> float:
        share = min(position / length, 1.0)
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    return value


def epoch_of_step(steps: int, batches: int, accumulated: int) -> Callable[[int], float]:
    """From the number of optimiser steps done to the epoch at the next step's first batch.

    Args:
        steps: optimiser steps of an epoch; the last one may have fewer batches.
        batches: of an epoch.
        accumulated: batches of a step.
    """

    def epoch(done: int) -> float:
        whole, step = divmod(done, steps)
        return whole + step * accumulated / batches

    return epoch


def cosine_by_steps(peak: float, total: float, warmup: float, start: float, end: float) -> Curve:
    """A line whose last step has the peak, which the cosine's first step has again.

    The cosine would reach `end` at step `total`, after the last one.

    Args:
        peak: the highest rate.
        total: steps of the run.
        warmup: steps of the line.
        start: the rate of the line's first step.
        end: where the cosine goes.
    """

    down = half_cosine(peak, end, total - warmup)

    def rate(step: float) -> float:
        if step < warmup:
            return line(start, peak, step / (warmup - 1)) if warmup > 1 else peak
        return down(step - warmup)

    return rate


def cosine_by_epochs(peak: float, total: float, warmup: float, start: float, end: float) -> Curve:
    """A line over the first epochs, then a cosine to the last, of the epoch with its fraction.

    The arguments are those of `cosine_by_steps`, in epochs.
    """

    down = half_cosine(peak, end, total - warmup)

    def rate(epoch: float) -> float:
        return line(start, peak, epoch / warmup) if epoch < warmup else down(epoch - warmup)

    return rate


def line_by_steps(peak: float, total: float, warmup: float, start: float, end: float) -> Curve:
    """A line up whose last step has the peak; from the next step, again the peak, a line down.

    The last step of the run has `end`. The arguments are those of `cosine_by_steps`.
    """
    up = cosine_by_steps(peak, total, warmup, start, end)

    def rate(step: float) -> float:
        if step < warmup:
            return up(step)
        return line(peak, end, min(1.0, (step - warmup) / max(1, total - 1 - warmup)))

    return rate


def drops_by_steps(
    peak: float, total: float, warmup: float, start: float, drops: Sequence[float]
) -> Curve:
    """A line up whose last step has the peak, then a tenth of the rate from each drop on.

    Args:
        peak: the highest rate.
        total: steps of the run.
        warmup: steps of the line.
        start: the rate of the line's first step.
        drops: shares of the run after which the rate falls.
    """
    up = cosine_by_steps(peak, total, warmup, start, peak)
    steps = [round(drop * total) for drop in drops]

    def rate(step: float) -> float:
        return up(step) * 0.1 ** sum(step >= drop for drop in steps)

    return rate
