"""Average precision of boxes and masks, as COCO defines it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster

from fastvim.models.heads.results import Result

# The first six of COCO's twelve numbers. The others are of recall.
SCORES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
KINDS = {"box": "bbox", "mask": "segm"}


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

    def __init__(self, category_ids: Sequence[int | str]) -> None:
        self.category_ids = list(category_ids)
        self._images: dict[int | str, tuple[dict[str, Any], list[Result]]] = {}

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
        labels = {own: number for number, own in enumerate(self.category_ids, 1)}
        truth = _truth([target for target, _ in images], labels)
        scores = Scores({}, {})
        for kind, name in KINDS.items():
            # COCO takes the area of a result from its box or its mask: from the one compared.
            left_out = {"box": "segmentation", "mask": "bbox"}[kind]
            results = [
                {key: value for key, value in result.items() if key != left_out}
                | {"image_id": number, "category_id": labels[result["category_id"]]}
                for number, (_, found) in enumerate(images, 1)
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
            scores.of_classes[f"{kind}_ap"] = [by_id[label] for label in labels.values()]
        return scores

    def _gather(self) -> list[tuple[dict[str, Any], list[Result]]]:
        """The images of all processes, in the order of their ids."""
        images = self._images
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, images)
            images = {image_id: image for part in parts for image_id, image in part.items()}
        numbers_first = sorted(images, key=lambda own: (isinstance(own, str), own))
        return [images[image_id] for image_id in numbers_first]


def _truth(targets: list[dict[str, Any]], labels: Mapping[int | str, int]) -> COCO:
    """The objects of all images; COCO's tools need numbers, from 1 on, since 0 means no match.

    Args:
        targets: of the images.
        labels: numbers of the categories, by their ids.
    """
    images = [
        {"id": number, "height": target["size"][0], "width": target["size"][1]}
        for number, target in enumerate(targets, 1)
    ]
    objects = [
        {**each, "image_id": number, "category_id": labels[each["category_id"]]}
        for number, target in enumerate(targets, 1)
        for each in target["annotations"]
    ]
    return COCO(
        {
            "images": images,
            "annotations": [{**each, "id": number} for number, each in enumerate(objects, 1)],
            "categories": [{"id": label} for label in labels.values()],
        }
    )
