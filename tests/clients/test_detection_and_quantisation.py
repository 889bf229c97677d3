"""torchvision's detectors over the maps, and torchao's int8 weights."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

import fastvim  # noqa: F401  (registers the models)

pytestmark = pytest.mark.clients

NAME = "fastvim_tiny_patch16_224"


class Pyramid(nn.Module):
    """A pyramid as torchvision's detectors ask for it: maps by name, and their width."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model(NAME, features_only=True, embed_dim=32, depth=4)
        self.out_channels = 32

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        return OrderedDict((str(i), level) for i, level in enumerate(self.body(x)))


@pytest.mark.parametrize("kind", ["FasterRCNN", "RetinaNet", "FCOS"])
def test_a_detector_learns(kind):
    detection = pytest.importorskip("torchvision.models.detection")
    anchors = pytest.importorskip("torchvision.models.detection.anchor_utils").AnchorGenerator
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 64, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    if kind == "FasterRCNN":
        options["rpn_anchor_generator"] = anchors(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
        pool = pytest.importorskip("torchvision.ops").MultiScaleRoIAlign
        options["box_roi_pool"] = pool(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    elif kind == "RetinaNet":
        options["anchor_generator"] = anchors(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
    else:
        options["anchor_generator"] = anchors(((4,), (8,), (16,), (32,)), ((1.0,),) * 4)
    model = getattr(detection, kind)(Pyramid(), num_classes=2, **options)
    image, boxes = torch.zeros(3, 64, 64), torch.tensor([[16.0, 16.0, 48.0, 48.0]])
    image[:, 16:48, 16:48] = 1
    target = [{"boxes": boxes, "labels": torch.tensor([1])}]
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(10):
        loss = sum(model([image], target).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    (found,) = model.eval()([image])
    assert found["boxes"].isfinite().all()


@pytest.mark.parametrize("kind", ["weights", "dynamic"])
def test_int8_weights(kind):
    """Linear layers alone lose precision: logits stay close and the order of classes too."""
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        "weights": quantization.Int8WeightOnlyConfig,
        "dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
    }[kind]
    torch.manual_seed(0)
    model = timm.create_model(NAME, embed_dim=64, depth=4, num_classes=10).eval()
    for block in model.blocks:
        block.mixer.in_proj.weight.data.mul_(2)
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, config())
    assert type(quantised.blocks[0].mixer.in_proj.weight) is not nn.Parameter
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(images), quantised(images)
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.05
    assert torch.equal(found.argmax(1), expected.argmax(1))
