"""Average precision of boxes and masks, as COCO defines it.

H, W: an image's height and width as stored; n: detections in it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as mask_api
from torch import Tensor

# The first six of COCO's twelve numbers. The others are of recall.
SCORES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
KINDS = {"box": "bbox", "mask": "segm"}

Result = dict[str, Any]  # "image_id", "category_id", "bbox", "segmentation", "score"


def coco_results(
    found: dict[str, Tensor],
    seen: tuple[int, int],
    size: tuple[int, int],
    image_id: int,
    category_ids: Sequence[int],
) -> list[Result]:
    """Detections of `CascadeMaskRCNN.detect` in COCO's format of results, in stored pixels.

    Args:
        found: "boxes" (n, 4), "labels" and "scores" (n,), "masks" (n, 1, 28, 28).
        seen: height and width of the image that the model was given.
        size: (H, W).
        image_id: written into each.
        category_ids: of the labels 1 to K.
    """
    scale = torch.tensor([size[1] / seen[1], size[0] / seen[0]] * 2)
    boxes, masks = found["boxes"].float().cpu(), found["masks"].float().cpu()
    results = []
    for i, (x1, y1, x2, y2) in enumerate((boxes * scale).tolist()):
        # One at a time: all masks of a large photograph would take gigabytes.
        pasted = paste(masks[i, 0], boxes[i].tolist(), seen, size)
        results.append(
            {
                "image_id": image_id,
                "category_id": category_ids[int(found["labels"][i]) - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "segmentation": _encode(pasted),
                "score": float(found["scores"][i]),
            }
        )
    return results


def paste(
    mask: Tensor, box: Sequence[float], seen: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """A mask that fills a box as the pixels of the stored image, uint8 (H, W).

    This inverts the projection that the mask head is trained on (torchvision's), where a pixel lies
    at its index, not half a pixel further. torchvision's own pasting rounds the box, which moves
    small objects by up to a pixel.

    Args:
        mask: probabilities, (28, 28).
        box: x1, y1, x2, y2 in the pixels of the image that the model was given.
        seen: its height and width.
        size: (H, W).
    """
    pasted = np.zeros(size, dtype=np.uint8)
    places, coordinates = [], []
    for axis in (0, 1):
        low, high = box[1 - axis], box[3 - axis]
        ratio = seen[axis] / size[axis]
        # Pixels with their middle in the box.
        first = max(math.ceil(low / ratio - 0.5), 0)
        last = min(math.floor(high / ratio - 0.5), size[axis] - 1)
        if first > last:
            return pasted
        indices = (torch.arange(first, last + 1) + 0.5) * ratio - 0.5
        coordinates.append(2 * (indices - low) / (high - low) - 1)  # -1 and 1: the box's edges
        places.append(slice(first, last + 1))
    rows, columns = torch.meshgrid(*coordinates, indexing="ij")
    grid = torch.stack([columns, rows], dim=-1)[None]
    values = F.grid_sample(mask[None, None], grid, padding_mode="border", align_corners=False)
    pasted[tuple(places)] = (values[0, 0] > 0.5).numpy()
    return pasted


def _encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as compressed run lengths, in JSON's types."""
    encoded = mask_api.encode(np.asfortranarray(mask))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


class Scores(NamedTuple):
    """What `AveragePrecision` computes; NaN without an object to count.

    Attributes:
        overall: "ap", "ap50", "ap75" and "ap" for objects of three sizes, of boxes and masks: e.g.
            "box_ap" and "mask_ap_small". Small is below 32 x 32 pixels, large from 96 x 96.
        of_classes: "box_ap" and "mask_ap" of each category, in the order of the ids given.
    """

    overall: dict[str, float]
    of_classes: dict[str, list[float]]


class AveragePrecision:
    """Average precision of boxes and of masks over all images seen, by all processes.

    The numbers are those of pycocotools, computed by faster-coco-eval: over ten IoU thresholds from
    0.5 to 0.95, with at most 100 detections per image.

    Args:
        category_ids: of all categories.
    """

    def __init__(self, category_ids: Sequence[int]) -> None:
        self.category_ids = list(category_ids)
        self._images: dict[int, tuple[dict[str, Any], list[Result]]] = {}

    def update(self, target: dict[str, Any], results: list[Result]) -> None:
        """Add an image.

        Args:
            target: its "image_id", "size" (H, W) and "annotations", in COCO's format without ids.
            results: the detections.
        """
        self._images[target["image_id"]] = target, results

    def reset(self) -> None:
        """Forget all images."""
        self._images = {}

    def compute(self) -> Scores:
        """The scores of all images."""
        images = self._gather()
        truth = _truth([target for target, _ in images], self.category_ids)
        scores = Scores({}, {})
        for kind, name in KINDS.items():
            # COCO takes the area of a result from its box or its mask: from the one compared.
            left_out = {"box": "segmentation", "mask": "bbox"}[kind]
            results = [
                {key: value for key, value in result.items() if key != left_out}
                for _, found in images
                for result in found
            ]
            evaluation = COCOeval_faster(truth, truth.loadRes(results), name)
            evaluation.run()
            for score, value in zip(SCORES, evaluation.stats, strict=False):
                scores.overall[f"{kind}_{score}"] = float(value) if value >= 0 else math.nan
            # (thresholds, recalls, categories), for all sizes and 100 detections
            precision = evaluation.eval["precision"][:, :, :, 0, -1]
            means = np.where(precision < 0, np.nan, precision).mean(axis=(0, 1)).tolist()
            by_id = dict(zip(evaluation.params.catIds, means, strict=True))
            scores.of_classes[f"{kind}_ap"] = [by_id[i] for i in self.category_ids]
        return scores

    def _gather(self) -> list[tuple[dict[str, Any], list[Result]]]:
        """The images of all processes, in the order of their ids."""
        images = self._images
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, images)
            images = {image_id: image for part in parts for image_id, image in part.items()}
        return [images[image_id] for image_id in sorted(images)]


def _truth(targets: list[dict[str, Any]], category_ids: list[int]) -> COCO:
    """The objects of all images, numbered from 1, since 0 means no match."""
    images = [
        {"id": target["image_id"], "height": target["size"][0], "width": target["size"][1]}
        for target in targets
    ]
    objects = [
        {**annotation, "image_id": target["image_id"]}
        for target in targets
        for annotation in target["annotations"]
    ]
    return COCO(
        {
            "images": images,
            "annotations": [{**each, "id": number} for number, each in enumerate(objects, 1)],
            "categories": [{"id": category_id} for category_id in category_ids],
        }
    )
