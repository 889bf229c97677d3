"""One case after another: build the model, check it, time it."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from fastvim.benchmark import check
from fastvim.benchmark.cases import (
    Case,
    Settings,
    channels_of,
    create,
    is_ours,
    random_images,
)
from fastvim.benchmark.record import OUT_OF_MEMORY, Row
from fastvim.benchmark.roofline import Blocks, copy_rate, product_seconds
from fastvim.benchmark.timing import measure, peak_gib, reset_peak
from fastvim.benchmark.training import TrainingLoop, TrainingStep, Uncapturable
from fastvim.errors import UserError
from fastvim.models import FastVim

_logger = logging.getLogger(__name__)


class _Unusable(Exception):
    """Why a row has no times."""


@dataclass
class Bench:
    """Measures cases under the same settings. What cases share is measured once.

    Attributes:
        settings: of the run.
    """

    settings: Settings
    _engine_errors: dict[tuple[str, tuple[int, int]], float] = field(default_factory=dict)
    _products: dict[Blocks, float] = field(default_factory=dict)
    _copy_rate: float | None = None

    def validate(self, case: Case) -> None:
        """Raise UserError for a case that can never run."""
        settings = self.settings
        if "graph" in case.mode and settings.device.type != "cuda":
            raise UserError(f"mode {case.mode} needs a CUDA device, not {settings.device.type}")

    def measure(self, case: Case) -> Row:
        """The row of a case. A failure of one model is a value of its row.

        Raises:
            UserError: a case that can never run.
        """
        self.validate(case)
        settings = self.settings
        row = Row(
            case.model,
            case.size,
            case.batch,
            case.mode,
            settings.dtype,
            settings.train,
            settings.channels_last,
        )
        torch.manual_seed(0)
        try:
            with _on(settings.device):
                self._fill(row)
        except torch.OutOfMemoryError:
            row.failure = OUT_OF_MEMORY
        except (_Unusable, Uncapturable) as error:
            row.failure = str(error)
        except Exception as error:
            # Any of a thousand models may fail at this size or mode; the run continues.
            _logger.debug("%s failed", case, exc_info=True)
            first = (str(error).strip().split("\n") or [""])[0]
            row.failure = f"{type(error).__name__}: {first}"
        if "compiled" in case.mode:
            # Reset: torch.compile limits recompiles per code object.
            torch.compiler.reset()
        self._release()
        return row

    def _fill(self, row: Row) -> None:
        settings = self.settings
        model = create(row.model, row.size)
        model = model.to(settings.device, settings.precision.weights)
        model = model.to(memory_format=settings.memory_format)
        row.ours = is_ours(model)
        if settings.check:
            row.bound = settings.precision.bound
            if row.ours:
                row.checked_size = check.checked_size(model, row.size, settings.train)
                error = self._engine_error(row, model)
                row.engine_error = _finite(error)
                self._require(error, "the reference")
        if settings.train:
            self._time_training(row, model)
        else:
            self._time_inference(row, model)
            if settings.roofline and settings.device.type == "cuda" and isinstance(model, FastVim):
                row.roofline_ms = 1e3 * self._roofline(model, row)

    def _time_inference(self, row: Row, model: nn.Module) -> None:
        settings = self.settings
        reset_peak(settings.device)
        shape = (row.batch, channels_of(model), *row.size)
        served = check.predictor(model, shape, row.mode, settings)
        if "graph" in row.mode and not served.captured:
            raise _Unusable(str(served.reason))
        served.replay()
        row.memory_gib = peak_gib(settings.device)
        served.images.copy_(random_images(shape, settings))
        if settings.check:
            error = check.mode_error(served, settings)
            row.mode_error = _finite(error)
            self._require(error, "the eager model")
        self._time(row, served.replay)

    def _time_training(self, row: Row, model: nn.Module) -> None:
        settings = self.settings
        shape = (row.batch, channels_of(model), *row.size)
        images = random_images(shape, settings)
        model.train()
        reset_peak(settings.device)
        step = TrainingStep(
            model,
            images,
            settings.precision,
            compile="compiled" in row.mode,
            capture="graph" in row.mode,
        )
        step.renew()
        step()
        row.memory_gib = peak_gib(settings.device)
        if settings.check:
            error = check.step_error(step, settings)
            row.mode_error = _finite(error)
            self._require(error, "the eager model")
        self._time(row, step)
        # `fastvim fit` compiles nothing, and its weights are float32.
        if "compiled" not in row.mode and settings.precision.weights == torch.float32:
            step.release()
            self._time_loop(row, step)

    def _time_loop(self, row: Row, step: TrainingStep) -> None:
        """The loop of `fastvim fit` over the model, images and classes of a step."""
        settings, capture = self.settings, "graph" in row.mode
        step.model.zero_grad(set_to_none=True)  # the gradients are in the step's graph
        reset_peak(settings.device)
        try:
            loop = TrainingLoop(
                step.model, step.images, step.classes, settings.precision, capture=capture
            )
            for _ in range(2):  # the second step finds the optimiser's state
                loop()
            row.loop_memory_gib = peak_gib(settings.device)
            if settings.check:
                error = check.loop_error(loop, settings)
                row.loop_error = _finite(error)
                self._require(error, "the eager step, in the training loop")
            timing = measure(loop, settings.device, settings.warmup, settings.repeats)
        except torch.OutOfMemoryError:
            _logger.warning("%s (%d): the training loop is out of memory", row.model, row.batch)
            return
        row.loop_ms = 1e3 * timing.median
        row.loop_images_per_second = row.batch / timing.median

    def _time(self, row: Row, call: Callable[[], object]) -> None:
        settings = self.settings
        timing = measure(call, settings.device, settings.warmup, settings.repeats)
        row.latency_ms = 1e3 * timing.median
        row.latency_quartiles_ms = 1e3 * timing.lower, 1e3 * timing.upper
        row.images_per_second = row.batch / timing.median

    def _engine_error(self, row: Row, model: nn.Module) -> float:
        size = check.checked_size(model, row.size, self.settings.train)
        key = (row.model, size)
        if key not in self._engine_errors:
            self._engine_errors[key] = check.engine_error(model, size, self.settings)
            self._release()
        return self._engine_errors[key]

    def _require(self, error: float, other: str) -> None:
        bound = self.settings.precision.bound
        if math.isinf(error):
            raise _Unusable(f"wrong: results not finite, or all 0 (compared with {other})")
        if error > bound:
            raise _Unusable(f"wrong: relative error {error:.2g} to {other}, above {bound:g}")

    def _roofline(self, model: FastVim, row: Row) -> float:
        """Seconds of a batch at the roofline."""
        device, dtype = self.settings.device, self.settings.precision.products
        if self._copy_rate is None:
            self._copy_rate = copy_rate(device)
        blocks = Blocks.of(model, row.batch, row.size)
        if blocks not in self._products:
            self._products[blocks] = product_seconds(blocks, dtype, device)
        return blocks.seconds(self._products[blocks], self._copy_rate, dtype.itemsize)

    def _release(self) -> None:
        """Free the device's memory, including what reference cycles hold."""
        if self.settings.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """The context in which events and streams are made: on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _finite(error: float) -> float | None:
    """None for infinity, which JSON lacks; the row's `failure` says so."""
    return error if math.isfinite(error) else None
