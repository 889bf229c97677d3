"""The exponential moving average of the weights, as a Lightning callback."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA(WeightAveraging):
    """Averages the weights after every step, with one decay from the first step on.

    Lightning's callback does the work: the averages are what is validated and what a
    checkpoint's `state_dict` holds, beside the trained weights in `current_model_state`.
    Three things differ from Lightning's `EMAWeightAveraging`, each for the published recipe or
    for exact resume: the average starts from the initial weights instead of from those after
    the first step; all tensors are updated in a few fused calls without waiting for the GPU;
    the module takes the averages over at the end of `fit` rather than at the end of training,
    where a late checkpoint would store them as the trained weights.

    Args:
        decay: weight of the old average in each update, in [0, 1].
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING:
            return
        pl_module.configure_model()  # the average needs the layers, which Lightning makes later
        self._average_model = AveragedModel(pl_module, device=pl_module.device, **self._kwargs)
        # One average is counted, the initial weights. The count stays on the CPU, where reading
        # it at every step costs nothing.
        self._average_model.n_averaged = torch.tensor(1)

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
