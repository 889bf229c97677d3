"""The stream that a run trains on."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L

from fastvim.streams import own_stream


class OwnStream(L.Callback):
    """Trains on a stream of its own where there is a GPU."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def on_fit_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        self._stack.enter_context(own_stream(trainer.strategy.root_device))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stack.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.on_fit_end(trainer, pl_module)
