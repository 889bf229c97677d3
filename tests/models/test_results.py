"""COCO's results: pasting against cases by hand and the way back, run lengths against COCO's."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as mask_api
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from fastvim.models.heads.results import coco_results, decode, encode, paste

SIZE = (160, 220)


def ellipse(size, centre, radii) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    return ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1


def test_results_are_in_stored_pixels():
    """An image seen at half its size; the mask fills the left half of its box."""
    mask = torch.zeros(1, 1, 28, 28)
    mask[..., :14] = 1
    found = {
        "boxes": torch.tensor([[10.0, 20.0, 50.0, 60.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.75]),
        "masks": mask,
    }
    (one,) = coco_results(found, (80, 110), SIZE, 17, [3, 7, 8])
    assert one["bbox"] == [20.0, 40.0, 80.0, 80.0]
    assert (one["image_id"], one["category_id"], one["score"]) == (17, 7, 0.75)
    decoded = decode(one["segmentation"])
    assert decoded.shape == SIZE
    assert decoded[40:120, 21:59].all()
    assert decoded[41:119, 20:60].all()
    assert int(decoded.sum()) == 40 * 80 - 4  # 0 outside of the cells cuts corners
    json.dumps(one)
    empty = {name: value[:0] for name, value in found.items()}
    assert coco_results(empty, (80, 110), SIZE, 17, [3, 7, 8]) == []


def test_a_box_in_the_padding_has_an_empty_mask():
    found = {
        "boxes": torch.tensor([[70.0, 90.0, 100.0, 120.0]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.5]),
        "masks": torch.ones(1, 1, 28, 28),
    }
    (one,) = coco_results(found, (80, 110), (160, 220), 1, [1])
    assert one["bbox"] == [140.0, 180.0, 60.0, 60.0]
    assert not decode(one["segmentation"]).any()


@pytest.mark.parametrize("factor", [1, 2])
def test_pasting_is_the_way_back_of_the_training_projection(factor):
    """Masks of nuclei's size, stored at the model's size or twice it, and boxes not on pixels."""
    generator = np.random.default_rng(1)
    seen = (64, 80)
    size = (factor * seen[0], factor * seen[1])
    for _ in range(20):
        mask = ellipse(seen, generator.uniform(20, 44, 2), generator.uniform(7, 16, 2))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)
        box = torch.tensor(edges + generator.uniform(-0.5, 0.5, 4).astype(np.float32))
        stored = torch.tensor(mask.astype(np.uint8))
        projected = roi_align(stored[None, None].float(), [box[None]], 28, aligned=True)
        pasted = paste(projected[0, 0], (factor * box).tolist(), size)
        goal = stored.repeat_interleave(factor, 0).repeat_interleave(factor, 1).numpy()
        overlap = (pasted & goal).sum() / (pasted | goal).sum()
        assert overlap > 0.95
        if factor == 1:
            rounded = paste_masks_in_image(projected, box[None], seen)[0, 0] > 0.5
            assert overlap > (rounded & (stored > 0)).sum() / (rounded | (stored > 0)).sum()


def test_pasting_looks_at_the_pixels_of_the_box_alone():
    """The same as sampling at every pixel of the image."""
    generator = torch.Generator().manual_seed(0)
    size = (30, 40)
    for _ in range(50):
        mask = torch.rand(28, 28, generator=generator)
        corner = torch.rand(2, generator=generator) * 50 - 10
        sides = torch.rand(2, generator=generator) * 30 + 0.5
        box = torch.cat([corner, corner + sides]).tolist()
        rows, columns = (
            2 * (torch.arange(side) + 0.5 - box[i]) / (box[2 + i] - box[i]) - 1
            for side, i in ((size[0], 1), (size[1], 0))
        )
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[None]
        values = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
        assert np.array_equal(paste(mask, box, size), (values >= 0.5).numpy())


def test_pasting_at_the_edges():
    ones = torch.ones(28, 28)
    assert paste(ones, [-4.0, -4.0, 24.0, 24.0], (20, 20)).all()
    corner = paste(ones, [30.0, 24.0, 40.0, 40.0], (40, 40))
    assert corner[25:39, 30:].all()
    assert corner[24:, 31:39].all()
    assert 0 <= 16 * 10 - corner.sum() <= 4
    assert paste(0.5 * ones, [4.0, 4.0, 12.0, 12.0], (20, 20)).any()  # a half is inside
    # At a pixel's middle a box's edge counts: half of a whole. A corner is a quarter.
    assert paste(ones, [2.5, 2.5, 6.5, 6.5], (20, 20)).sum() == 5 * 5 - 4
    for nothing in ([5.1, 5, 5.3, 9], [30, 2, 40, 9], [-9, 2, -1, 9], [5.5, 2, 5.5, 9]):
        assert not paste(ones, nothing, (20, 20)).any(), nothing


def test_run_lengths_are_those_of_coco():
    generator = np.random.default_rng(0)
    masks = [(generator.random((37, 53)) < share).astype(np.uint8) for share in (0.01, 0.5, 0.99)]
    masks += [np.zeros((5, 7), np.uint8), np.ones((5, 7), np.uint8), np.eye(9, dtype=np.uint8)]
    masks += [np.ones((1, 1), np.uint8), np.zeros((1, 6), np.uint8)]
    large = np.zeros((1500, 1400), np.uint8)  # runs of more than 2**20
    large[700, 3] = large[3, 1200] = 1
    masks += [large, 1 - large, ellipse(SIZE, (80, 90), (30, 60)).astype(np.uint8)]
    for mask in masks:
        encoded, expected = encode(mask), mask_api.encode(np.asfortranarray(mask))
        assert encoded["size"] == list(expected["size"])
        assert encoded["counts"] == expected["counts"].decode()
        decoded = decode(encoded)
        assert decoded.dtype == np.uint8
        assert np.array_equal(decoded, mask)


def test_no_training_library_is_needed():
    code = (
        "import sys, fastvim.models.heads.results, fastvim.models.heads.cascade\n"
        "print(sorted({'lightning', 'faster_coco_eval', 'matplotlib', 'rich'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
