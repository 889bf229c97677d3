"""Lightning's callbacks that contradict the loop of the tasks."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from fastvim.errors import UserError
from fastvim.tasks.callbacks.ema import EMA

_AVERAGING = "averages that are validated and exported are those of model.ema_decay"
# The callbacks, and what there is instead.
_INSTEAD: dict[type[Callback], str] = {
    StochasticWeightAveraging: _AVERAGING,
    WeightAveraging: _AVERAGING,
    LearningRateFinder: "the schedule sets every rate, from model.lr",
    BatchSizeFinder: "the rate and the order of the images follow from data.batch_size",
    GradientAccumulationScheduler: "the schedule counts steps of trainer.accumulate_grad_batches",
    BaseFinetuning: "model.layer_decay and model.lr_scales slow layers down, LinearProbe freezes",
    ModelPruning: "weights are exported whole",
    # Lightning resumes from its file without being asked to.
    OnExceptionCheckpoint: "last.ckpt is the state to go on from, see checkpoint_every_n_steps",
}


def refuse_callbacks(callbacks: Iterable[Callback]) -> None:
    """Raise for a callback that a task's loop contradicts.

    Raises:
        UserError: naming it, and what there is instead.
    """
    for callback in callbacks:
        for kind, instead in _INSTEAD.items():
            if isinstance(callback, kind) and not isinstance(callback, EMA):
                name = type(callback).__name__
                raise UserError(f"trainer.callbacks: {name} does not work with a task: {instead}")
