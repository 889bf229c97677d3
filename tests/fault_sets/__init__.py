"""Small sets of images, drawn at random: sound ones, odd but right, and with one planted fault.

Four layouts: class folders, tables of channel images, masks, COCO. A fault is a function that
changes the files of a sound set; it returns a pattern for what must be said about it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fault_sets.coco import write_coco
from fault_sets.drawn import FAULTS, MODEL, ODDITIES, Drawn
from fault_sets.folders import write_folders
from fault_sets.masks import write_masks
from fault_sets.tables import write_table

__all__ = ["FAULTS", "LAYOUTS", "ODDITIES", "draw", "recipe"]

LAYOUTS: dict[str, tuple[Callable[[Drawn], None], str, str]] = {
    "folders": (write_folders, "fastvim.data.images.ImageData", "fastvim.tasks.Classification"),
    "tables": (write_table, "fastvim.data.channels.ChannelData", "fastvim.tasks.Classification"),
    "masks": (
        write_masks,
        "fastvim.data.segmentation.SegmentationData",
        "fastvim.tasks.Segmentation",
    ),
    "coco": (write_coco, "fastvim.data.detection.DetectionData", "fastvim.tasks.Detection"),
}


def draw(root: Path, seed: int, layout: str) -> Drawn:
    """A sound set of a layout."""
    drawn = Drawn(root, np.random.default_rng(seed))
    root.mkdir()
    LAYOUTS[layout][0](drawn)
    return drawn


def recipe(drawn: Drawn, layout: str) -> dict[str, Any]:
    """Two steps of training and a validation on a drawn set, by a model of two blocks."""
    _, data, task = LAYOUTS[layout]
    warmup = {"warmup_epochs": 0} if task.endswith("Classification") else {"warmup_steps": 0}
    return {
        "model": {"class_path": task, "init_args": {"model": MODEL, **warmup, **drawn.task}},
        "data": {
            "class_path": data,
            "init_args": {"root": str(drawn.root), "num_workers": 0, **drawn.data},
        },
        "trainer": {
            "default_root_dir": str(drawn.root.with_name("run")),
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_train_batches": 2,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
        },
    }
