"""One training step of Cascade Mask R-CNN against the published one: losses, targets, gradients."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from fastvim.models.heads.cascade_heads import mask_targets
from fastvim.models.heads.proposals import match
from fastvim.weights import load_model
from fastvim.weights.dense_names import to_published

TRAINING = Path(__file__).parents[1] / "golden" / "training"
WHOLE = Path(__file__).parents[1] / "golden" / "whole"
SIDE = 128
STAGES = range(3)
NEITHER, OUTSIDE = -1, -2  # states of anchors
CASES = ("both", "second_empty", "smaller")
EVERY = 1_000_000  # regions that a sampler takes: all there are
NAMES = {"cls": "classifier", "bbox": "box_reg", "mask": "mask"}


@pytest.fixture(scope="module")
def arrays():
    with np.load(TRAINING / "detector_losses.npz") as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture(scope="module")
def model():
    """With the published weights, and samplers that leave nothing to chance."""
    model = load_model(path=WHOLE / "detector.pth")[0].train()
    for owner in (model.rpn, *model.heads.stages):
        owner.fg_bg_sampler.batch_size_per_image = EVERY
        owner.fg_bg_sampler.positive_fraction = 0.5
    return model


@pytest.fixture(autouse=True)
def _exact_convolutions():
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def objects(arrays, case: str):
    """Images (3, H, W) in 0 to 1, and the objects in them but for crowds."""
    images, targets = [], []
    for i in range(2):
        name = f"{case}/image{i}_rgb"
        image = arrays[name] if name in arrays else arrays["images_rgb"][i]
        images.append(torch.from_numpy(image.copy()).movedim(-1, 0) / 255)
        where = f"{case}/image{i}" if f"{case}/image{i}/boxes" in arrays else f"image{i}"
        boxes = torch.from_numpy(arrays[f"{where}/boxes"])
        labels = torch.from_numpy(arrays[f"{where}/labels"]).long() + 1
        crowd = arrays.get(f"{where}/crowd", np.zeros(len(labels)))
        masks = np.unpackbits(arrays[f"{where}/masks"])[
            : len(labels) * image.shape[0] * image.shape[1]
        ]
        masks = torch.from_numpy(masks.reshape(len(labels), *image.shape[:2]))
        learned = torch.from_numpy(crowd == 0)
        if case == "second_empty" and i == 1:
            learned[:] = False
        targets.append(
            {"boxes": boxes[learned], "labels": labels[learned], "masks": masks[learned]}
        )
    return images, targets


@pytest.fixture(scope="module", params=CASES)
def step(request, arrays, model):
    """Losses, gradients, proposals and samples of a case, and its published arrays."""
    case = request.param
    golden = {n.removeprefix(f"{case}/"): a for n, a in arrays.items() if n.startswith(f"{case}/")}
    images, targets = objects(arrays, case)
    proposals, samples = [], []
    record = model.rpn.register_forward_hook(lambda module, args, out: proposals.extend(out[0]))
    samplers = [stage.sample for stage in model.heads.stages]
    for stage, sample in zip(model.heads.stages, samplers, strict=True):

        def recorded(boxes, targets, sample=sample):
            samples.append(sample(boxes, targets))
            return samples[-1]

        stage.sample = recorded
    model.zero_grad()
    with torch.backends.mkldnn.flags(enabled=False):
        losses = model(images, targets)
        sum(losses.values()).backward()
    record.remove()
    for stage, sample in zip(model.heads.stages, samplers, strict=True):
        stage.sample = sample
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    losses = {name: loss.item() for name, loss in losses.items()}
    return golden, losses, gradients, proposals, samples, targets


def close(found: float, wanted: float, share: float) -> bool:
    return abs(found - wanted) <= share * max(abs(wanted), 1e-3)


def test_losses(step):
    golden, losses = step[:2]
    wanted = {
        "loss_objectness": golden["loss/logged/loss_rpn_cls"],
        "loss_rpn_box_reg": golden["loss/logged/loss_rpn_bbox"],
    }
    for i in STAGES:
        for theirs, ours in NAMES.items():
            wanted[f"loss_{ours}_{i}"] = golden[f"loss/logged/s{i}.loss_{theirs}"]
    assert losses.keys() == wanted.keys()
    for name, value in wanted.items():
        assert close(losses[name], float(value), 1e-4), name
    assert close(sum(losses.values()), float(golden["loss/loss"]), 1e-4)


def test_anchors(step, model):
    golden, *_, targets = step
    features = [torch.zeros(1, 1, SIDE // 4 // 2**i, SIDE // 4 // 2**i) for i in range(5)]
    anchors = model.rpn.anchor_generator(SimpleNamespace(image_sizes=[0]), features)[0]
    for i, target in enumerate(targets):
        states, owners = match(anchors, target["boxes"], (SIDE, SIDE))
        wanted = torch.from_numpy(golden[f"rpn/image{i}/state"])
        outside = wanted == OUTSIDE
        sure = torch.ones_like(outside)
        if len(target["boxes"]):
            overlaps = box_iou(target["boxes"], anchors)
            for threshold in (0.3, 0.7):
                sure &= ((overlaps - threshold).abs() > 1e-5).all(dim=0)
            best = overlaps.masked_fill(outside, -1).max(dim=1, keepdim=True).values
            sure &= ((overlaps == best) | ((overlaps - best).abs() > 1e-5)).all(dim=0)
        assert sure.float().mean() > 0.95
        same = torch.where(outside, NEITHER, wanted.int()) == states.int()
        assert same[sure].all()
        found = torch.where(states == 1, owners, -1)
        assert torch.equal(
            found[sure], torch.from_numpy(golden[f"rpn/image{i}/object"]).long()[sure]
        )
        positive = torch.from_numpy(golden[f"rpn/image{i}/positive"]).long()
        if len(positive):
            offsets = model.rpn.box_coder.encode_single(
                target["boxes"][owners[positive]], anchors[positive]
            )
            targets_of = torch.from_numpy(golden[f"rpn/image{i}/targets"])
            torch.testing.assert_close(offsets, targets_of, rtol=0, atol=1e-4)


def pairs(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """For each wanted box the index of the found one that it is; none is left over."""
    assert len(found) == len(wanted)
    distance = torch.cdist(wanted, found, p=torch.inf)
    assert distance.min(dim=0).values.max() < 0.02
    assert distance.min(dim=1).values.max() < 0.02
    return distance.argmin(dim=1)


def test_proposals(step):
    golden, proposals = step[0], step[3]
    for i, found in enumerate(proposals):
        assert len(found) == len(golden[f"proposals/image{i}/boxes"])
        pairs(found, torch.from_numpy(golden[f"proposals/image{i}/boxes"]))


@pytest.mark.parametrize("stage", STAGES)
def test_samples(step, stage):
    golden, *_, samples, targets = step
    regions = samples[stage]
    for i, target in enumerate(targets):
        where = f"stage{stage}/image{i}"
        wanted = torch.from_numpy(golden[f"{where}/boxes"])
        positives = int(golden[f"{where}/positives"])
        own = regions.given[i]
        assert len(regions.boxes[i]) - own.sum() == golden[f"{where}/candidates"]
        order = pairs(regions.boxes[i], wanted)
        background = len(NAMES)  # of three classes, the published last label
        labels = torch.from_numpy(golden[f"{where}/labels"]).long()
        labels = torch.where(labels == background, 0, labels + 1)
        assert torch.equal(regions.labels[i][order], labels)
        order = order[:positives]
        assert torch.equal(
            regions.matched[i][order], torch.from_numpy(golden[f"{where}/objects"]).long()
        )
        assert own[order].tolist() == golden[f"{where}/is_object"].tolist()
        offsets = torch.from_numpy(golden[f"{where}/targets"])
        torch.testing.assert_close(regions.offsets[i][order], offsets, rtol=1e-4, atol=1e-3)
        packed = np.unpackbits(golden[f"{where}/mask_targets"])[: positives * 28 * 28]
        if positives:
            masks = mask_targets(
                target["masks"], regions.matched[i][order], regions.boxes[i][order], (SIDE, SIDE)
            )
            assert (masks.numpy() != packed.reshape(-1, 28, 28)).mean() < 1e-3


def test_gradients(step):
    golden, gradients = step[0], to_published(step[2])
    wanted = {n.removeprefix("grad/"): float(a) for n, a in golden.items() if n.startswith("grad/")}
    total = wanted.pop("all")
    assert len(wanted) == 20  # some of each part
    for name, norm in wanted.items():
        assert close(gradients[name].norm().item(), norm, 1e-3), name
    norms = torch.stack([gradient.norm() for gradient in gradients.values()])
    assert close(norms.norm().item(), total, 1e-3)
