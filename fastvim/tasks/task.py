"""What every task shares: its network and weights, its schedule, what its checkpoints hold."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn, optim

from fastvim.errors import UserError, first_few
from fastvim.graphed import GraphedModel
from fastvim.models import create_model
from fastvim.tasks.callbacks.ema import EMA
from fastvim.tasks.optim import WeightDecayCosine, count_steps, warmup_cosine
from fastvim.weights import load_weights

_logger = logging.getLogger(__name__)


class Task(L.LightningModule):
    """Trains a timm model on a schedule of optimiser steps: warm-up, then a cosine.

    A subclass sets `monitor` and `monitor_mode`, builds `self.model` in `configure_model`, and
    gives the steps and `make_optimizer`. The data module must have `batch_size` (images per
    process).

    Args:
        model: name of a timm model.
        model_args: options of that model.
        checkpoint: file of weights to start from; None starts from random ones.
        lr: peak learning rate for `lr_batch` images a step. The rate used is
            `lr * global batch / lr_batch`, the global batch being images per process times
            processes times `accumulate_grad_batches`.
        lr_batch: see `lr`.
        min_lr: where the cosine ends.
        warmup_lr: where the linear warm-up starts.
        warmup_epochs: length of the warm-up; the cosine starts after it.
        weight_decay_end: where the optimiser's weight decay ends, along half a cosine over the
            run; None keeps it as it is.
        ema_decay: decay of the averaged weights, which are validated and exported; None trains
            without them.
        grad_checkpointing: recompute each block in the backward pass, for memory.
        capture: on a GPU, train with the model's passes captured as graphs, where the task calls it
            through `call_model`.

    Raises:
        UserError: unknown model or model option; checkpoint that does not fit the model; warm-up
            as long as the run.
    """

    monitor: str  # the metric that the best checkpoint is chosen by
    monitor_mode: str  # "max" if higher is better, "min" if lower is

    def __init__(
        self,
        model: str,
        model_args: dict[str, Any] | None,
        checkpoint: str | None,
        *,
        lr: float,
        lr_batch: int,
        min_lr: float,
        warmup_lr: float,
        warmup_epochs: float,
        weight_decay_end: float | None = None,
        ema_decay: float | None = None,
        grad_checkpointing: bool = False,
        capture: bool = False,
    ) -> None:
        super().__init__()
        self.model_name = model
        self.model_args = model_args or {}
        self.checkpoint = checkpoint
        self.lr, self.lr_batch, self.min_lr = lr, lr_batch, min_lr
        self.warmup_lr, self.warmup_epochs = warmup_lr, warmup_epochs
        self.weight_decay_end = weight_decay_end
        self._weight_decay: WeightDecayCosine | None = None
        self.ema_decay = ema_decay
        self.grad_checkpointing = grad_checkpointing
        self.capture = capture
        # One or none; in a list, since a layer's weights would be listed a second time.
        self._graphed: list[GraphedModel] = []
        self.model: nn.Module | None = None

    # The network and its weights.

    def build_model(self, **options: Any) -> nn.Module:
        """The network, with the weights to start from.

        Those are left out where the run goes on from a checkpoint of its own
        (`trainer.ckpt_path`), which holds all weights. Training makes a new head if the file has
        none, or one for another number of classes.
        """
        model = self.create_network(**options)
        if self.initial_weights is not None:
            load_weights(model, self.initial_weights, new_head=self.fitting)
        return model

    def create_network(self, **options: Any) -> nn.Module:
        """The timm model, with its own initial weights."""
        model = create_model(self.model_name, **options, **self.model_args)
        if self.grad_checkpointing:
            model.set_grad_checkpointing()  # type: ignore[operator]
        return model

    @property
    def initial_weights(self) -> str | None:
        """The file to start from; None also where a checkpoint of the run's own is gone on from."""
        return self.checkpoint if self.checkpoint and not self.trainer.ckpt_path else None

    def exported_weights(self) -> dict[str, Tensor]:
        """Weights of the trained model, as `fastvim.weights.save` takes them."""
        assert self.model is not None
        return self.model.state_dict()

    def exported_metadata(self) -> dict[str, Any]:
        """How to build the trained model again; JSON's values, and plain Python's."""
        return {"model": self.model_name, "model_args": self.model_args}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.max_steps != -1:
            _begin_next_epoch(checkpoint["loops"]["fit_loop"])
        own, theirs = self.state_dict(), checkpoint["state_dict"]
        wrong = [
            f"{name} {_shape(theirs.get(name))} for {_shape(own.get(name))}"
            for name in sorted(own.keys() | theirs.keys())
            if _shape(theirs.get(name)) != _shape(own.get(name))
        ]
        if wrong:
            raise UserError(
                f"the checkpoint does not fit {self.model_name} as configured: {first_few(wrong)}"
            )

    def class_scores(self) -> dict[str, dict[str, float]]:
        """After a test, by the name of a score: that of each class, NaN for one that is absent."""
        return {}

    # The schedule.

    def make_optimizer(self) -> optim.Optimizer:
        """The optimiser of the trainable parameters, at the peak rate."""
        raise NotImplementedError

    def configure_callbacks(self) -> list[L.Callback]:
        return [] if self.ema_decay is None else [EMA(self.ema_decay)]

    def warmup(self, steps_per_epoch: int) -> tuple[int, str]:
        """Optimiser steps of the warm-up, and a line that says where they come from."""
        steps = round(self.warmup_epochs * steps_per_epoch)
        return steps, f"warmup_epochs is {self.warmup_epochs:g} ({steps} steps)"

    def make_scheduler(
        self, optimizer: optim.Optimizer, total_steps: int, warmup_steps: int
    ) -> Scheduler:
        """The learning rate over the steps of the run."""
        return warmup_cosine(optimizer, total_steps, warmup_steps, self.warmup_lr, self.min_lr)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        steps_per_epoch, total_steps = count_steps(self.trainer)
        warmup_steps, source = self.warmup(steps_per_epoch)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            warmup_steps = 0
        else:
            self._check_averaging(total_steps)
        if warmup_steps >= total_steps:
            raise UserError(
                f"{source} but the whole run is {total_steps} steps: shorten the warm-up or train "
                "longer"
            )
        optimizer = self.make_optimizer()
        scheduler = self.make_scheduler(optimizer, total_steps, warmup_steps)
        if self.weight_decay_end is not None:
            end = self.weight_decay_end
            self._weight_decay = WeightDecayCosine(optimizer, end, total_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _check_averaging(self, total_steps: int) -> None:
        """Warn of an average that has not forgotten the initial weights when the run ends."""
        initial = 0.0 if self.ema_decay is None else self.ema_decay**total_steps
        if initial > 0.05 and self.trainer.is_global_zero:
            _logger.warning(
                "%.0f %% of the averaged weights will still be the initial ones after %d steps: "
                "lower ema_decay from %g, say to %.3g",
                100 * initial,
                total_steps,
                self.ema_decay,
                max(0.0, 1 - 30 / total_steps),
            )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # Optimiser steps done so far: a resumed run continues the curve from the loop's counter.
        scheduler.step_update(num_updates=self.trainer.global_step)
        if self._weight_decay is not None:
            self._weight_decay.step_update(self.trainer.global_step)

    def call_model(self, images: Tensor) -> Any:
        """What the model gives for images; in a fit with `capture`, by a `GraphedModel`."""
        assert self.model is not None
        model = self._graphed[0] if self._graphed else self.model
        return model(images)

    def on_fit_start(self) -> None:
        # Recomputing blocks draws on random states that a graph cannot tell; other strategies than
        # these divide the parameters among processes.
        whole = isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        if self.capture and whole and not self.grad_checkpointing:
            assert self.model is not None
            self._graphed = [GraphedModel(self.model)]

    def on_fit_end(self) -> None:
        self._graphed = []  # the graphs hold memory

    def log_training(self, loss: Tensor, batch_size: int | None = None) -> None:
        """Log a training step's loss, and the highest rate of any group.

        Args:
            loss: of the step.
            batch_size: images of it; None where the batch's first tensor has them in a dimension.
        """
        rate = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        self.log("train/lr", rate, on_step=True, on_epoch=False)
        epoch: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": batch_size}
        self.log("train/loss_epoch", loss, sync_dist=True, **epoch)

    @property
    def fitting(self) -> bool:
        """Whether this is training, with its validations, and not an evaluation."""
        return bool(self.trainer.state.fn == TrainerFn.FITTING)

    @property
    def global_batch(self) -> int:
        """Images of one optimiser step over all processes."""
        trainer = self.trainer
        return self._data.batch_size * trainer.world_size * trainer.accumulate_grad_batches

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up, scaled to the global batch."""
        return self.lr * self.global_batch / self.lr_batch

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]


def _begin_next_epoch(progress: dict[str, Any]) -> None:
    """Let a run that is limited in steps go on after an epoch that has ended with the next one.

    Lightning does so in runs of so many epochs; here it would end the same epoch once more.

    Args:
        progress: of the fit loop; nothing changes where it is in the middle of an epoch.
    """
    epochs, batches = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    if epochs["current"]["processed"] != epochs["current"]["started"]:
        return
    for counts in (epochs["total"], epochs["current"]):
        counts["completed"] = counts["processed"]
        counts["ready"] = counts["started"] + 1
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False


def _shape(weight: Tensor | None) -> str:
    return "absent" if weight is None else str(tuple(weight.shape))
