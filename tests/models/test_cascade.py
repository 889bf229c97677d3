"""Cascade Mask R-CNN: the stages together, images of any size, and learning."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_detector import SMALL, STAGES, target_of, tiny
from torch import nn
from torchvision.ops import box_iou

from fastvim import FastVim, UserError
from fastvim.models import FeatureMaps
from fastvim.models.heads.cascade import CascadeMaskRCNN
from fastvim.models.heads.cascade_heads import (
    BOX_STDS,
    CascadeHeads,
    HeadOptions,
)
from fastvim.models.heads.pyramid import LEVELS


def answer(module: nn.Module, *outputs) -> None:
    """Let a module return `outputs`, whatever it is given."""
    module.forward = lambda *inputs: outputs


# The stages.


def pyramid_of(side: int = 64, batch: int = 1) -> dict[str, torch.Tensor]:
    grids = [side // stride for stride in (4, 8, 16, 32, 64)]
    return {n: torch.randn(batch, 8, g, g) for n, g in zip(LEVELS, grids, strict=True)}


def test_logits_are_averaged_and_the_lesser_boxes_go():
    heads = CascadeHeads(8, 3, SMALL).eval()
    boxes = torch.tensor(
        [
            [0.0, 0.0, 20.0, 20.0],  # class 1 at 0.7
            [0.0, 0.0, 20.0, 18.0],  # class 1 at 0.6: over 90 % of the first
            [0.0, 0.0, 20.0, 19.0],  # class 2 at 0.5: as near, but another class
            [40.0, 40.0, 60.0, 60.0],  # class 1 at 0.3
            [70.0, 0.0, 80.0, 10.0],  # out of the image, class 2 at 0.2: a box without area
        ]
    )
    probabilities = [(0.27, 0.7, 0.03), (0.37, 0.6, 0.03), (0.47, 0.03, 0.5), (0.69, 0.3, 0.01)]
    probabilities = torch.tensor([*probabilities, (0.79, 0.01, 0.2)])
    # The stages disagree: of the logits the mean is these probabilities', of the scores it is not.
    spread = torch.tensor([2.0, -2.0, 0.0])
    zero, moved = torch.zeros(5, 12), torch.zeros(5, 12)
    moved[:, 4] = 0.1 / BOX_STDS[2][0]  # in the last stage class 1 goes a tenth to the right
    for i, (stage, shift) in enumerate(zip(heads.stages, (-1, 0, 1), strict=True)):
        answer(stage, probabilities.log() + shift * spread, (zero, zero, moved)[i])
    for i, masks in enumerate(heads.mask_stages):
        masks.forward = lambda features, boxes, logit=(-2.0, 0.0, 3.0)[i]: torch.full(
            (len(boxes[0]), 3, 28, 28), logit
        )
    (found,) = heads.detect(pyramid_of(), [boxes], (64, 64))
    assert found["labels"].tolist() == [1, 2, 1, 2]
    torch.testing.assert_close(found["scores"], torch.tensor([0.7, 0.5, 0.3, 0.2]))
    expected = torch.tensor([[2.0, 0, 22, 20], [0, 0, 20, 19], [42, 40, 62, 60], [64, 0, 64, 10]])
    torch.testing.assert_close(found["boxes"], expected)
    mean = torch.tensor([-2.0, 0.0, 3.0]).sigmoid().mean()
    torch.testing.assert_close(found["masks"], mean.expand(4, 1, 28, 28))


def test_losses_are_weighted_and_stages_pass_boxes_on():
    heads = CascadeHeads(8, 3, SMALL)
    targets = [target_of([(0, 0, 20, 20)], [2], (64, 64))]
    given = []
    offsets = torch.zeros(12)
    offsets[8:] = 0.5  # of class 2; class 1, the background's choice here, stays where it is
    for stage in heads.stages:

        def forward(features, boxes):
            given.append(boxes[0])
            return torch.zeros(len(boxes[0]), 3), offsets.expand(len(boxes[0]), -1)

        stage.forward = forward
    proposals = [torch.tensor([[40.0, 40.0, 60.0, 60.0]])]
    losses = heads.losses(pyramid_of(), proposals, (64, 64), targets)
    names = {f"loss_{kind}_{i}" for kind in ("classifier", "box_reg", "mask") for i in STAGES}
    assert losses.keys() == names
    for i, weight in enumerate((1.0, 0.5, 0.25)):
        assert float(losses[f"loss_classifier_{i}"]) == pytest.approx(weight * math.log(3))
    # In the first stage only the object's own box is an object: four offsets 0.5 away, two boxes.
    assert float(losses["loss_box_reg_0"]) == pytest.approx(4 * 0.5 / 2)
    assert given[0].tolist() == [[40.0, 40.0, 60.0, 60.0], [0.0, 0.0, 20.0, 20.0]]
    # The object's own box is not handed on: the next stage adds it where it is.
    assert all(torch.equal(boxes, given[0]) for boxes in given[1:])


# The model.


def test_an_image_without_objects_trains():
    torch.manual_seed(0)
    model = tiny().train()
    losses = model([torch.rand(3, 48, 64)], [target_of([], [], (48, 64))])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(float(losses[f"loss_box_reg_{i}"].detach()) == 0 for i in STAGES)
    assert all(float(losses[f"loss_mask_{i}"].detach()) == 0 for i in STAGES)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = tiny().train()
    model.rpn.fg_bg_sampler.batch_size_per_image = 100_000  # all anchors
    sizes = [(160, 144), (150, 160)]  # anchors of each level with weights lie inside
    targets = [target_of([(4, 8, 40, 50), (2, 2, 20, 20)], [1, 2], sizes[0])]
    targets.append(target_of([], [], sizes[1]))
    losses = model([torch.rand(3, *size) for size in sizes], targets)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("patch_size", [8, 16])
def test_images_of_any_size(patch_size):
    torch.manual_seed(0)
    model = tiny(patch_size).eval()
    sizes = [(64, 64), (50, 97), (1, 1), (130, 30)]
    with torch.inference_mode():
        found = model([torch.rand(3, *size) for size in sizes])
        assert model([torch.rand(3, 20, 70)])[0]["masks"].shape[1:] == (1, 20, 70)
    padded = torch.tensor({8: [112, 144], 16: [128, 160]}[patch_size] * 2)  # width, height
    for (height, width), one in zip(sizes, found, strict=True):
        count = len(one["boxes"])
        assert 0 < count <= SMALL.detections
        assert one["masks"].shape == (count, 1, height, width)
        assert one["labels"].shape == one["scores"].shape == (count,)
        assert set(one["labels"].tolist()) <= {1, 2}
        assert (one["scores"].diff() <= 0).all()
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= padded).all()


def test_nothing_is_found():
    model = tiny(heads=SMALL._replace(score_thresh=1.0)).eval()
    with torch.inference_mode():
        found = model([torch.rand(3, 40, 50), torch.rand(3, 20, 20)])
        assert [one["masks"].shape for one in found] == [(0, 1, 40, 50), (0, 1, 20, 20)]
        assert [one["boxes"].shape for one in found] == [(0, 4)] * 2
        features = model.features(torch.rand(1, 3, 32, 32))
        (one,) = model.heads.detect(features, [torch.zeros(0, 4)], (32, 32))
        assert one["masks"].shape == (0, 1, 28, 28)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (70, 33), (160, 90)])
def test_anchors_lie_at_the_strides(height, width):
    model = tiny(16)
    batch, padded, features = model._pyramid([torch.rand(3, height, width)])
    maps = list(features.values())
    (anchors,) = model.rpn.anchor_generator(batch, maps)
    start = 0
    for x, stride in zip(maps, (4, 8, 16, 32, 64), strict=True):
        rows, columns = x.shape[-2:]
        assert (rows, columns) == tuple(-(-side // stride) for side in padded)
        level = anchors[start : start + 3 * rows * columns].reshape(rows, columns, 3, 4)
        centre = torch.tensor([(columns - 1) * stride, (rows - 1) * stride] * 2)
        flat, square, tall = (level[rows - 1, columns - 1] - centre) / stride
        assert torch.equal(square, torch.tensor([-4.0, -4, 4, 4]))
        longer, shorter = 4 * math.sqrt(2), 4 / math.sqrt(2)
        torch.testing.assert_close(flat, torch.tensor([-longer, -shorter, longer, shorter]))
        torch.testing.assert_close(tall, torch.tensor([-shorter, -longer, shorter, longer]))
        start += 3 * rows * columns
    assert start == len(anchors)


def test_an_image_is_found_the_same_in_a_batch():
    torch.manual_seed(0)
    model = tiny(pad_to=100).eval()
    image, other = torch.rand(3, 40, 60), torch.rand(3, 90, 90)
    assert model.transform([image]).shape == (1, 3, 112, 112)
    with torch.inference_mode():
        alone, (_, beside) = model([image]), model([other, image])
    for name, value in alone[0].items():
        torch.testing.assert_close(beside[name], value, rtol=1e-3, atol=1e-3)


def test_half_precision_keeps_coordinates():
    torch.manual_seed(0)
    model = tiny()
    image, target = torch.rand(3, 64, 64), target_of([(4, 8, 40, 50)], [1], (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()([image], [target])
        with torch.inference_mode():
            (found,) = model.eval()([image])
            maps = model.features(image[None])
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    assert found["boxes"].dtype == found["masks"].dtype == torch.float32
    assert {x.dtype for x in maps.values()} == {torch.float32}


def test_other_backbones():
    plain = nn.Conv2d(1, 24, 16, stride=16)
    options = {"channels": 16, "proposals": 50, "heads": SMALL}
    one = {"image_mean": [0.5], "image_std": [0.2]}
    model = CascadeMaskRCNN(plain, 2, embed_dim=24, stride=16, **one, **options).eval()
    with torch.inference_mode():
        assert model([torch.rand(1, 30, 40)])[0]["masks"].shape[1:] == (1, 30, 40)
    maps = FeatureMaps(FastVim(embed_dim=32, depth=3, num_classes=0), [1], source="residual")
    model = CascadeMaskRCNN(maps, 2, **options)
    assert model.backbone is maps
    assert len(tiny().backbone.backbone.blocks) == 2


def test_names_of_the_weights():
    names = {name.rpartition(".")[0] for name in tiny().state_dict()}
    stage = [f"box_head.{i}.{part}" for i in range(4) for part in (0, 1)]
    stage += ["box_head.5", "box_predictor.cls_score", "box_predictor.bbox_pred"]
    expected = {f"heads.stages.{i}.{name}" for i in STAGES for name in stage}
    masks = [f"head.{i}.{part}" for i in range(4) for part in (0, 1)]
    masks += ["predictor.conv5_mask", "predictor.mask_fcn_logits"]
    expected |= {f"heads.mask_stages.{i}.{name}" for i in STAGES for name in masks}
    expected |= {f"rpn.head.{name}" for name in ("conv.0.0", "conv.1.0", "cls_logits", "bbox_pred")}
    expected |= {f"pyramid.levels.{level}.{part}" for level in range(4) for part in range(1, 5)}
    expected |= {"pyramid.levels.0.0.0", "pyramid.levels.0.0.1", "pyramid.levels.0.0.3"}
    expected |= {"pyramid.levels.1.0", "backbone.norms.0"}
    assert {name for name in names if not name.startswith("backbone.backbone")} == expected


def test_sizes_by_default():
    with torch.device("meta"):
        heads = CascadeHeads(256, 81)
    stage = heads.stages[2]
    assert stage.box_head[5].weight.shape == (1024, 256 * 7 * 7)
    assert stage.box_predictor.bbox_pred.out_features == 4 * 81
    masks = heads.mask_stages[2]
    assert masks.predictor.mask_fcn_logits.weight.shape == (81, 256, 1, 1)
    assert len(masks.head) == 4
    sampler = stage.fg_bg_sampler
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (512, 0.25)
    assert (stage.score_thresh, stage.nms_thresh, stage.detections_per_img) == (0.05, 0.5, 100)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"boxes": torch.tensor([[4.0, 4.0, 4.0, 9.0]])}, "x1 < x2"),
        ({"boxes": torch.zeros(2, 4)}, r"\(2, 4\): expected \(1, 4\)"),
        ({"labels": torch.tensor([3])}, r"\[3\].* 1 to 2"),
        ({"labels": torch.tensor([0])}, r"\[0\].* 1 to 2"),
        ({"labels": torch.tensor([1.0])}, "int64"),
        ({"boxes": torch.tensor([[4, 4, 8, 9]])}, "floating"),
        ({"masks": torch.zeros(1, 8, 8)}, r"expected \(1, 32, 32\)"),
    ],
)
def test_targets_that_do_not_fit(change, named):
    target = {**target_of([(1, 1, 9, 9)], [1], (32, 32)), **change}
    with pytest.raises(UserError, match=named):
        tiny().train()([torch.rand(3, 32, 32)], [target])


def test_other_mistakes():
    model, image = tiny(), torch.rand(3, 32, 32)
    with pytest.raises(UserError, match="None images: expected 1"):
        model.train()([image])
    with pytest.raises(UserError, match="without labels, masks"):
        model([image], [{"boxes": torch.zeros(0, 4)}])
    with pytest.raises(UserError, match="no images"):
        model.eval()([])
    with pytest.raises(UserError, match=r"\(1, 32, 32\): expected \(3, H, W\)"):
        model([image[:1]])
    with pytest.raises(UserError, match="uint8: expected values in 0 to 1"):
        model([image.to(torch.uint8)])
    with pytest.raises(UserError, match="stride=14: expected a multiple of 4"):
        CascadeMaskRCNN(nn.Identity(), 2, embed_dim=8, stride=14)
    with pytest.raises(UserError, match="embed_dim=None"):
        CascadeMaskRCNN(nn.Identity(), 2)
    with pytest.raises(UserError, match="num_classes 0"):
        CascadeMaskRCNN(nn.Identity(), 0, embed_dim=8, stride=16)
    with pytest.raises(UserError, match=r"out_indices=\[0, 1\]"):
        CascadeMaskRCNN(FeatureMaps(FastVim(embed_dim=16, depth=2), [0, 1]), 2)


# Does it learn?


def scene(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A bright red rectangle on the left, a green disc on the right, in noise of 64 pixels."""
    image = torch.rand(3, 64, 64, generator=generator) * 0.2
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    boxes, masks = [], []
    for channel in range(2):
        width, height = draw(18, 29), draw(18, 29)
        if channel == 1:
            height = width
        x1, y1 = draw(0, 33 - width) + 32 * channel, draw(0, 65 - height)
        mask = (x >= x1) & (x < x1 + width) & (y >= y1) & (y < y1 + height)
        if channel == 1:
            radius = width / 2
            mask &= (x + 0.5 - x1 - radius) ** 2 + (y + 0.5 - y1 - radius) ** 2 <= radius**2
        image[channel, mask] = 0.9
        boxes.append((x1, y1, x1 + width, y1 + height))
        masks.append(mask)
    target = target_of(boxes, [1, 2], (64, 64))
    return image, {**target, "masks": torch.stack(masks).to(torch.uint8)}


@pytest.mark.slow
def test_it_learns_two_images():
    """About 7 s on two free cores."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, targets = zip(*(scene(generator) for _ in range(2)), strict=True)
    backbone = FastVim(img_size=64, patch_size=8, embed_dim=24, depth=2, norm="layer")
    options = HeadOptions(hidden_dim=64, samples=32)
    model = CascadeMaskRCNN(backbone, 2, channels=24, proposals=64, heads=options).train()
    steps = 140
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        detections = model.eval()(images)
    for found, target in zip(detections, targets, strict=True):
        assert sorted(found["labels"][:2].tolist()) == [1, 2]  # the two best, one of each
        assert found["scores"][1] > 0.5
        for rank, label in enumerate(found["labels"][:2].tolist()):
            goal = target["masks"][label - 1].bool()
            mask = found["masks"][rank, 0] > 0.5
            assert box_iou(found["boxes"][rank, None], target["boxes"][label - 1, None]) > 0.8
            assert (mask & goal).sum() / (mask | goal).sum() > 0.7
