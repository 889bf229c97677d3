"""FastVim beside timm's ViT on a CPU: alternating in one process, inference and training.

    python measurements/cpu.py --out measurements/cpu.json
    python measurements/cpu.py --threads 1 2 4 8 16 --out measurements/cpu_threads.json

Both are eager, with random weights on random images. FastVim's kernels are compared with the
reference operations first. Times are medians of alternating calls. Memory is the most that a
process of its own has resident beyond the model, over a training step. The cold start is that of
processes which classify one image. With several numbers of threads a few rows are measured.
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
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from fastvim import use_engine
from fastvim.models import create_model

# On FastVim's largest difference from the reference, of the largest logit.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
STARTS = 5  # of each program, to time cold starts
SCRIPT = """
import sys
import timm, torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
model = timm.create_model("vit_tiny_patch16_224").eval()
model.load_state_dict(torch.load(sys.argv[2]))
transform = create_transform(**resolve_model_data_config(model))
image = transform(Image.open(sys.argv[1]).convert("RGB"))[None]
with torch.inference_mode():
    top = model(image).softmax(-1)[0].topk(1)
print(*zip(top.indices.tolist(), top.values.tolist()))
"""


class Row(NamedTuple):
    """A comparison: names of FastVim and its ViT, sizes of their images, and the wanted ratio."""

    name: str
    ours: str
    peer: str
    size: tuple[int, int, int, int]
    peer_size: tuple[int, int, int, int]
    wanted: float | None = None
    train: bool = False
    dtype: torch.dtype = torch.float32
    scales: bool = False  # measured where several numbers of threads are


def _row(
    name: str, kind: str, side: int | tuple[int, int], batch: int = 1, *rest: Any, **options: Any
) -> Row:
    height, width = side if isinstance(side, tuple) else (side, side)
    size = (batch, 3, height, width)
    names = (f"fastvim_{kind}_patch16_224", f"vit_{kind}_patch16_224")
    return Row(name, *names, size, size, *rest, **options)


ROWS = (
    _row("T 224", "tiny", 224, 1, 1.0, scales=True),
    _row("T 224, batch 8", "tiny", 224, 8, 1.0, scales=True),
    _row("T 1024", "tiny", 1024, 1, 3.0, scales=True),
    _row("T 224, batch 8, training", "tiny", 224, 8, 0.9, train=True, scales=True),
    _row("T 512", "tiny", 512, 1, 1.4),
    Row(
        "channels S/8, 8 of 224",
        "fastchannelvim_small_patch8_224",
        "vit_small_patch8_224",
        (1, 8, 224, 224),
        (1, 3, 448, 896),  # as many tokens
        2.5,
    ),
    _row("T 160", "tiny", 160),
    _row("T 384", "tiny", 384),
    _row("T 224 x 320", "tiny", (224, 320)),
    _row("S 224", "small", 224),
    _row("S 224, batch 8", "small", 224, 8),
    _row("S 224, batch 8, training", "small", 224, 8, train=True),
    _row("B 224", "base", 224),
    _row("B 224, batch 8", "base", 224, 8),
    _row("T 224, bfloat16", "tiny", 224, dtype=torch.bfloat16),
    _row("T 224, batch 8, bfloat16", "tiny", 224, 8, dtype=torch.bfloat16),
    _row("T 1024, bfloat16", "tiny", 1024, dtype=torch.bfloat16),
)


def build(row: Row, ours: bool) -> tuple[nn.Module, Tensor]:
    """A model of random weights, and random images."""
    torch.manual_seed(0)
    name, size = (row.ours, row.size) if ours else (row.peer, row.peer_size)
    options = {} if name.startswith("fastc") else {"img_size": size[2:]}
    make = create_model if ours else timm.create_model
    return make(name, **options).to(row.dtype), torch.randn(size).to(row.dtype)


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


def measure(row: Row, seconds: float, memory: bool) -> dict[str, Any]:
    pairs = [build(row, ours) for ours in (True, False)]
    error = difference(*pairs[0])
    calls = [step(model, images, row.train) for model, images in pairs]
    for call in calls:
        call()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for call, spent in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - begin))
    ours, peer = map(statistics.median, times)
    found = {
        "name": row.name,
        "threads": torch.get_num_threads(),
        "ms": round(ours, 2),
        "vit_ms": round(peer, 2),
        "ratio": round(peer / ours, 2),
        "wanted": row.wanted,
        "calls": len(times[0]),
        "difference": error,
        "within": error <= BOUNDS[row.dtype],
    }
    if row.train and memory:
        held = [_memory(row.name, who) for who in ("ours", "peer")]
        found |= {"mib": held[0], "vit_mib": held[1]}
    return found


def _memory(name: str, who: str) -> int:
    """MiB that a training step takes beyond the model, in a process of its own.

    Tensors get pages of their own, which leave the process with them: what counts is what lives.
    """
    words = [sys.executable, __file__, "--memory", name, who]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


def training_memory(row: Row, ours: bool) -> int:
    model, images = build(row, ours)
    call = step(model, images, True)
    step(model, images[:1], True)()  # kernels are loaded
    model.zero_grad(set_to_none=True)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # of the most that was resident
    call()
    return _resident("VmHWM") - before


def cold_start() -> dict[str, Any]:
    """Seconds from the start of a process to the class of one image, weights on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        pixels = (255 * torch.rand(300, 400, 3)).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(place / "image.png")
        for row, ours, name in ((ROWS[0], True, "fastvim"), (ROWS[0], False, "vit")):
            torch.save(build(row, ours)[0].state_dict(), place / f"{name}.pth")
        (place / "script.py").write_text(SCRIPT)
        start, image = [sys.executable], "image.png"
        programs = (
            [*start, "-m", "fastvim_cli", "predict", image, "--model", "fastvim.pth"],
            [*start, "script.py", image, "vit.pth"],
        )
        spent: tuple[list[float], list[float]] = ([], [])
        for turn in range(STARTS + 1):
            for program, seconds in zip(programs, spent, strict=True):
                begin = time.perf_counter()
                subprocess.run(program, cwd=place, capture_output=True, check=True)
                if turn:  # the first one compiles kernels, and reads files into memory
                    seconds.append(time.perf_counter() - begin)
    ours, script = map(statistics.median, spent)
    found = {"name": "cold start", "s": round(ours, 2), "script_s": round(script, 2)}
    return found | {"ratio": round(ours / script, 2), "wanted": 1.2}


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _resident(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="'cold start' is one, too")
    parser.add_argument("--seconds", type=float, help="of a row, about")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        (row,) = (row for row in ROWS if row.name == arguments.memory[0])
        sys.stdout.write(f"{training_memory(row, arguments.memory[1] == 'ours')}\n")
        return 0
    several = len(arguments.threads) > 1
    rows = [row for row in ROWS if row.scales or not several]
    if arguments.rows:
        rows = [row for row in ROWS if row.name in arguments.rows]
    seconds = arguments.seconds or (5.0 if several else 10.0)
    found = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for row in rows:
            found.append(measure(row, seconds, memory=not several))
            sys.stdout.write(json.dumps(found[-1]) + "\n")
            sys.stdout.flush()
    starts = [] if several or (arguments.rows and "cold start" not in arguments.rows) else [0]
    found += [cold_start() for _ in starts]
    told = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "timm", "numba")},
        "rows": found,
    }
    sys.stdout.write(json.dumps({key: told[key] for key in told if key != "rows"}) + "\n")
    if starts:
        sys.stdout.write(json.dumps(found[-1]) + "\n")
    if arguments.out:
        arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    return int(not all(row.get("within", True) for row in found))


if __name__ == "__main__":
    sys.exit(main())
