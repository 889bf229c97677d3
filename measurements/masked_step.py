"""A pre-training step of a masked autoencoder, with most patches masked and with none.

    python measurements/masked_step.py [--model mae_fastvim_base_patch16_224] [--batch 128]
        [--kernels 30] [--out measurements/masked_step.json]

Forward and backward under bfloat16 autocast, captured as one CUDA graph (on a CPU eager, in
float32), and the loop of `fastvim fit`. For comparison, the same of the encoder alone over all
tokens, as a classifier. First the loss and every gradient are compared with the reference in
float32. Exit code 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastvim
from fastvim.benchmark.cases import PRECISIONS, Precision
from fastvim.benchmark.check import relative_error
from fastvim.benchmark.record import device_name
from fastvim.benchmark.timing import measure, peak_gib, reset_peak
from fastvim.benchmark.training import TrainingLoop, TrainingStep, cross_entropy

SIZE = 224
CHECKED = 8  # images of the comparison


class Masked(nn.Module):
    """The loss of an autoencoder, as (1, 1), with the same masks at every call."""

    def __init__(self, model: nn.Module, ratio: float, noise: Tensor) -> None:
        super().__init__()
        self.model = model
        self.ratio = ratio
        self.noise = noise

    def forward(self, images: Tensor) -> Tensor:
        loss: Tensor = self.model(images, self.noise[: len(images)], self.ratio).loss
        return loss.view(1, 1)


def own_loss(loss: Tensor, _: Tensor) -> Tensor:
    return loss.sum()


def check(model: nn.Module, images: Tensor, precision: Precision) -> float:
    """Relative error of the loss and the gradients against the reference in float32."""
    few = images[:CHECKED]
    results = TrainingStep(model, few, precision, loss=own_loss).results()
    with fastvim.use_engine("reference"):
        expected = TrainingStep(model, few, PRECISIONS["float32"], loss=own_loss).results()
    model.zero_grad(set_to_none=True)
    return max(relative_error(a, e) for a, e in zip(results, expected, strict=True))


def print_kernels(step: TrainingStep, most: int) -> None:
    """The slowest kernels of a step: total microseconds, launches, microseconds each."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    rows = sorted(trace.key_averages(), key=lambda event: -event.device_time_total)
    for event in rows[:most]:
        total, count = event.device_time_total, event.count
        print(f"  {total:9.1f} {count:5} {total / count:9.1f}  {event.key[:90]}")  # noqa: T201


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="mae_fastvim_base_patch16_224")
    add("--classifier", default="fastvim_base_patch16_224", help="of the same encoder")
    add("--batch", type=int, default=128)
    add("--ratios", type=float, nargs="+", default=[0.75, 0.0])
    add("--repeats", type=int, default=10)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--kernels", type=int, default=0, help="print so many kernels of each step (GPU)")
    add("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    precision = PRECISIONS["amp" if on_gpu else "float32"]
    torch.manual_seed(0)
    images = torch.randn(arguments.batch, 3, SIZE, SIZE, device=device)
    autoencoder = timm.create_model(arguments.model).to(device)
    cells = autoencoder.encoder.grid_size[0] * autoencoder.encoder.grid_size[1]
    noise = torch.rand(arguments.batch, cells, device=device)
    error = check(Masked(autoencoder, arguments.ratios[0], noise), images, precision)
    if not error <= precision.bound:
        print(f"wrong: relative error {error:.2g} to the reference")  # noqa: T201
        return 1

    rows = []
    names = [(f"{ratio:.0%} masked", ratio) for ratio in arguments.ratios]
    for name, ratio in [*names, ("the encoder as a classifier", None)]:
        reset_peak(device)
        if ratio is None:
            del autoencoder
            model, loss = timm.create_model(arguments.classifier).to(device), cross_entropy
        else:
            model, loss = Masked(autoencoder, ratio, noise), own_loss
        step = TrainingStep(model, images, precision, capture=on_gpu, loss=loss)
        seconds = measure(step, device, warmup=3, repeats=arguments.repeats).median
        gib = peak_gib(device)
        speed = arguments.batch / seconds
        memory = "" if gib is None else f", {gib:.2f} GiB"
        print(f"{name}: {1e3 * seconds:.2f} ms, {speed:,.0f} images/s{memory}", flush=True)  # noqa: T201
        if arguments.kernels and on_gpu:
            print_kernels(step, arguments.kernels)
        step.release()
        model.zero_grad(set_to_none=True)
        loop = TrainingLoop(model, images, step.classes, precision, capture=on_gpu, loss=loss)
        in_loop = measure(loop, device, warmup=3, repeats=arguments.repeats).median
        print(f"{name}, loop: {1e3 * in_loop:.2f} ms, {arguments.batch / in_loop:,.0f} images/s")  # noqa: T201
        rows.append({"step": name, "ms": 1e3 * seconds, "gib": gib, "loop_ms": 1e3 * in_loop})
        del model, step, loop
    record = {
        "device": device_name(device),
        "torch": torch.__version__,
        "model": arguments.model,
        "batch": arguments.batch,
        "error": error,
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
