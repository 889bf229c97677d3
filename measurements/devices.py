"""`fastvim predict` over files on two GPUs beside one: images/s after start-up.

    python measurements/devices.py [--images 10000] [--model fastvim_base_patch16_224]
        [--out measurements/devices.json] [--work /tmp/devices]

JPEG files of 500 x 375 pixels are made first. One GPU gets half of the cores, two get all. Both run
in turns, three times, and the median counts, of the time in which all processes compute. Ends with
1 where the two disagree: other paths, errors or order, or a probability by more than 1e-5 (with the
same rows a batch on the same kind of GPU they should be equal).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvim.benchmark.photographs import draw_photograph
from fastvim.benchmark.record import device_name
from fastvim.models import create_model
from fastvim.weights import save

PART, LIMIT = 256, 1e-5  # rows of a part; the largest difference of a probability


def predict(words: list[str], out: Path, cores: int, gpus: int) -> dict[str, Any]:
    """Run it; images/s while all processes compute, and what it says of its waiting.

    That is from the last of their first parts to the first of their last ones: process i of n has
    the parts i, i + n, …
    """
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    command = [sys.executable, "-m", "fastvim_cli", "predict", *words, "--out", str(out)]
    command += ["--part-size", str(PART), "--devices", str(gpus)]
    begun = time.time()
    done = subprocess.run(
        command,
        text=True,
        capture_output=True,
        preexec_fn=lambda: os.sched_setaffinity(0, chosen),
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    said = (done.stdout + done.stderr).splitlines()
    parts = sorted((out / "parts").glob("part-*"))
    times = [path.stat().st_mtime for path in parts]
    shares = [times[i::gpus] for i in range(gpus)]
    both = max(map(min, shares)), min(map(max, shares))
    rate = PART * sum(both[0] < each <= both[1] for each in times) / (both[1] - both[0])
    return {
        "rate": rate,
        "start": both[0] - begun,
        "whole": max(times) - begun,
        "said": next(line for line in said if "waited" in line),
    }


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").open()]


def difference(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> float:
    """The largest of a probability; infinite where other files or errors are listed."""
    keys = [[(row["file"], row.get("error")) for row in each] for each in (one, two)]
    if keys[0] != keys[1]:
        return float("inf")
    pairs = zip(one, two, strict=True)
    return max(abs(a["probability"] - b["probability"]) for a, b in pairs if "error" not in a)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--model", default="fastvim_base_patch16_224")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/devices"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", nargs="*", default=[], help="more options of predict")
    arguments = parser.parse_args()
    folder = arguments.work / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        sizes = list(
            pool.map(partial(draw_photograph, folder), range(arguments.images), chunksize=50)
        )
    weights = arguments.work / "model.safetensors"
    torch.manual_seed(0)
    model = create_model(arguments.model)
    save(weights, model.state_dict(), {"model": arguments.model, "model_args": {}})

    cores = len(os.sched_getaffinity(0))
    words = ["--model", str(weights), str(folder), *arguments.words]
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for turn, gpus in enumerate([1, 2] * arguments.rounds):
        out = arguments.work / f"out{turn}"
        runs[gpus].append(predict(words, out, cores if gpus == 2 else cores // 2, gpus))
        print(gpus, runs[gpus][-1], flush=True)  # noqa: T201
    rates = {gpus: statistics.median(run["rate"] for run in each) for gpus, each in runs.items()}
    apart = difference(rows(arguments.work / "out0"), rows(arguments.work / "out1"))
    told = {
        "device": device_name(torch.device("cuda")),
        "torch": torch.__version__,
        "cores": cores,
        "images": arguments.images,
        "bytes": sum(sizes) // len(sizes),
        "model": arguments.model,
        "one": {"rate": rates[1], "runs": runs[1]},
        "two": {"rate": rates[2], "runs": runs[2]},
        "times": rates[2] / rates[1],
        "apart": apart,
    }
    text = json.dumps(told, indent=1)
    print(text)  # noqa: T201
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return int(apart > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
