"""`fastvim predict` over files, decoded by Pillow and by the GPU, beside a loop over timm's loader.

    python measurements/predict.py [--images 10000] [--model fastvim_tiny_patch16_224] [--rounds 3]
        [--out measurements/predict.json] [--work /tmp/predict]

JPEG files of 500 x 375 pixels are made first. The three take turns on one GPU with all cores,
timm's with the model captured likewise. Images/s count from the first half of the images on, when
what was read during the start is used up; medians, with what the command says of its waiting. Of
the two ways to decode, the largest difference of a probability is told, among the best five classes
of an image that both name; the random head is made so strong that the best one has about a half.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from devices import PART, predict, rows
from timm.data import create_dataset, create_loader

from fastvim.benchmark.photographs import draw_photograph
from fastvim.benchmark.record import device_name
from fastvim.inference import Predictor
from fastvim.models import create_model
from fastvim.weights import save

WAYS = {"Pillow": "cpu", "GPU": "gpu"}
BATCH, STRENGTH = 128, 60.0  # the command's own on a GPU; of the head


def of_second_half(times: list[float], images: int) -> float:
    """Images/s from the first half on; the times at which equal shares of them were done."""
    times, middle = sorted(times), len(times) // 2
    return images / len(times) * (len(times) - 1 - middle) / (times[-1] - times[middle])


def by_command(
    words: list[str], out: Path, decode: str, cores: int, images: int
) -> tuple[float, str]:
    """Images/s, and what the command says of its waiting."""
    shutil.rmtree(out, ignore_errors=True)
    said = predict([*words, "--decode", decode], out, cores, 1)["said"]
    times = sorted(path.stat().st_mtime for path in (out / "parts").glob("part-*"))
    return of_second_half(times[: images // PART], images // PART * PART), said


def by_timm(model: torch.nn.Module, folder: Path, cores: int, images: int) -> float:
    settings: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 0.875, "pin_memory": True}
    run = Predictor(model.cuda(), (BATCH, 3, 224, 224), dtype=torch.float32)
    files, size, times = create_dataset("", root=str(folder)), (3, 224, 224), []
    for batch, _ in create_loader(files, size, BATCH, num_workers=cores, **settings):
        run(batch).softmax(-1).topk(5).values.cpu()
        times.append(time.perf_counter())
    return of_second_half(times[: images // BATCH], images // BATCH * BATCH)


def apart(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> dict[str, float]:
    """How far the probabilities of the same classes are apart, and whose best class is another."""
    most, other = 0.0, 0
    for a, b in zip(one, two, strict=True):
        assert a["file"] == b["file"]
        known = {entry["index"]: entry["probability"] for entry in a["top"]}
        both = [entry for entry in b["top"] if entry["index"] in known]
        most = max([most, *(abs(e["probability"] - known[e["index"]]) for e in both)])
        other += a["index"] != b["index"]
    best = statistics.median(row["probability"] for row in one)
    return {"largest": most, "other best class": other, "median of the best": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--model", default="fastvim_tiny_patch16_224")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/predict"))
    arguments = parser.parse_args()
    folder, count = arguments.work / "images", arguments.images
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        sizes = list(pool.map(partial(draw_photograph, folder), range(count), chunksize=50))
    torch.manual_seed(0)
    model = create_model(arguments.model).eval()
    model.get_classifier().weight.data.mul_(STRENGTH)
    weights = arguments.work / "model.safetensors"
    save(weights, model.state_dict(), {"model": arguments.model, "model_args": {}})

    cores, rates = len(os.sched_getaffinity(0)), {name: [] for name in (*WAYS, "timm")}
    said: dict[str, list[str]] = {name: [] for name in WAYS}
    words = ["--model", str(weights), str(folder)]
    for turn in range(arguments.rounds):
        for name, decode in WAYS.items():
            out = arguments.work / f"{decode}{turn}"
            rate, told = by_command(words, out, decode, cores, count)
            rates[name].append(rate)
            said[name].append(told)
        rates["timm"].append(by_timm(model, folder, cores, count))
    medians = {name: statistics.median(each) for name, each in rates.items()}
    record = {
        "device": device_name(torch.device("cuda")),
        "torch, timm": (torch.__version__, timm.__version__),
        "cores": cores,
        "bytes a file": sum(sizes) // count,
        "model": arguments.model,
        "images/s": medians,
        "of timm's": {name: medians[name] / medians["timm"] for name in WAYS},
        "all": rates,
        "says": said,
        "probabilities": apart(*(rows(arguments.work / f"{way}0") for way in WAYS.values())),
    }
    print(json.dumps(record, indent=1))  # noqa: T201
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
