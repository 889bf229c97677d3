"""What every task shares: options, network and weights, schedule, checkpoints."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn, optim

from fastvim.cudagraph import compile_for
from fastvim.errors import OptionError, UserError
from fastvim.graphed import GraphedModel
from fastvim.models import create_model
from fastvim.options import (
    COUNT,
    NOT_NEGATIVE,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    check,
    check_given,
)
from fastvim.tasks.callbacks.ema import EMA
from fastvim.tasks.callbacks.refused import refuse_callbacks
from fastvim.tasks.classes import fit_classes, require_classes
from fastvim.tasks.optim import count_steps, make_adamw, parameter_groups, place_steps
from fastvim.tasks.origin import ORIGIN, origin_of
from fastvim.tasks.protocols import TaskData
from fastvim.tasks.resuming import KEY, TASK, batches_of, go_on, require_same_model
from fastvim.tasks.run_folder import RUN
from fastvim.tasks.schedules import (
    Curve,
    Schedule,
    cosine_by_epochs,
    cosine_by_steps,
    epoch_of_step,
    half_cosine,
)
from fastvim.tasks.step_log import log_step
from fastvim.tasks.strategies import ShardedStrategy
from fastvim.tasks.streams import OwnStream
from fastvim.weights import METADATA_KEY, Checkpoint, find, load_state
from fastvim.weights.files import check_finite
from fastvim.weights.fit import differences
from fastvim.weights.metadata import own_options
from fastvim.weights.published import terms

_logger = logging.getLogger(__name__)


class Task(L.LightningModule):
    """Trains a timm model on a schedule of optimiser steps: warm-up, then a cosine.

    A subclass sets `monitor` and `monitor_mode`, builds `self.model` in `configure_model`, and
    defines the steps.

    The options of a recipe are declared here, once. A subclass adds its own, restates those with
    another default, and passes the rest on as `**options`, where the command line finds them. An
    option that the subclass fixes in its call of this constructor is not on the command line.

    Args:
        model: name of a timm model, e.g. `fastvim_tiny_patch16_224`.
        model_args: options of that model, e.g. `{drop_path_rate: 0.05, img_size: 224}`.
        num_classes: width of the head; None takes the data's. Where it is more than the data's,
            the data's classes are the first outputs, which is said once.
        checkpoint: weights to start from: a file, or the name of published ones; None for random
            ones. Training makes a new head if the file has none (a masked autoencoder's, whose
            encoder is taken) or one for other classes. Known ones keep their outputs, by name.
        lr: peak learning rate for `lr_batch` images a step. The rate used is
            `lr * global batch / lr_batch`. The global batch is images per process times
            processes times `accumulate_grad_batches`.
        lr_batch: the global batch that `lr` is for.
        min_lr: where the schedule ends.
        warmup_lr: where the linear warm-up starts.
        warmup_epochs: length of the warm-up; the cosine starts after it. A warm-up as long as the
            run is shortened to a tenth of the run.
        weight_decay: of every parameter of two or more dimensions.
        weight_decay_end: where it ends, along half a cosine over the run; None keeps it.
        no_decay: shell patterns of further parameter names without weight decay.
        decay_vectors: biases, norms and other vectors decay too.
        layer_decay: factor of the rate from one layer to the one below it; None for one rate.
        blocks_per_decay: how many consecutive blocks share one factor of `layer_decay`.
        lr_scales: factors of the rate by shell pattern of parameter names.
        lr_by_epoch: the rate follows the epoch with its fraction, and the warm-up ends at the peak
            of the next step. False: it follows the optimiser steps, and the warm-up's last step
            has the peak.
        betas: of AdamW.
        ema_decay: decay of the averaged weights, which are validated and exported; None trains
            without them.
        grad_checkpointing: recompute each block in the backward pass, to save memory.
        capture: on a GPU, record the model's forward and backward pass as CUDA graphs and replay
            them: the same steps, several times faster where the model is small. Not with
            `grad_checkpointing`.

    Attributes:
        resuming: whether the run resumes from a checkpoint of its own. That holds all weights:
            `checkpoint` is then not read.
        origin: what the metadata of exported weights say of those that the run started from:
            `started_from` and `licence`. Empty where no licence is known.
        run: name of the run, which its checkpoints hold (`fastvim.tasks.run_folder`).

    Raises:
        UserError: unknown model or model option; a checkpoint that does not fit the model; fewer
            outputs than the data have classes; a run without an end.
    """

    monitor: str  # the metric that the best checkpoint is chosen by
    monitor_mode: str  # "max" if higher is better, "min" if lower is
    uses_labels = True
    classes_by_name = True  # see `fastvim.tasks.classes`
    default_no_decay: tuple[str, ...] = ()  # where `no_decay` is None
    fixed_options: tuple[str, ...] = ()  # that the class sets itself: it does not take them
    head_options: tuple[str, ...] = ()  # own ones, that the network follows from

    def __init__(
        self,
        model: str,
        model_args: dict[str, Any] | None = None,
        num_classes: int | None = None,
        checkpoint: str | None = None,
        *,
        lr: float,
        lr_batch: int,
        min_lr: float = 0.0,
        warmup_lr: float = 0.0,
        warmup_epochs: float,
        weight_decay: float = 0.05,
        weight_decay_end: float | None = None,
        no_decay: list[str] | None = None,
        decay_vectors: bool = False,
        layer_decay: float | None = None,
        blocks_per_decay: int = 1,
        lr_scales: dict[str, float] | None = None,
        lr_by_epoch: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        ema_decay: float | None = None,
        grad_checkpointing: bool = False,
        capture: bool = True,
    ) -> None:
        super().__init__()
        # Those of the subclass too, and only what it takes: they build the task again.
        self.save_hyperparameters(ignore=self.fixed_options)
        check_given(COUNT, num_classes=num_classes)
        check(COUNT, lr_batch=lr_batch, blocks_per_decay=blocks_per_decay)
        check(NOT_NEGATIVE, lr=lr, min_lr=min_lr, warmup_lr=warmup_lr, weight_decay=weight_decay)
        check(NOT_NEGATIVE, warmup_epochs=warmup_epochs)
        check_given(NOT_NEGATIVE, weight_decay_end=weight_decay_end, lr_scales=lr_scales)
        check_given(SHARE_ABOVE_0, layer_decay=layer_decay)
        check(SHARE_BELOW_1, betas=betas)
        check_given(SHARE_BELOW_1, ema_decay=ema_decay)
        self.model_name, self.model_args = model, model_args or {}
        self.checkpoint, self.num_classes = checkpoint, num_classes
        self.lr, self.lr_batch, self.min_lr = lr, lr_batch, min_lr
        self.warmup_lr, self.warmup_epochs = warmup_lr, warmup_epochs
        self.weight_decay, self.weight_decay_end = weight_decay, weight_decay_end
        self.no_decay = list(self.default_no_decay) if no_decay is None else no_decay
        self.decay_vectors = decay_vectors
        self.layer_decay, self.blocks_per_decay = layer_decay, blocks_per_decay
        self.lr_scales, self.lr_by_epoch = lr_scales, lr_by_epoch
        self.betas, self.ema_decay = betas, ema_decay
        self.grad_checkpointing, self.capture = grad_checkpointing, capture
        self.resuming, self.run = False, uuid.uuid4().hex
        self.origin: dict[str, str] = {}
        self.model: nn.Module | None = None
        self._captured: Callable[[Tensor], Any] | None = None
        self._compiled: set[bool] = set()  # whether of training, or of evaluation

    # The network and its weights.

    def build_model(self, **options: Any) -> nn.Module:
        """The network, with the weights of `checkpoint` if there is one.

        In training it gets a new head if the file has none, or one for another number of classes.
        """
        model = self.create_network(**options)
        if (given := self.initial_weights()) is not None:
            load_state(model, fit_classes(self, given), new_head=self.fitting)
        return model

    def create_network(self, **options: Any) -> nn.Module:
        """The timm model, with its own initial weights."""
        model = create_model(self.model_name, **options, **self.model_args)
        if self.grad_checkpointing:
            model.set_grad_checkpointing()  # type: ignore[operator]
        return model

    def initial_weights(self) -> Checkpoint | None:
        """The weights to start from, with whose licence goes on; None when resuming."""
        if self.resuming or self.checkpoint is None:
            return None
        given = find(self.checkpoint)
        self.origin = origin_of(given)
        return given

    def setup(self, stage: str) -> None:
        """Compare the width of the head with the data's classes; Lightning calls it."""
        if self.num_classes is None:
            return
        known = self.data.num_classes
        if self.num_classes < known:
            expected = f"{known} or more, the number of classes in the data"
            raise OptionError("num_classes", self.num_classes, expected)
        if self.num_classes > known and self.trainer.is_global_zero:
            _logger.warning(
                "num_classes %d: the data's %d classes are taken for the first outputs",
                *(self.num_classes, known),
            )

    def output_names(self) -> list[str]:
        """A name for each output: the data's, and numbers for those that the data lack."""
        names = self.data.class_names
        return [*names, *map(str, range(len(names), self.head_classes))]

    @property
    def head_classes(self) -> int:
        """Number of classes: the option's, or the data's."""
        return self.num_classes or self.data.num_classes

    def exported_weights(self) -> dict[str, Tensor]:
        """Weights of the trained model, as `fastvim.weights.save` takes them."""
        assert self.model is not None
        return self.model.state_dict()

    def exported_metadata(self) -> dict[str, Any]:
        """How to build the trained model again; JSON's values, and plain Python's."""
        options = own_options(self.model_args)
        return {"model": self.model_name, "model_args": options, **self.origin}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        told = checkpoint.get(METADATA_KEY, {})
        whole = all(key in told for key in ORIGIN)
        self.origin = {key: told[key] for key in ORIGIN} if whole else {}
        trained, given = told.get("value_range"), getattr(self.data, "value_range", None)
        if "value_range" in told and list(trained or ()) != list(given or ()):
            _logger.warning("trained with value_range %s, now it is %s", trained, given)
        require_same_model(self, checkpoint)
        require_classes(self, told, "the checkpoint")
        check_finite("the checkpoint", checkpoint["state_dict"])
        if self.fitting:
            go_on(self, checkpoint)
        if wrong := differences(self.state_dict(), checkpoint["state_dict"]):
            raise UserError(
                f"the checkpoint does not fit {self.model_name} as configured: {'; '.join(wrong)}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = batches_of(self)
        checkpoint[TASK] = type(self).__name__
        checkpoint[RUN] = self.run

    def class_scores(self) -> dict[str, dict[str, float]]:
        """Scores of each class after a test, by score and class name; NaN if a class is absent."""
        return {}

    # The schedule.

    def make_optimizer(self) -> optim.Optimizer:
        """The optimiser of the trainable parameters."""
        groups = parameter_groups(
            self.model,
            self.weight_decay,
            self.layer_decay,
            self.blocks_per_decay,
            self.no_decay,
            self.decay_vectors,
            self.lr_scales,
        )
        return make_adamw(groups, self.peak_lr, self.betas, self.trainer)

    def configure_callbacks(self) -> list[L.Callback]:
        refuse_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        return [OwnStream(), *([] if self.ema_decay is None else [EMA(self.ema_decay)])]

    def warmup(self, steps_per_epoch: int) -> tuple[int, str]:
        """Optimiser steps of the warm-up, and a line that says where they come from."""
        steps = round(self.warmup_epochs * steps_per_epoch)
        return steps, f"warmup_epochs is {self.warmup_epochs:g} ({steps} steps)"

    def make_rate(self, total: float, warmup: float) -> Curve:
        """The learning rate over the run, in optimiser steps or, with `lr_by_epoch`, in epochs."""
        curve = cosine_by_epochs if self.lr_by_epoch else cosine_by_steps
        return curve(self.peak_lr, total, warmup, self.warmup_lr, self.min_lr)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        batches, steps_per_epoch, total = count_steps(self.trainer, self.data)
        warmup = 0
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._check_averaging(total)
            warmup = self._fit_warmup(steps_per_epoch, total)
        position: Callable[[int], float] = float
        if self.lr_by_epoch:
            position = epoch_of_step(steps_per_epoch, batches, self.trainer.accumulate_grad_batches)
        optimizer, length = self.make_optimizer(), position(total)
        decay = None
        if self.weight_decay_end is not None:
            decay = half_cosine(self.weight_decay, self.weight_decay_end, length)
        whole = self.lr_by_epoch and warmup == self.warmup(steps_per_epoch)[0]  # not shortened
        rate = self.make_rate(length, self.warmup_epochs if whole else position(warmup))
        scheduler = Schedule(optimizer, rate, decay, position)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _fit_warmup(self, steps_per_epoch: int, total_steps: int) -> int:
        """Steps of the warm-up; a tenth of the run where it would be as long as the run."""
        steps, source = self.warmup(steps_per_epoch)
        if steps < total_steps:
            return steps
        if self.trainer.is_global_zero:
            _logger.warning(
                "%s but the whole run is %d steps: the warm-up is shortened to %d",
                *(source, total_steps, total_steps // 10),
            )
        return total_steps // 10

    def _check_averaging(self, total_steps: int) -> None:
        """Warn of an average that has not forgotten the initial weights when the run ends."""
        initial = 0.0 if self.ema_decay is None else self.ema_decay**total_steps
        if initial > 0.05 and self.trainer.is_global_zero:
            _logger.warning(
                "%.0f %% of the averaged weights will still be the initial ones after %d steps: "
                "lower ema_decay from %g, say to %.3g",
                *(100 * initial, total_steps, self.ema_decay, max(0.0, 1 - 30 / total_steps)),
            )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # Optimiser steps done so far: a resumed run continues the curve from the loop's counter.
        scheduler.step_update(self.trainer.global_step)

    def call_model(self, images: Tensor, **options: Any) -> Any:
        """Call the model; in a fit with `capture` and without options, through a `GraphedModel`."""
        assert self.model is not None
        training = self.model.training
        run = self.model if options else self._captured or self.model
        # A capture of the training does so itself.
        alone = run is self.model or not training
        if images.is_cuda and training not in self._compiled and alone:
            self._compiled.add(training)
            compile_for(self.model, images)
        return run(images, **options)

    def on_fit_start(self) -> None:
        if self.origin and self.trainer.is_global_zero:
            source, licence = (self.origin[key] for key in ORIGIN)
            _logger.warning(
                "started from %s: its %s, goes on to these weights", source, terms(licence)
            )
        sharded = isinstance(self.trainer.strategy, ShardedStrategy)
        if self.capture and sharded and self.trainer.is_global_zero:
            _logger.warning("fsdp2: training steps are not captured, whole weights come and go")
        # Recomputing blocks restores random states, which a graph cannot.
        if self.capture and not sharded and not self.grad_checkpointing:
            assert self.model is not None
            # A submodule would list the model's weights a second time.
            self._captured = GraphedModel(self.model, lends=self.trainer.world_size == 1).__call__

    def on_train_start(self) -> None:
        # A checkpoint brings the settings of its optimiser along; this run's count.
        schedule: Any = self.lr_schedulers()
        schedule.restore(self.trainer.global_step)
        place_steps(schedule.optimizer)

    def on_fit_end(self) -> None:
        self._captured = None  # graphs hold memory

    def log_training(self, loss: Tensor, batch_size: int | None = None) -> None:
        """Log a training step's loss, and the highest rate of any group.

        Args:
            loss: of the step.
            batch_size: images in the batch; None lets Lightning read it off the first tensor.
        """
        log_step(self, loss, batch_size)

    @property
    def fitting(self) -> bool:
        """Whether this is training, with its validations, and not an evaluation."""
        return bool(self.trainer.state.fn == TrainerFn.FITTING)

    @property
    def global_batch(self) -> int:
        """Images of one optimiser step over all processes."""
        trainer = self.trainer
        return self.data.batch_size * trainer.world_size * trainer.accumulate_grad_batches

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up, scaled to the global batch."""
        return self.lr * self.global_batch / self.lr_batch

    @property
    def data(self) -> TaskData:
        """The data module of the run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]
