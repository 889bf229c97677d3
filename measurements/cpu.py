"""FastVim beside timm's ViT on a CPU: alternating in one process, inference and training.

    python measurements/cpu.py [--threads N] [--rows NAME ...] --out measurements/cpu.json

Both are eager, in float32, with random weights on random images. FastVim's kernels are compared
with the reference operations first. Times are medians of alternating calls, memory is the most
that a process of its own has resident beyond the model, over a training step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from fastvim import use_engine
from fastvim.models import create_model

SECONDS = 20.0  # of a row, about
BOUND = 1e-4  # on FastVim's largest difference from the reference, of the largest logit


class Row(NamedTuple):
    """A comparison: names of FastVim and its ViT, sizes of their images, and the wanted ratio."""

    name: str
    ours: str
    peer: str
    size: tuple[int, int, int, int]
    peer_size: tuple[int, int, int, int]
    wanted: float | None = None
    train: bool = False


def _square(
    name: str, kind: str, side: int, batch: int, wanted: float | None = None, train: bool = False
) -> Row:
    size = (batch, 3, side, side)
    names = (f"fastvim_{kind}_patch16_224", f"vit_{kind}_patch16_224")
    return Row(name, *names, size, size, wanted, train)


ROWS = (
    _square("T 224", "tiny", 224, 1, 1.0),
    _square("T 224, batch 8", "tiny", 224, 8, 1.0),
    _square("T 512", "tiny", 512, 1, 1.4),
    _square("T 1024", "tiny", 1024, 1, 3.0),
    _square("T 224, batch 8, training", "tiny", 224, 8, 0.9, train=True),
    Row(
        "channels S/8, 8 of 224",
        "fastchannelvim_small_patch8_224",
        "vit_small_patch8_224",
        (1, 8, 224, 224),
        (1, 3, 448, 896),  # as many tokens
        2.5,
    ),
    _square("T 160", "tiny", 160, 1),
    _square("T 384", "tiny", 384, 1),
    _square("S 224", "small", 224, 1),
    _square("B 224", "base", 224, 1),
    _square("S 224, batch 8, training", "small", 224, 8, train=True),
)


def build(name: str, size: tuple[int, int, int, int]) -> nn.Module:
    torch.manual_seed(0)
    options = {} if name.startswith("fastc") else {"img_size": size[2:]}
    make = create_model if "fast" in name else timm.create_model
    return make(name, **options)


def step(model: nn.Module, images: Tensor, train: bool) -> Callable[[], Any]:
    """A forward pass, or a training step without the optimiser."""
    model.train(train)

    def infer() -> None:
        with torch.inference_mode():
            model(images)

    def learn() -> None:
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()

    return learn if train else infer


def difference(model: nn.Module, images: Tensor) -> float:
    """Of the kernels from the reference, on an image of a quarter of the side."""
    small = images[:1, :, : max(64, images.shape[2] // 4), : max(64, images.shape[3] // 4)]
    with torch.inference_mode():
        found = model.eval()(small)
        with use_engine("reference"):
            wanted = model(small)
    return float((found - wanted).abs().max() / wanted.abs().max())


def measure(row: Row) -> dict[str, Any]:
    models = build(row.ours, row.size), build(row.peer, row.peer_size)
    images = torch.randn(row.size), torch.randn(row.peer_size)
    error = difference(models[0], images[0])
    calls = [step(m, x, row.train) for m, x in zip(models, images, strict=True)]
    for call in calls:
        call()
        call()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, spent in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - begin))
    ours, peer = map(statistics.median, times)
    found = {
        "name": row.name,
        "ms": round(ours, 2),
        "vit_ms": round(peer, 2),
        "ratio": round(peer / ours, 2),
        "wanted": row.wanted,
        "calls": len(times[0]),
        "difference": error,
    }
    if row.train:
        memory = [_memory(row.name, who) for who in ("ours", "peer")]
        found |= {"mib": memory[0], "vit_mib": memory[1]}
    return found


def _memory(name: str, who: str) -> int:
    """MiB that a training step takes beyond the model, in a process of its own."""
    words = [sys.executable, __file__, "--memory", name, who]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def training_memory(row: Row, ours: bool) -> int:
    size = row.size if ours else row.peer_size
    model = build(row.ours if ours else row.peer, size)
    call = step(model, torch.randn(size), True)
    step(model, torch.randn(1, *size[1:]), True)()  # kernels are loaded, gradients exist
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rows", nargs="+", metavar="NAME")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        (row,) = (row for row in ROWS if row.name == arguments.memory[0])
        sys.stdout.write(f"{training_memory(row, arguments.memory[1] == 'ours')}\n")
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found = []
    for row in ROWS:
        if arguments.rows and row.name not in arguments.rows:
            continue
        found.append(measure(row))
        sys.stdout.write(json.dumps(found[-1]) + "\n")
    told = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "timm", "numba")},
        "rows": found,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    return int(any(row["difference"] > BOUND for row in found))


if __name__ == "__main__":
    sys.exit(main())
