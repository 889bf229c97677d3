"""The parts of a training run that `fastvim fit` makes: its loader, its step, and both together.

A run is given a `Parts` in the place of its training loader. That first takes batches and gives
none away (the loader alone), then gives them to the run as they come, and then gives the last ones
again and again, which lie on the device (the step alone).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

ENDLESS = 10**6  # batches of an epoch, as a run is told
KEPT = 4  # batches that are given again and again
LEAST, WARM = 3, 20  # batches of a part; before it, beside those that the loader has ready
TOO_MUCH = 0.2  # share of waiting that makes the loader the bottleneck
ALL = 0.9  # share of a step's time in which the host is said to be as slow


@dataclass(frozen=True)
class FitSpeed:
    """Milliseconds of a batch.

    Attributes:
        batch_size: images of a batch.
        loader: of the loader alone.
        step: of the step alone.
        both: as `fastvim fit` runs them.
        waiting: of `both`, in which the run waits for the loader; on a GPU, that it stands still.
        host: of the step, what the host needs to hand it to a GPU; None on a CPU.
        batches: how many of each part were timed: loader, both, step.
    """

    batch_size: int
    loader: float
    step: float
    both: float
    waiting: float
    host: float | None
    batches: tuple[int, int, int]

    def rate(self, milliseconds: float) -> float:
        """Images/s."""
        return 1000 * self.batch_size / milliseconds

    @property
    def bottleneck(self) -> str:
        """ "data loading", "the step" or "the loop's host time"."""
        if self.loader > self.step or self.waiting > TOO_MUCH * self.both:
            return "data loading"
        if self.host is not None and self.host > ALL * self.step:
            return "the loop's host time"
        return "the step"

    def sentence(self) -> str:
        """Names the bottleneck, with its share of the time."""
        share = f"{self.waiting / self.both:.0%} of the {self.both:,.1f} ms of a batch"
        said = f"The bottleneck is {self.bottleneck}"
        if self.bottleneck == "data loading":
            return f"{said}: the run waits for {share}, and the step alone takes {self.step:,.1f}."
        if self.bottleneck == "the step":
            said += f": it takes {1 - self.waiting / self.both:.0%} of the time, waiting {share}"
            return f"{said}; the loader alone takes {self.loader:,.1f} ms."
        assert self.host is not None
        busy = (
            f"{self.host:,.1f} of the {self.step:,.1f} ms of a step ({self.host / self.step:.0%})"
        )
        return f"{said}: to hand it to the GPU takes {busy}; the run waits for {share}."

    def record(self) -> dict[str, Any]:
        """For JSON."""
        parts = {"loader": self.loader, "step": self.step, "fit": self.both}
        rates = {part: self.rate(value) for part, value in parts.items()}
        return {
            **asdict(self),
            "waiting_share": self.waiting / self.both,
            "images_per_second": rates,
            "bottleneck": self.bottleneck,
        }


class Parts:
    """A training loader that times a run in three parts; in all else it is the run's own.

    Args:
        loader: of a run, with batches of `batch_size` images.
        batch_size: of the loader.
        device: of the run.
        seconds: for which each part is timed, at least; `LEAST` batches are.
        stop: called at the end of the last part, when the loader has no more batches.

    Attributes:
        speed: what was found, None before.
    """

    def __init__(
        self,
        loader: Any,
        batch_size: int,
        device: torch.device,
        seconds: float,
        stop: Callable[[], object],
    ) -> None:
        self._loader, self._batch_size, self._device = loader, batch_size, device
        self._seconds, self._stop = seconds, stop
        self.speed: FitSpeed | None = None
        ahead = loader.num_workers * (loader.prefetch_factor or 0)
        self._warm = WARM + ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Any]:
        batches, kept = self._batches(), deque[Any](maxlen=KEPT)

        alone = _Timed(self._device, self._seconds, self._warm)
        while not alone.over():
            next(batches)

        both = _Timed(self._device, self._seconds, self._warm)
        while not both.over(self._loader.waited):
            batch = next(batches)
            kept.append(tree_map(self._there, batch))
            yield batch
        del batches, batch

        step = _Timed(self._device, self._seconds, WARM)
        while not step.over():
            kept.rotate()
            yield kept[0]

        host = None
        if self._device.type == "cuda":
            spans = []
            for _ in range(2 * LEAST):
                torch.cuda.synchronize(self._device)
                begun = time.perf_counter()
                yield kept[0]
                spans.append(time.perf_counter() - begun)
            host = 1000 * sorted(spans)[LEAST]
        counts = alone.batches, both.batches, step.batches
        times = alone.milliseconds, step.milliseconds, both.milliseconds, both.waited
        self.speed = FitSpeed(self._batch_size, *times, host, counts)
        self._stop()

    def _batches(self) -> Iterator[Any]:
        """Those of the loader, epoch after epoch."""
        epoch = 0
        while True:
            yield from self._loader
            epoch += 1
            if hasattr(self._loader.sampler, "set_epoch"):
                self._loader.sampler.set_epoch(epoch)

    def _there(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, Tensor) else value


class _Timed:
    """Warms up, then counts batches for some seconds.

    Attributes:
        batches: that were timed.
        milliseconds: of one of them, once it is over.
        waited: milliseconds of that, of waiting.
    """

    def __init__(self, device: torch.device, seconds: float, warm: int) -> None:
        self._device, self._seconds, self._warm = device, seconds, warm
        self._count, self._first, self._waited = -1, 0.0, 0.0
        self._since = time.perf_counter()
        self.batches, self.milliseconds, self.waited = 0, 0.0, 0.0

    def over(self, waited: float = 0.0) -> bool:
        """Whether that is all; asked before every batch.

        Args:
            waited: seconds of waiting so far.
        """
        self._count += 1
        now = time.perf_counter()
        late = now - self._since >= self._seconds
        if not self._first:
            if self._count >= self._warm or (late and self._count >= LEAST):
                self._first = self._since = self._now()
                self._count, self._waited = 0, waited
            return False
        if self._count < LEAST or not late:
            return False
        spent = self._now() - self._first
        self.batches = self._count
        self.milliseconds = 1000 * spent / self._count
        self.waited = 1000 * (waited - self._waited) / self._count
        return True

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
