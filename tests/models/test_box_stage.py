"""One stage of the cascade: constants, coding, matching, sampling, losses and refined boxes."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_detector import SMALL, STAGES, target_of

from fastvim.models.heads.cascade_heads import (
    BOX_STDS,
    IOU_THRESHOLDS,
    LOSS_WEIGHTS,
    BoxStage,
    Samples,
)


def stage_of(index: int, num_classes: int = 3) -> BoxStage:
    return BoxStage(8, num_classes, IOU_THRESHOLDS[index], BOX_STDS[index], SMALL)


def test_constants_of_the_stages():
    assert IOU_THRESHOLDS == (0.5, 0.6, 0.7)
    assert LOSS_WEIGHTS == (1.0, 0.5, 0.25)
    assert BOX_STDS[0] == (0.1, 0.1, 0.2, 0.2)
    assert BOX_STDS[1] == (0.05, 0.05, 0.1, 0.1)
    assert BOX_STDS[2] == (0.033, 0.033, 0.067, 0.067)


@pytest.mark.parametrize("index", STAGES)
def test_box_coding(index):
    coder = stage_of(index).box_coder
    # A tenth of the width to the right, and e times as high about the same centre.
    box = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    half = 20 * math.e
    moved = torch.tensor([[12.0, 40 - half, 32.0, 40 + half]])
    std = BOX_STDS[index]
    offsets = torch.tensor([[0.1 / std[0], 0.0, 0.0, 1 / std[3]]])
    torch.testing.assert_close(coder.encode_single(moved, box), offsets, atol=1e-4, rtol=1e-5)

    corners = torch.rand(50, 2) * 100
    boxes, goals = (torch.cat([corners, corners + 5 + 50 * torch.rand(50, 2)], 1) for _ in range(2))
    found = coder.decode_single(coder.encode_single(goals, boxes), boxes)
    torch.testing.assert_close(found, goals, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("index", STAGES)
def test_matching(index):
    """Boxes over 45 to 75 % of an object: objects from the stage's threshold on."""
    targets = [target_of([(0, 0, 100, 100)], [2], (100, 100))]
    boxes = torch.tensor([[0.0, 0.0, 100.0, height] for height in (45, 55, 65, 75)])
    samples = stage_of(index).sample([boxes], targets)
    labels = [0, 2, 2, 2, 2]  # the object's own box is the last
    labels[: index + 1] = [0] * (index + 1)
    assert samples.labels[0].tolist() == labels
    assert samples.boxes[0].tolist() == [*boxes.tolist(), [0.0, 0.0, 100.0, 100.0]]
    # From three quarters to the full height: the centre moves by a sixth of it, towards the end.
    std = BOX_STDS[index]
    expected = [0.0, (12.5 / 75) / std[1], 0.0, math.log(100 / 75) / std[3]]
    torch.testing.assert_close(samples.offsets[0][3], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_sampling_takes_a_quarter_of_objects():
    corner = torch.rand(200, 1)
    objects = torch.cat([corner, corner, 50 + corner, 50 + corner], dim=1)
    elsewhere = objects + 200
    targets = [target_of([(0, 0, 50, 50)], [1], (300, 300))]
    samples = stage_of(0).sample([torch.cat([objects, elsewhere])], targets)
    assert len(samples.labels[0]) == SMALL.samples
    assert int((samples.labels[0] > 0).sum()) == SMALL.samples // 4


def test_losses_of_a_stage():
    samples = Samples(
        boxes=[torch.zeros(1, 4), torch.zeros(1, 4)],
        matched=[torch.zeros(1, dtype=torch.int64)] * 2,
        labels=[torch.tensor([2]), torch.tensor([0])],
        offsets=[torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.full((1, 4), -torch.inf)],
        given=[torch.tensor([False])] * 2,
    )
    logits = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]).log()
    offsets = torch.zeros(2, 12)
    offsets[0, 8:] = torch.tensor([1.0, 2.5, 3.0, 3.0])  # class 2: 0.5 and 1 away
    offsets[0, 4:8] = 100.0  # another class is not asked
    offsets.requires_grad_()
    classifier, box = stage_of(0).losses(logits, offsets, samples)
    assert float(classifier) == pytest.approx(-(math.log(0.7) + math.log(0.5)) / 2)
    assert box.item() == pytest.approx(1.5 / 2)
    box.backward()
    assert offsets.grad[1].tolist() == [0.0] * 12


def test_refined_boxes():
    """Objects move by their label's offsets, background by those of the most likely class."""
    stage = stage_of(0)
    boxes = [torch.tensor([[10.0, 10.0, 20.0, 20.0], [30.0, 30.0, 40.0, 40.0]])]
    logits = torch.tensor([[9.0, 0.0, 1.0]] * 2)
    offsets = torch.zeros(2, 3, 4)
    offsets[:, 0] = 100.0  # background's are never trained
    offsets[:, 1, 0] = 5.0  # half a width to the right
    offsets[:, 2, 1] = -5.0  # half a height up
    given = (logits, offsets.flatten(1), boxes, (45, 45))
    refined = stage.refine(*given, labels=[torch.tensor([1, 0])])
    expected = torch.tensor([[15.0, 10.0, 25.0, 20.0], [30.0, 25.0, 40.0, 35.0]])
    torch.testing.assert_close(refined[0], expected)
    refined = stage.refine(*given)
    expected[0] = torch.tensor([10.0, 5.0, 20.0, 15.0])
    torch.testing.assert_close(refined[0], expected)
    # Out of an image 25 pixels high and 22 wide: one is cut, of the other an empty box stays.
    refined = stage.refine(*given[:3], (25, 22), labels=[torch.tensor([1, 0])])
    assert refined[0].tolist() == [[15.0, 10.0, 22.0, 20.0], [22.0, 25.0, 22.0, 25.0]]
