"""Data whose files vanish while they are read; the tests name it in configurations."""

from __future__ import annotations

import os
from typing import Any

from torch.utils.data import Dataset

from fastvim.data.images import ImageData

GONE = ".gone"  # ending of what has vanished


class Vanishing(Dataset):
    """A dataset that moves a file or folder away before the image of an index, once."""

    def __init__(self, dataset: Any, index: int, path: str) -> None:
        self.dataset, self.index, self.path = dataset, index, path

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index == self.index and os.path.exists(self.path):
            os.rename(self.path, self.path + GONE)
        return self.dataset[index]


class VanishingData(ImageData):
    """ImageData of which something vanishes.

    Args:
        path: of the file or folder.
        role: "train" or "val".
        index: of the image before which it vanishes.
        **options: of `ImageData`.
    """

    def __init__(self, path: str, role: str, index: int, **options: Any) -> None:
        super().__init__(**options)
        self.path, self.role, self.index = path, role, index

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._datasets[self.role] = Vanishing(self._datasets[self.role], self.index, self.path)
