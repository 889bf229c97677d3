"""Segmentation of the HeLa nuclei without a model: background everywhere, and Otsu's threshold.

    python examples/hela/semantic_baselines.py

Prints the IoU of both classes, and their mean, on the crops that examples/hela/semantic.yaml is
tested on. The threshold is found in the histogram of the training crops.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hela import CLASSES
from PIL import Image

from fastvim.data.samples import fetch
from fastvim.tasks.metrics import SegmentationMetrics


def read(folder: Path) -> np.ndarray:
    """All images of a folder, uint8 (number, H, W)."""
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


def otsu(values: np.ndarray) -> int:
    """The threshold of uint8 values that makes the variance between both sides largest."""
    share = np.bincount(values.ravel(), minlength=256) / values.size
    below, mean = share.cumsum(), (share * np.arange(256)).cumsum()
    between = (mean[-1] * below - mean) ** 2 / np.maximum(below * (1 - below), 1e-12)
    return int(between.argmax())


def main() -> None:
    root = fetch("hela")
    images = read(root / "images" / "validation")
    labels = read(root / "annotations" / "validation")
    threshold = otsu(read(root / "images" / "training"))
    predictions = {
        "all background": np.zeros_like(labels),
        f"above {threshold} (Otsu)": (images > threshold).astype(np.uint8),
    }
    for name, predicted in predictions.items():
        metrics = SegmentationMetrics(len(CLASSES))
        metrics.update(torch.from_numpy(predicted).long(), torch.from_numpy(labels).long())
        scores = metrics.compute()
        parts = zip(CLASSES, scores["iou"].tolist(), strict=True)
        line = "   ".join(f"{part} {value:.2%}" for part, value in parts)
        print(f"{name:<18} {line}   mean {scores['miou']:.2%}")  # noqa: T201


if __name__ == "__main__":
    main()
