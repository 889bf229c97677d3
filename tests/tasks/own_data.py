"""A data module of a user's own, without an argument; tests name it in configurations."""

from __future__ import annotations

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset


class EmptyStream(IterableDataset):
    """Says that it has images, and gives none: as shards that are empty."""

    def __len__(self) -> int:
        return 8

    def __iter__(self):
        return iter(())


class EmptyData(L.LightningDataModule):
    batch_size = 4
    class_names = ("ant", "bee")
    num_classes = 2

    def train_dataloader(self) -> DataLoader:
        return DataLoader(EmptyStream(), batch_size=4)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([(torch.zeros(3, 32, 32), 1)] * 4, batch_size=4)
