"""The CPU scan, forward and with its gradients: the numba kernel against the PyTorch reference.

    python measurements/cpu_scan.py [--out measurements/cpu_scan.json]

Checks outputs and gradients against float64 first; then medians of the time of one call.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from fastvim.ops import selective_scan, use_engine

SHAPES = [
    (steps, batch, width)
    for steps, batch in ((14, 16), (196, 4), (1024, 1))
    for width in (384, 768)
]
ENGINES = ("numba", "reference")


def inputs(steps: int, batch: int, width: int, state: int = 16) -> list[Tensor]:
    """Random inputs with the statistics of an initial layer; see `selective_scan` for shapes."""
    rank = width // 32
    tensors = [
        torch.randn(2, batch, steps, width),
        torch.randn(2, rank + 2 * state, width) * width**-0.5,
        torch.randn(2, width, rank) * rank**-0.5,
        torch.randn(2, width) - 4,
        torch.arange(1.0, state + 1).log().expand(2, width, state).clone(),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def values(tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    y = selective_scan(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, upstream)]


def check(steps: int, width: int) -> float:
    """Largest relative error of the numba engine against float64, over output and gradients."""
    tensors = inputs(steps, 2, width)
    upstream = torch.randn(2, 2, steps, width)
    exact = values([t.detach().double().requires_grad_() for t in tensors], upstream.double())
    with use_engine("numba"):
        ours = values(tensors, upstream)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))


def measure(tensors: list[Tensor], gradients: bool, repeats: int) -> float:
    """Median milliseconds of one call."""
    upstream = torch.randn_like(tensors[0])
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        if gradients:
            torch.autograd.grad(selective_scan(*tensors), tensors, upstream)
        else:
            with torch.no_grad():
                selective_scan(*tensors)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    error = max(check(steps, 100) for steps in (14, 63, 196))
    assert error < 1e-5, f"wrong by {error:.1e}"
    print(f"largest relative error against float64: {error:.1e}")  # noqa: T201

    rows = []
    for steps, batch, width in SHAPES:
        row: dict[str, object] = {"steps": steps, "batch": batch, "width": width}
        for engine in ENGINES:
            with use_engine(engine):
                tensors = inputs(steps, batch, width)
                row[f"{engine}_forward_ms"] = measure(tensors, False, arguments.repeats)
                row[f"{engine}_training_ms"] = measure(tensors, True, arguments.repeats)
        rows.append(row)
        text = "  ".join(
            f"{kind}: {row[f'numba_{kind}_ms']:8.2f} ms for {row[f'reference_{kind}_ms']:8.2f} "
            f"({row[f'reference_{kind}_ms'] / row[f'numba_{kind}_ms']:4.1f} times)"
            for kind in ("forward", "training")
        )
        print(f"steps {steps:5} batch {batch:3} width {width:4}   {text}")  # noqa: T201
    if arguments.out:
        record = {
            "command": "python measurements/cpu_scan.py --out measurements/cpu_scan.json",
            "device": processor(),
            "threads": torch.get_num_threads(),
            "dtype": "float32",
            "versions": {name: version(name) for name in ("torch", "numba", "numpy")},
            "relative_error": error,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
