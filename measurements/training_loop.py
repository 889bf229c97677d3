"""Steps of an ordinary training loop, with the model's passes captured and without.

    python measurements/training_loop.py [MODEL:BATCH ...] [--repeats 20]
        [--out measurements/training_loop.json]

A step is: gradients set to None, the model under bfloat16 autocast over float32 weights, the loss
(cross entropy; an autoencoder's own), the backward pass, AdamW. Captured, `GraphedModel` calls the
model; on a CPU, and in float32, nothing is. First the gradients of a step of both are compared.
Exit code 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvim.models  # noqa: F401 - registers the models
from fastvim.benchmark.cases import PRECISIONS, Precision
from fastvim.benchmark.check import relative_error
from fastvim.benchmark.record import device_name
from fastvim.benchmark.timing import measure, peak_gib, reset_peak
from fastvim.graphed import GraphedModel

SIZE = 224
CASES = (
    "fastvim_tiny_patch16_224:128",
    "fastvim_small_patch16_224:128",
    "fastvim_base_patch16_224:64",
    "mae_fastvim_base_patch16_224:128",
    "vit_tiny_patch16_224:128",
)


def passes(run: nn.Module, images: Tensor, classes: Tensor, precision: Precision) -> None:
    """The forward and the backward pass; every one draws the same random numbers."""
    torch.manual_seed(0)
    autocast = precision.autocast
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        output = run(images)
    loss = getattr(output, "loss", None)  # an autoencoder's
    if loss is None:
        loss = F.cross_entropy(output.float(), classes)
    loss.backward()


def run_case(
    name: str, images: Tensor, classes: Tensor, precision: Precision, repeats: int, captured: bool
) -> tuple[dict[str, object], Tensor]:
    """What a loop takes, and all gradients of one step in one vector."""
    device, batch = images.device, len(images)
    reset_peak(device)  # the recording allocates what the replays use
    torch.manual_seed(0)
    model = timm.create_model(name).to(device).train()
    run = GraphedModel(model) if captured else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    passes(run, images, classes, precision)
    found = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    gradients = torch.cat(found).cpu()
    del found

    def step() -> None:
        optimizer.zero_grad()
        passes(run, images, classes, precision)
        optimizer.step()

    seconds = measure(step, device, warmup=3, repeats=repeats).median
    gib = peak_gib(device)
    loop = "captured" if captured else "eager"
    row = {"model": name, "batch": batch, "loop": loop, "ms": 1e3 * seconds}
    return {**row, "images_per_second": batch / seconds, "gib": gib}, gradients


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("cases", nargs="*", default=CASES, metavar="MODEL:BATCH")
    add("--repeats", type=int, default=20)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    precision = PRECISIONS["amp" if device.type == "cuda" else "float32"]
    rows = []
    for case in arguments.cases:
        name, batch = case.split(":")
        images = torch.randn(int(batch), 3, SIZE, SIZE, device=device)
        classes = torch.randint(1000, (int(batch),), device=device)
        results = []
        for captured in (False, True):
            row, gradients = run_case(name, images, classes, precision, arguments.repeats, captured)
            results.append(gradients)
            row["error"] = error = relative_error(gradients, results[0])
            rows.append(row)
            memory = "" if row["gib"] is None else f", {row['gib']:.2f} GiB"
            print(  # noqa: T201
                f"{name} ({batch}) {row['loop']}: {row['ms']:.2f} ms, "
                f"{row['images_per_second']:,.0f} images/s{memory}",
                flush=True,
            )
            if not error <= precision.bound:
                print(f"{name} wrong: gradients differ by {error:.2g}")  # noqa: T201
                return 1
    record = {"device": device_name(device), "torch": torch.__version__, "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
