"""The exponential moving average of the weights, as a Lightning callback."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastvim.tasks.replayed import Replayed
from fastvim.tasks.sharding import divide_copy, gather, local
from fastvim.tasks.tensors import TensorsOf


class EMA(WeightAveraging):
    """Averages the weights before every optimiser step, with one decay from the first step on.

    Lightning's callback validates the averages and stores them as a checkpoint's `state_dict`,
    beside the trained weights in `current_model_state`. Four things differ from its
    `EMAWeightAveraging`, for the published recipe or for exact resume. The average starts from the
    initial weights, not from those after the first step. It lags a step: what it takes in are the
    weights that the step is about to change. All tensors are updated in a few fused
    calls that do not synchronise with the GPU. The module takes over the averages at the end of
    `fit`, not at the end of training, where a late checkpoint would store them as the trained
    weights.

    The averages are float32 where the weights are less, as a step changes an average by less than
    such a weight can. They are rounded for validations alone.

    Args:
        decay: weight of the old average in each update, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False)
        self._update = Replayed(partial(_update, get_ema_multi_avg_fn(decay)))
        self._trained: list[Tensor] | None = None  # weights, while a validation uses rounded ones
        self._tensors: tuple[TensorsOf, TensorsOf] | None = None  # of the averages, of the module

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING:
            return
        pl_module.configure_model()  # the average needs the layers, which Lightning makes later
        self._tensors = None
        self._average_model = AveragedModel(pl_module, device=pl_module.device, **self._kwargs)
        if trainer.precision == "64-true":
            self._average_model.double()
        elif trainer.precision in ("bf16-true", "16-true"):
            self._average_model.float()
        # One average is counted, the initial weights. On the CPU, reading the count at every step
        # costs nothing.
        self._average_model.n_averaged = torch.tensor(1)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._average_model is not None
        divide_copy(self._average_model.module, pl_module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        assert self._average_model is not None
        if self._tensors is None:
            self._tensors = TensorsOf(self._average_model.module), TensorsOf(pl_module)
        (averages, kept), (weights, buffers) = (each.find() for each in self._tensors)
        old = [local(average) for average in averages]
        with torch.no_grad():
            new = [local(weight) for weight in weights]
            pairs = zip(old, new, strict=True)
            new = [w if w.dtype == average.dtype else w.to(average.dtype) for average, w in pairs]
            self._update(old, new, kept, buffers)
        self._average_model.n_averaged += 1

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: see the class."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing yet: see the class."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for average, current in self._pairs(pl_module):
            if average.dtype == current.dtype:
                current.data.copy_(average.data)
            else:  # not rounded where they are exported
                current.data = average.data

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        """Put the averages into the module for a validation, and the trained weights back."""
        pairs = self._pairs(pl_module)
        if all(average.dtype == current.dtype for average, current in pairs):
            super()._swap_models(pl_module)
        elif self._trained is None:
            self._trained = [current.data.clone() for _, current in pairs]
            for average, current in pairs:
                current.data.copy_(average.data)
        else:
            for (_, current), trained in zip(pairs, self._trained, strict=True):
                current.data.copy_(trained)
            self._trained = None

    def _pairs(self, pl_module: L.LightningModule) -> list[tuple[Tensor, Tensor]]:
        """Each parameter and buffer of the averages, and of the module."""
        assert self._average_model is not None
        own = self._average_model.module
        averages = chain(own.parameters(), own.buffers())
        return list(zip(averages, chain(pl_module.parameters(), pl_module.buffers()), strict=True))

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = gather(checkpoint["state_dict"], trainer.is_global_zero)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Outside of training the averages are already loaded: they are the `state_dict`.
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _update(
    average: Callable[..., None],
    old: list[Tensor],
    new: list[Tensor],
    kept: list[Tensor],
    buffers: list[Tensor],
) -> None:
    """Take weights into the averages, and copy the buffers beside them."""
    average(old, new, None)
    if buffers:
        torch._foreach_copy_(kept, buffers)
