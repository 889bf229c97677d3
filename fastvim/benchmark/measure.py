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
from fastvim.benchmark.floor import Blocks, copy_rate, product_seconds
from fastvim.benchmark.record import OUT_OF_MEMORY, Row
from fastvim.benchmark.timing import measure, peak_gib, reset_peak
from fastvim.benchmark.training import TrainingStep, Uncapturable
from fastvim.errors import UserError
from fastvim.models import FastVim

_logger = logging.getLogger(__name__)


class _Unusable(Exception):
    """What a row says instead of its times."""


@dataclass
class Bench:
    """Measures cases under the same settings; what cases share is found once.

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
        """The row of a case; what goes wrong with one model is told in its row.

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
            # Any of a thousand models may fail at this size or mode; the others go on.
            _logger.debug("%s failed", case, exc_info=True)
            first = (str(error).strip().split("\n") or [""])[0]
            row.failure = f"{type(error).__name__}: {first}"
        if "compiled" in case.mode:
            # Compiled code is counted per class, and there are not to be many of one.
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
                self._require(error, "the definitions")
        if settings.train:
            self._time_training(row, model)
        else:
            self._time_inference(row, model)
            if settings.floor and settings.device.type == "cuda" and isinstance(model, FastVim):
                row.floor_ms = 1e3 * self._floor(model, row)

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
            raise _Unusable(f"wrong: results not finite, or all 0 (beside {other})")
        if error > bound:
            raise _Unusable(f"wrong: relative error {error:.2g} to {other}, above {bound:g}")

    def _floor(self, model: FastVim, row: Row) -> float:
        """Seconds of a batch at the floor."""
        device, dtype = self.settings.device, self.settings.precision.products
        if self._copy_rate is None:
            self._copy_rate = copy_rate(device)
        blocks = Blocks.of(model, row.batch, row.size)
        if blocks not in self._products:
            self._products[blocks] = product_seconds(blocks, dtype, device)
        return blocks.seconds(self._products[blocks], self._copy_rate, dtype.itemsize)

    def _release(self) -> None:
        """Give back the device's memory, also what cycles of objects hold."""
        if self.settings.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Events and streams are made on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _finite(error: float) -> float | None:
    """JSON has no infinity; the row's failure tells it."""
    return error if math.isfinite(error) else None
