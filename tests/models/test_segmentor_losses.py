"""One training step of UPerNet against the published one: losses, gradients, running statistics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.transforms.v2 import functional as TF

from fastvim.tasks import Segmentation
from fastvim.weights import load_model
from fastvim.weights.dense_names import to_published

TRAINING = Path(__file__).parents[1] / "golden" / "training"
WHOLE = Path(__file__).parents[1] / "golden" / "whole"
ARRAYS = np.load(TRAINING / "segmentor_losses.npz")
CASES = ("some_ignored", "one_image_ignored", "all_ignored")


def close(found: float, wanted: float, share: float) -> bool:
    return abs(found - wanted) <= share * max(abs(wanted), 1e-3)


@pytest.fixture(params=CASES)
def step(request):
    """Logged losses, gradients under published names, the model, and the published arrays."""
    golden = {
        name.removeprefix(f"{request.param}/"): ARRAYS[name]
        for name in ARRAYS.files
        if name.startswith(f"{request.param}/")
    }
    model = load_model(path=WHOLE / "segmentor.pth")[0].train()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    images = torch.from_numpy(ARRAYS["images_rgb"]).movedim(-1, 1) / 255
    images = TF.normalize(images, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))
    task = Segmentation("fastvim_tiny_patch16_224")
    task.model = model
    task.log_training = lambda loss: None
    outputs = []
    task.call_model = lambda images: outputs.extend(model(images)) or tuple(outputs)
    loss = task.training_step((images, torch.from_numpy(golden["labels"]).long()), 0)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return SimpleNamespace(
        golden=golden, loss=loss.item(), gradients=gradients, model=model, outputs=outputs
    )


def test_losses(step):
    golden = step.golden
    assert close(step.loss, float(golden["loss/loss"]), 1e-4)
    labels = torch.from_numpy(golden["labels"]).long()
    counted = labels != 255
    for name, logits, weight in zip(("decode", "aux"), step.outputs, (1.0, 0.4), strict=True):
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
        loss = weight * loss.item() / labels.numel()
        assert close(loss, float(golden[f"loss/{name}.loss_ce"]), 1e-4)
        if counted.any():
            accuracy = 100 * (logits.argmax(1) == labels)[counted].float().mean().item()
            assert accuracy == pytest.approx(float(golden[f"loss/{name}.acc_seg"]), abs=0.02)


def test_gradients(step):
    gradients = to_published(step.gradients)
    wanted = {
        name.removeprefix("grad/"): float(norm)
        for name, norm in step.golden.items()
        if name.startswith("grad/")
    }
    total = wanted.pop("all", None)
    assert len(wanted) > 10
    for name, norm in wanted.items():
        assert close(gradients[name].norm().item(), norm, 1e-3), name
    if total is not None:
        norms = torch.stack([gradient.norm() for gradient in gradients.values()])
        assert close(norms.norm().item(), total, 1e-3)


def test_running_statistics(step):
    norm = step.model.head.fusion[1]
    for name, found in (("mean", norm.running_mean), ("var", norm.running_var)):
        wanted = torch.from_numpy(step.golden[f"running_{name}_after"])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
