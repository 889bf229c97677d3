"""Data whose loading process gets a signal; the tests name it in configurations."""

from __future__ import annotations

import os
import signal
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from fastvim.data.images import ImageData


class Signalled(Dataset):
    """A dataset that sends its worker a signal before the image of an index."""

    def __init__(self, dataset: Any, index: int, number: int) -> None:
        self.dataset, self.index, self.number = dataset, index, number

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index == self.index and get_worker_info() is not None:
            os.kill(os.getpid(), self.number)
        return self.dataset[index]


class SignalledData(ImageData):
    """ImageData that loses its worker.

    Args:
        name: of the signal.
        role: "train" or "val".
        index: of the image before which it is lost.
        **options: of `ImageData`.
    """

    def __init__(self, name: str, role: str = "train", index: int = 30, **options: Any) -> None:
        super().__init__(**options)
        self.number, self.role, self.index = int(signal.Signals[name]), role, index

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._datasets[self.role] = Signalled(self._datasets[self.role], self.index, self.number)
