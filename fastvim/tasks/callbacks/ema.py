"""The exponential moving average of the weights, as a Lightning callback."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastvim.errors import UserError


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

    Args:
        decay: weight of the old average in each update, in [0, 1].

    Raises:
        UserError: weights in less than float32.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING:
            return
        if trainer.precision in ("bf16-true", "16-true"):
            raise UserError(
                f"ema_decay with trainer.precision {trainer.precision}: averages need float32 "
                "weights; use 32-true, or bf16-mixed"
            )
        pl_module.configure_model()  # the average needs the layers, which Lightning makes later
        self._average_model = AveragedModel(pl_module, device=pl_module.device, **self._kwargs)
        # One average is counted, the initial weights. On the CPU, reading the count at every step
        # costs nothing.
        self._average_model.n_averaged = torch.tensor(1)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        assert self._average_model is not None
        self._average_model.update_parameters(pl_module)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: see the class."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing yet: see the class."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._copy_average_to_current(pl_module)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Outside of training the averages are already loaded: they are the `state_dict`.
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
