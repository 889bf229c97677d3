"""Detection of the HeLa nuclei without a model: the connected pieces above a threshold.

    python examples/hela/instance_baseline.py

Prints the average precision of boxes and masks on the crops that examples/hela/instances.yaml is
tested on, where every connected piece above Otsu's threshold counts as a nucleus. The threshold is
found in the histogram of the training crops.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as mask_api
from hela import LEAST_AREA, TABLES
from semantic_baselines import otsu, read

from fastvim.data.detection import DetectionData
from fastvim.data.samples import fetch
from fastvim.tasks.average_precision import AveragePrecision


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask (H, W), diagonals included; specks are left out."""
    inside = torch.from_numpy(mask)[None].float()
    numbers = inside * torch.arange(1, mask.size + 1).view(1, *mask.shape)
    while True:  # until the highest number of a piece has spread over all of it
        spread = F.max_pool2d(numbers, 3, stride=1, padding=1) * inside
        if torch.equal(spread, numbers):
            break
        numbers = spread
    parts = [(numbers[0] == number).numpy() for number in numbers.unique() if number > 0]
    return [part for part in parts if part.sum() >= LEAST_AREA]


def main() -> None:
    root = fetch("hela")
    threshold = otsu(read(root / "images" / "training"))
    data = DetectionData(
        str(root),
        num_workers=0,
        img_size=304,
        val_folder="images/validation",
        val_file=f"annotations/{TABLES['validation']}",
    )
    data.setup("validate")
    metric = AveragePrecision(data.category_ids)
    for (image,), (target,) in data.val_dataloader():
        results = []
        for part in pieces(image[0].mul(255).round().numpy() > threshold):
            encoded = mask_api.encode(np.asfortranarray(part.astype(np.uint8)))
            box = mask_api.toBbox(encoded).tolist()
            told = {"image_id": target["image_id"], "category_id": 1, "score": 1.0}
            results.append({**told, "bbox": box, "segmentation": encoded})
        metric.update(target, results)
    scores = metric.compute().overall
    names = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")
    line = "   ".join(f"{name} {scores[name]:.2%}" for name in names)
    print(f"pieces above {threshold} (Otsu)   {line}")  # noqa: T201


if __name__ == "__main__":
    main()
