"""The stream that a run trains on."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch


class OwnStream(L.Callback):
    """Trains on a stream of its own where there is a GPU.

    The default stream of CUDA waits for what libraries do on theirs, and they wait for it: each
    copy of a decoder in another thread would take as long as a whole captured step.
    """

    def __init__(self) -> None:
        self._before: torch.cuda.Stream | None = None

    def on_fit_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            self._before = torch.cuda.current_stream(device)
            stream = torch.cuda.Stream(device)
            stream.wait_stream(self._before)
            torch.cuda.set_stream(stream)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._before is not None:
            self._before.wait_stream(torch.cuda.current_stream(self._before.device))
            torch.cuda.set_stream(self._before)
            self._before = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.on_fit_end(trainer, pl_module)
