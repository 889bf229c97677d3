"""The three mask heads: what each learns, and weights with one head."""

from __future__ import annotations

import math

import pytest
import torch

from fastvim import UserError
from fastvim.models import create_model
from fastvim.models.heads.cascade import build_detector
from fastvim.models.heads.cascade_heads import (
    LOSS_WEIGHTS,
    CascadeHeads,
    HeadOptions,
    MaskStage,
    Samples,
    mask_targets,
)
from fastvim.models.heads.pyramid import LEVELS
from fastvim.weights import load_model, save

MODEL = "fastvim_tiny_patch16_224"
ARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "norm": "layer"}
HEAD = {"num_classes": 2, "channels": 16, "heads": {"hidden_dim": 16, "samples": 16}}


def maps_of(batch: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(batch, 8, 16 // 2**i, 16 // 2**i) for i, name in enumerate(LEVELS)}


def test_targets_are_hard_and_lie_where_the_boxes_do():
    masks = torch.zeros(2, 40, 50, dtype=torch.uint8)
    masks[1, 10:24, 20:34] = 1
    boxes = torch.tensor(
        [
            [20.0, 10.0, 48.0, 38.0],  # one pixel per cell
            [20.4, 10.4, 48.4, 38.4],  # of the first cells 0.6 of a pixel in each direction
            [36.0, 24.0, 64.0, 52.0],  # into the padding
            [20.0, 10.0, 48.0, 38.0],  # another object
        ]
    )
    targets = mask_targets(masks, torch.tensor([1, 1, 1, 0]), boxes, (64, 64))
    assert targets.dtype == torch.bool
    quarter = torch.zeros(28, 28, dtype=torch.bool)
    quarter[:14, :14] = True
    assert torch.equal(targets[0], quarter)
    quarter[13, 13] = False  # 0.6 x 0.6 of the corner
    assert torch.equal(targets[1], quarter)
    assert not targets[2:].any()


def test_an_object_at_the_edge_ends_there():
    """The padding is no part of it."""
    boxes = torch.tensor([[0.0, 12.0, 28.0, 40.0]])
    whole = torch.ones(1, 26, 28, dtype=torch.uint8)
    (target,) = mask_targets(whole, torch.tensor([0]), boxes, (64, 64))
    assert target[:14].all()
    assert not target[14:].any()


def test_loss_of_one_stage():
    """The mean over the cells of all objects, each at its own label."""
    stage, logits = MaskStage(8, 3), torch.full((2, 3, 28, 28), 50.0)
    given = []

    def forward(features, boxes):
        given.extend(box.tolist() for box in boxes)
        return logits

    stage.forward = forward
    logits[0, 2], logits[1, 1] = 0.0, -1.0
    boxes = [torch.tensor([[0.0, 0, 28, 28], [1, 1, 9, 9]]), torch.tensor([[2.0, 2, 9, 9]])]
    samples = Samples(boxes, [torch.tensor([0, 0]), torch.tensor([1])], [], [], [])
    samples = samples._replace(labels=[torch.tensor([2, 0]), torch.tensor([1])])
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    targets = [{"masks": masks}, {"masks": masks}]
    loss = stage.loss(maps_of(2), samples, (64, 64), targets)
    assert given == [[[0.0, 0, 28, 28]], [[2.0, 2, 9, 9]]]
    assert float(loss) == pytest.approx((math.log(2) + math.log1p(math.exp(-1))) / 2)


def test_each_head_learns_the_objects_of_its_stage():
    """A region over 55 % of an object is one for the first stage alone; the object's box always."""
    heads = CascadeHeads(8, 3, HeadOptions(hidden_dim=16, samples=16))
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, :40, :40] = 1
    box = torch.tensor([[0.0, 0.0, 40.0, 40.0]])
    targets = [{"boxes": box, "labels": torch.tensor([1]), "masks": masks}]
    seen = []
    for stage, mask_stage in zip(heads.stages, heads.mask_stages, strict=True):
        stage.forward = lambda features, boxes: (
            torch.zeros(len(boxes[0]), 3),
            torch.zeros(len(boxes[0]), 12),
        )

        def forward(features, boxes):
            seen.append(boxes[0].tolist())
            return torch.zeros(len(boxes[0]), 3, 28, 28)

        mask_stage.forward = forward
    proposal = torch.tensor([[0.0, 0.0, 40.0, 22.0]])
    losses = heads.losses(maps_of(1), [proposal], (64, 64), targets)
    assert [len(boxes) for boxes in seen] == [2, 1, 1]  # each stage adds the object's box anew
    assert proposal[0].tolist() in seen[0]
    assert proposal[0].tolist() not in seen[1] + seen[2]
    for i, weight in enumerate(LOSS_WEIGHTS):
        assert float(losses[f"loss_mask_{i}"]) == pytest.approx(weight * math.log(2))


def test_one_mask_head_serves_all_stages(tmp_path, caplog):
    torch.manual_seed(0)
    model = build_detector(create_model(MODEL, **ARGS), **HEAD)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("heads.mask_stages.")}
    one = {
        name.replace("mask_stages.0.head.", "mask_head.").replace(
            "mask_stages.0.predictor.", "mask_predictor."
        ): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("heads.mask_stages.0.")
    }
    path = tmp_path / "model.safetensors"
    metadata = {"model": MODEL, "model_args": ARGS, "detection": HEAD}
    save(path, {**state, **one}, metadata)
    loaded, _ = load_model(path=path)
    assert caplog.text.count("one mask head: it serves all 3 stages") == 1
    first = model.heads.mask_stages[0].state_dict()
    for stage in loaded.heads.mask_stages:
        own = stage.state_dict()
        assert own.keys() == first.keys()
        assert all(torch.equal(own[name], first[name]) for name in first)

    caplog.clear()
    save(path, loaded.state_dict(), metadata)
    load_model(path=path)
    assert not caplog.text
    del one["heads.mask_head.1.0.weight"]
    save(path, {**state, **one}, metadata)
    with pytest.raises(UserError, match=r"missing heads\.mask_stages\.0\.head\.1\.0\.weight"):
        load_model(path=path)
