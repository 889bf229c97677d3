"""Training steps of the dense recipes: UPerNet at 512 pixels, Cascade Mask R-CNN at 1024.

    python measurements/dense_step.py [--model fastvim_base_patch16_224] [--batch 2]
        [--sizes 512 1024] [--out measurements/dense_step.json]

Forward, backward and AdamW on random images with random answers, as `recipes/ade20k` and
`recipes/coco` train: bfloat16 autocast over float32 weights, UPerNet with its passes captured and
without (detection has images of many shapes); on a CPU in float32. First the maps of each backbone,
and the gradients of their squares, are compared with the reference in float32. Exit code 1 if they
differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvim
from fastvim.benchmark.cases import PRECISIONS, Precision
from fastvim.benchmark.check import relative_error
from fastvim.benchmark.record import device_name
from fastvim.benchmark.timing import measure, peak_gib, reset_peak
from fastvim.benchmark.training import TrainingStep
from fastvim.graphed import GraphedModel
from fastvim.models import FeatureMaps
from fastvim.models.heads.cascade import build_detector
from fastvim.models.heads.upernet import UPerNet

CHECKED = 224  # pixels of the comparison: the reference keeps every state
CLASSES = {"upernet": 150, "cascade": 80}
OBJECTS = 7  # in an image: COCO's mean

Loss = Callable[[], Tensor]
Parts = tuple[FeatureMaps, nn.Module, Loss]  # the backbone, the whole network, its loss


def backbone_of(model: str, size: int) -> nn.Module:
    return timm.create_model(model, img_size=size, norm="layer", drop_path_rate=0.4)


class Squares(nn.Module):
    """The mean square of the maps of an image, as (1, 1)."""

    def __init__(self, maps: FeatureMaps) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> Tensor:
        return sum(x.float().square().mean() for x in self.maps(images)).view(1, 1)


def check(maps: FeatureMaps, device: torch.device, precision: Precision) -> float:
    """Relative error of the squares and their gradients against the reference in float32."""
    images = torch.randn(2, 3, CHECKED, CHECKED, device=device)
    squares = Squares(maps).eval()
    options: dict[str, Any] = {"loss": lambda loss, _: loss.sum()}
    results = TrainingStep(squares, images, precision, **options).results()
    with fastvim.use_engine("reference"):
        expected = TrainingStep(squares, images, PRECISIONS["float32"], **options).results()
    maps.zero_grad(set_to_none=True)
    return max(relative_error(a, e) for a, e in zip(results, expected, strict=True))


def upernet(
    model: str, size: int, batch: int, device: torch.device, captured: bool = False
) -> Parts:
    backbone = backbone_of(model, size)
    depth = len(backbone.blocks)
    maps = FeatureMaps(backbone, [depth * (i + 1) // 4 - 1 for i in range(4)])
    network = UPerNet(maps, num_classes=CLASSES["upernet"]).to(device)
    run = GraphedModel(network) if captured else network
    images = torch.randn(batch, 3, size, size, device=device)
    classes = torch.randint(CLASSES["upernet"], (batch, size, size), device=device)

    def loss() -> Tensor:
        logits, auxiliary = run(images)
        return F.cross_entropy(logits.float(), classes) + 0.4 * F.cross_entropy(
            auxiliary.float(), classes
        )

    return maps, network, loss


def cascade(model: str, size: int, batch: int, device: torch.device) -> Parts:
    network = build_detector(backbone_of(model, size), CLASSES["cascade"], pad_to=size).to(device)
    images = [torch.rand(3, size, size, device=device) for _ in range(batch)]
    targets = [objects(size, device) for _ in range(batch)]

    def loss() -> Tensor:
        return sum(network(images, targets).values())

    return network.backbone, network, loss


def objects(size: int, device: torch.device) -> dict[str, Tensor]:
    """Rectangles of random position, size and class."""
    corners = torch.rand(OBJECTS, 2) * 0.7 * size
    sides = size * (0.05 + 0.25 * torch.rand(OBJECTS, 2))
    boxes = torch.cat([corners, corners + sides], dim=1).round()
    masks = torch.zeros(OBJECTS, size, size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.randint(1, CLASSES["cascade"] + 1, (OBJECTS,))
    answers = {"boxes": boxes, "labels": labels, "masks": masks}
    return {name: value.to(device) for name, value in answers.items()}


def training_step(network: nn.Module, loss: Loss, dtype: torch.dtype | None) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    device = next(network.parameters()).device

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            value = loss()
        value.backward()
        optimizer.step()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="fastvim_base_patch16_224")
    add("--batch", type=int, default=2)
    add("--sizes", type=int, nargs=2, default=[512, 1024], help="of UPerNet and of Cascade")
    add("--repeats", type=int, default=10)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    precision = PRECISIONS["amp" if device.type == "cuda" else "float32"]
    torch.manual_seed(0)
    rows = []
    of_upernet, of_cascade = arguments.sizes
    cases: list[tuple[str, Callable[..., Parts], int]] = [
        ("upernet", upernet, of_upernet),
        ("upernet, captured", partial(upernet, captured=True), of_upernet),
        ("cascade", cascade, of_cascade),
    ]
    for name, build, size in cases:
        reset_peak(device)
        maps, network, loss = build(arguments.model, size, arguments.batch, device)
        error = check(maps, device, precision)
        if not error <= precision.bound:
            print(f"{name} wrong: relative error {error:.2g} to the reference")  # noqa: T201
            return 1
        step = training_step(network, loss, precision.autocast)
        reset_peak(device)
        seconds = measure(step, device, warmup=3, repeats=arguments.repeats).median
        speed, gib = arguments.batch / seconds, peak_gib(device)
        memory = "" if gib is None else f", {gib:.2f} GiB"
        print(f"{name} at {size}: {1e3 * seconds:.1f} ms, {speed:.1f} images/s{memory}", flush=True)  # noqa: T201
        row = {"head": name, "size": size, "ms": 1e3 * seconds, "gib": gib, "error": error}
        rows.append({**row, "images_per_second": speed})
        del maps, network, loss, step
    record = {
        "device": device_name(device),
        "torch": torch.__version__,
        "model": arguments.model,
        "batch": arguments.batch,
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
