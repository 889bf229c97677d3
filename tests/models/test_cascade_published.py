"""Cascade Mask R-CNN against what the published detector computes, part by part and as a whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastvim.models.heads.cascade import CascadeMaskRCNN
from fastvim.models.heads.regions import RegionPooling
from fastvim.models.heads.results import coco_results, decode, paste_probabilities
from fastvim.weights import load_model

WHOLE = Path(__file__).parents[1] / "golden" / "whole"
PADDED = (128, 128)
SEEN = (102, 128)  # of an image of 120 x 150 pixels, before it is padded
STAGES = range(3)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(WHOLE / "detector.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "cfg"}


@pytest.fixture(scope="module")
def model() -> CascadeMaskRCNN:
    model, _ = load_model(path=WHOLE / "detector.pth")
    assert isinstance(model, CascadeMaskRCNN)
    return model.eval()


@pytest.fixture(autouse=True)
def _exact_convolutions():
    """The golden files were computed without oneDNN, whose convolutions are good to 1e-4 alone."""
    with torch.backends.mkldnn.flags(enabled=False), torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def maps(golden) -> dict[str, torch.Tensor]:
    return {name: golden[f"pyramid{i}"] for i, name in enumerate(("0", "1", "2", "3", "pool"))}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def image_of(golden, height: int = 128) -> torch.Tensor:
    return golden["padded_bgr"][:height].flip(-1).movedim(-1, 0) / 255


@pytest.mark.parametrize("height", [PADDED[0], SEEN[0]])
def test_padded_and_normalised(model, golden, height):
    close(model.transform([image_of(golden, height)]), golden["tensor"])


def test_pyramid(model, golden, maps):
    found = model.features(golden["tensor"])
    assert list(found) == list(maps)
    for name, level in maps.items():
        close(found[name], level)


def test_proposal_head_and_anchors(model, golden, maps):
    logits, offsets = model.rpn.head(list(maps.values()))
    image = image_of(golden)
    batch, *_ = model._pyramid([image])
    (anchors,) = model.rpn.anchor_generator(batch, list(maps.values()))
    for i, level in enumerate(maps.values()):
        close(logits[i], golden[f"rpn{i}/objectness"])
        close(offsets[i], golden[f"rpn{i}/deltas"])
        count = 3 * level.shape[-2] * level.shape[-1]
        close(anchors[:count][:30], golden[f"rpn{i}/anchors"])
        anchors = anchors[count:]
    assert not len(anchors)


def test_proposals(model, golden, maps):
    batch, *_ = model._pyramid([image_of(golden)])
    (boxes,), _ = model.rpn(batch, maps)
    assert len(boxes) == int(golden["proposals/count"])
    close(boxes[:20], golden["proposals/boxes"])


@pytest.mark.parametrize("index", STAGES)
def test_stages(model, golden, maps, index):
    """Background is the last class in the golden files, and has neither offsets nor masks."""
    boxes, expected = [golden["rois/boxes"]], f"rois/stage{index}"
    close(RegionPooling(7)(maps, boxes), golden["rois/pooled7"])
    stage, masks = model.heads.stages[index], model.heads.mask_stages[index]
    logits, offsets = stage(maps, boxes)
    close(logits.roll(-1, dims=1), golden[f"{expected}/logits"])
    close(offsets[:, 4:], golden[f"{expected}/deltas"])
    close(masks(maps, boxes)[:, 1:], golden[f"{expected}/mask_logits"])
    if index == 0:
        (refined,) = stage.refine(logits, offsets, boxes, PADDED)
        close(refined, golden[f"{expected}/refined_boxes"])


def matches(labels, boxes, scores, golden, kind: str) -> list[int]:
    """For each golden detection the one found; each is found once, and none is left over."""
    distances = (golden[f"{kind}/boxes"][:, None] - boxes).abs().amax(dim=-1)
    distances[golden[f"{kind}/labels"][:, None] + 1 != labels] = torch.inf
    nearest = distances.argmin(dim=1).tolist()
    assert sorted(nearest) == list(range(len(boxes)))
    assert distances.amin(dim=1).max() <= 0.02
    assert (scores[nearest] - golden[f"{kind}/scores"]).abs().max() <= 2e-4
    return nearest


def masks_of(golden, kind: str) -> np.ndarray:
    shape = golden[f"{kind}/masks_shape"].tolist()
    return np.unpackbits(golden[f"{kind}/masks"].numpy())[: np.prod(shape)].reshape(shape)


def same_mask(found: np.ndarray, expected: np.ndarray, probabilities: torch.Tensor) -> bool:
    """But for pixels at the threshold."""
    clear = ((probabilities - 0.5).abs() > 1e-3).numpy()
    return clear.mean() > 0.99 and np.array_equal(found[clear], expected[clear])


def test_detections_in_the_padded_image(model, golden):
    (found,) = model([image_of(golden)])
    nearest = matches(found["labels"], found["boxes"], found["scores"], golden, "padded")
    for one, expected in zip(nearest, masks_of(golden, "padded"), strict=True):
        mask = found["masks"][one, 0]
        assert same_mask((mask >= 0.5).numpy(), expected, mask)


def test_results_in_the_stored_image(model, golden):
    size = tuple(golden["image_bgr"].shape[:2])
    (found,) = model.detect([image_of(golden, SEEN[0])])
    results = coco_results(found, SEEN, size, 1, [1, 2, 3])
    corners = torch.tensor([result["bbox"] for result in results])
    corners[:, 2:] += corners[:, :2]
    labels = torch.tensor([result["category_id"] for result in results])
    scores = torch.tensor([result["score"] for result in results])
    nearest = matches(labels, corners, scores, golden, "result")
    for one, expected in zip(nearest, masks_of(golden, "result"), strict=True):
        mask = paste_probabilities(found["masks"][one, 0], corners[one].tolist(), size)
        assert same_mask(decode(results[one]["segmentation"]), expected, mask)
