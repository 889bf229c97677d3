"""torch.compile of FastVim on a GPU: graphs, breaks, seconds to compile, images/s by mode.

    python measurements/compiled.py [--out measurements/compiled.json] [--sizes 224 512 1024]
        [--models fastvim_tiny_patch16_224 vit_tiny_patch16_224]

Every model is eager, compiled with the default options, and captured, in inference (bfloat16, under
`inference_mode`) and in training (forward, loss and backward, autocast). One compiled model gets
all sizes in turn, then sizes that it has not seen: what is compiled then is counted. Milliseconds
are medians of rounds of calls in turn. Compiled results are compared with eager ones first;
exit code 1 if they differ by more than 3 % of the largest value.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastvim.benchmark.cases import PRECISIONS
from fastvim.benchmark.record import device_name
from fastvim.benchmark.training import TrainingStep
from fastvim.inference import Predictor
from fastvim.models import create_model

BATCHES = {False: {224: 128, 512: 32, 1024: 8}, True: {224: 128, 512: 16, 1024: 4}}
UNSEEN = [(3, 160, 160), (5, 224, 320), (2, 384, 384), (1, 640, 400)]
ROUNDS, CALLS, LIMIT = 9, 10, 0.03
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODES = ("eager", "compiled", "captured") if DEVICE.type == "cuda" else ("eager", "compiled")


def build(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("vit"):
        return timm.create_model(name, img_size=size, dynamic_img_size=True).to(DEVICE)
    return create_model(name, img_size=size).to(DEVICE)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any]) -> float:
    synchronize()
    begun = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begun


def rounds(call: Callable[[], Any]) -> float:
    """Milliseconds of a call, in one round."""
    return 1000 * seconds(lambda: [call() for _ in range(CALLS)]) / CALLS


def apart(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def infer(name: str, size: int, batch: int) -> dict[str, Any]:
    """A row of the table: milliseconds by mode, seconds to compile, what was compiled."""
    torch.compiler.reset()
    counters.clear()
    images = torch.randn(batch, 3, size, size, device=DEVICE, dtype=torch.bfloat16)
    model = build(name, size).eval().bfloat16()
    compiled = torch.compile(model)
    captured = Predictor(model, images.shape, dtype=images.dtype, copy_model=False)
    captured.images.copy_(images)
    with torch.inference_mode():
        expected = model(images).float()
        first = seconds(lambda: compiled(images))
        error = apart(compiled(images).float(), expected)
        calls = {
            "eager": lambda: model(images),
            "compiled": lambda: compiled(images),
            "captured": captured.replay,
        }
        times = alternate({mode: calls[mode] for mode in MODES})
    return {**times, "seconds": first, "apart": error, **counted()}


def train(name: str, size: int, batch: int) -> dict[str, Any]:
    """The same of forward pass, loss and backward pass."""
    torch.compiler.reset()
    counters.clear()
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    labels = torch.randint(1000, (batch,), device=DEVICE)
    model = build(name, size).train()
    steps = {
        mode: TrainingStep(
            model,
            images,
            PRECISIONS["amp"],
            compile=mode == "compiled",
            capture=mode == "captured",
            classes=labels,
        )
        for mode in MODES
    }
    expected = steps["eager"].results()[1]
    first = seconds(steps["compiled"])
    found = steps["compiled"].results()[1]
    error = float((found - expected).norm() / expected.norm())
    return {**alternate(steps), "seconds": first, "apart": error, **counted()}


def alternate(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds by mode: the median of rounds in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        rounds(call)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(rounds(call))
    return {name: statistics.median(each) for name, each in times.items()}


def counted() -> dict[str, int]:
    """Graphs that were compiled, and breaks."""
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


def many_sizes(name: str, training: bool) -> dict[str, Any]:
    """Graphs of one compiled model over all sizes, and how many more for sizes not seen."""
    torch.compiler.reset()
    counters.clear()
    model = build(name, 224).train(training)
    compiled = torch.compile(model)

    def call(batch: int, height: int, width: int) -> None:
        images = torch.randn(batch, 3, height, width, device=DEVICE)
        with torch.inference_mode(not training), torch.autocast(DEVICE.type, torch.bfloat16):
            logits = compiled(images)
        if training:
            logits.float().square().mean().backward()

    seen = [(4, 224, 224), (2, 256, 256), (3, 192, 288), (1, 512, 224)]
    first = [round(seconds(lambda size=size: call(*size)), 1) for size in seen]
    before = counted()
    then = [round(seconds(lambda size=size: call(*size)), 1) for size in UNSEEN]
    after = counted()
    return {"seen": first, "unseen": then, **before, "more": after["graphs"] - before["graphs"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 1024])
    names = ["fastvim_tiny_patch16_224", "vit_tiny_patch16_224"]
    parser.add_argument("--models", nargs="+", default=names)
    kinds = ["inference", "training"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--rows-only", action="store_true", help="leave out one model of all sizes")
    arguments = parser.parse_args()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    told: dict[str, Any] = {
        "device": device_name(DEVICE),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "rows": [],
        "many sizes": [],
    }
    for training in [only == "training" for only in arguments.only]:
        for name in arguments.models:
            for size in arguments.sizes:
                batch = BATCHES[training][size]
                row = (train if training else infer)(name, size, batch)
                row = {"model": name, "training": training, "size": size, "batch": batch, **row}
                told["rows"].append(row)
                print(json.dumps(row), flush=True)  # noqa: T201
                write(arguments.out, told)
        if arguments.rows_only:
            continue
        row = {"training": training, **many_sizes(arguments.models[0], training)}
        told["many sizes"].append(row)
        print(json.dumps(row), flush=True)  # noqa: T201
        write(arguments.out, told)
    return int(any(not row["apart"] <= LIMIT for row in told["rows"]))


def write(out: Path | None, told: dict[str, Any]) -> None:
    if out is not None:
        out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
