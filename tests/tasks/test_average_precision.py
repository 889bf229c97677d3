"""Average precision: the numbers of pycocotools, of perfect and of shuffled results."""

from __future__ import annotations

import contextlib
import io
import math
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from coco_sets import annotation
from harness import PROCESSES
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastvim.tasks.average_precision import SCORES, AveragePrecision

CATEGORIES = [3, 7, 8]
SIZE = (160, 220)


def blob(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """An ellipse of any size, somewhere."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    radii = generator.uniform(3, 110, 2)
    centre = generator.uniform(0, height), generator.uniform(0, width)
    mask = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1
    mask[int(centre[0]), int(centre[1])] = True
    return mask


def result(of: dict, score: float) -> dict:
    names = ("image_id", "category_id", "bbox", "segmentation")
    return {**{name: of[name] for name in names}, "score": score}


def scenes(images: int = 12) -> tuple[list[dict], list[dict]]:
    """Objects of all sizes, some of them crowds, and results: near misses, doubles, inventions."""
    generator = np.random.default_rng(0)
    objects: list[dict] = []
    found: list[dict] = []
    for image_id in range(1, images + 1):
        for _ in range(int(generator.integers(0, 7))):
            mask = blob(generator, SIZE)
            category = int(generator.choice(CATEGORIES[:2]))  # none of the third
            objects.append(annotation(len(objects) + 1, image_id, category, mask))
            objects[-1]["iscrowd"] = int(generator.random() < 0.15)
            for _ in range(int(generator.integers(0, 3))):
                shift = generator.integers(-6, 7, 2)
                near = annotation(0, image_id, category, np.roll(mask, shift, (0, 1)))
                # Few different scores: there are ties.
                found.append(result(near, round(float(generator.random()), 1)))
        for _ in range(int(generator.integers(0, 4))):
            invented = annotation(
                0, image_id, int(generator.choice(CATEGORIES)), blob(generator, SIZE)
            )
            found.append(result(invented, round(float(generator.random()), 1)))
    return objects, found


def targets_of(objects: list[dict], images: int = 12) -> list[dict]:
    return [
        {
            "image_id": image_id,
            "size": SIZE,
            "annotations": [
                {k: v for k, v in each.items() if k not in ("id", "image_id")}
                for each in objects
                if each["image_id"] == image_id
            ],
        }
        for image_id in range(1, images + 1)
    ]


def computed(targets: list[dict], found: list[dict]):
    metric = AveragePrecision(CATEGORIES)
    for target in targets:
        mine = [each for each in found if each["image_id"] == target["image_id"]]
        metric.update(target, mine)
    return metric.compute()


def oracle(objects: list[dict], found: list[dict], kind: str) -> COCOeval:
    """pycocotools, but that a precision of 1 is 1.

    It adds 2**-52 to every number that it divides by, which moves 1 / 1 alone, the precision of a
    first hit before a miss.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(1, 13)],
            "annotations": [dict(each) for each in objects],
            "categories": [{"id": category} for category in CATEGORIES],
        }
        truth.createIndex()
        left_out = {"bbox": "segmentation", "segm": "bbox"}[kind]
        results = [{k: v for k, v in each.items() if k != left_out} for each in found]
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        precision = evaluation.eval["precision"]
        precision[precision == 1 / (1 + np.spacing(1))] = 1.0
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize(("kind", "name"), [("box", "bbox"), ("mask", "segm")])
def test_the_numbers_are_those_of_pycocotools(kind, name):
    objects, found = scenes()
    scores = computed(targets_of(objects), found)
    expected = oracle(objects, found, name)
    own = [scores.overall[f"{kind}_{score}"] for score in SCORES]
    assert own == expected.stats[:6].tolist()  # to the last bit
    assert 0.05 < own[0] < 0.9
    assert len(set(own)) == 6
    for index in range(2):
        precision = expected.eval["precision"][:, :, index, 0, -1]
        assert scores.of_classes[f"{kind}_ap"][index] == pytest.approx(precision.mean())
    assert math.isnan(scores.of_classes[f"{kind}_ap"][2])  # no object of it


def test_perfect_results():
    objects, _ = scenes()
    perfect = [result(each, 0.9) for each in objects if not each["iscrowd"]]
    scores = computed(targets_of(objects), perfect)
    assert all(value == pytest.approx(1.0) for value in scores.overall.values())
    assert scores.of_classes["mask_ap"][:2] == pytest.approx([1.0, 1.0])


def test_ids_may_be_text():
    """The same numbers; COCO's tools are given others."""
    objects, found = scenes()
    expected = computed(targets_of(objects), found)
    metric = AveragePrecision([f"category {number}" for number in CATEGORIES])
    for target in targets_of(objects):
        image_id = target["image_id"]
        as_text = [
            [{**each, "category_id": f"category {each['category_id']}"} for each in some]
            for some in (target["annotations"], [f for f in found if f["image_id"] == image_id])
        ]
        name = f"{image_id:03d}.jpg"
        results = [{**each, "image_id": name} for each in as_text[1]]
        metric.update({**target, "image_id": name, "annotations": as_text[0]}, results)
    scores = metric.compute()
    assert scores.overall == expected.overall
    np.testing.assert_array_equal(scores.of_classes["box_ap"], expected.of_classes["box_ap"])


def test_shuffled_results():
    """Those of the next image."""
    objects, _ = scenes()
    moved = [result({**each, "image_id": each["image_id"] % 12 + 1}, 0.9) for each in objects]
    scores = computed(targets_of(objects), moved)
    assert scores.overall["box_ap"] < 0.05
    assert scores.overall["mask_ap"] < 0.05


def test_nothing_found_and_nothing_there():
    objects, found = scenes()
    assert computed(targets_of(objects), []).overall["box_ap"] == 0
    nothing = computed(targets_of([]), found)
    assert all(math.isnan(value) for value in nothing.overall.values())


def test_an_image_seen_twice_counts_once():
    objects, found = scenes()
    targets = targets_of(objects)
    assert computed(targets * 2, found).overall == computed(targets, found).overall


def share_of(rank: int, port: int, queue) -> None:
    """What one of two processes does: it sees every other image."""
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    objects, found = scenes()
    queue.put(computed(targets_of(objects)[rank::2], found).overall)
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_scores_of_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = PROCESSES.Queue()
    mp.start_processes(share_of, (port, queue), nprocs=2, start_method="forkserver")
    objects, found = scenes()
    expected = computed(targets_of(objects), found).overall
    assert [queue.get(), queue.get()] == [expected, expected]
