"""timm's ViT-T trained by timm's loader and by ours: one captured step, one recipe.

    python measurements/vit_loop.py [--images 30000] [--batch 128] [--workers 16] [--epochs 3]
        [--feeds step timm cpu gpu] [--fit auto] [--root FOLDER] [--out FILE.json]

JPEG files of 500 x 375 pixels are made first, unless `--root` has class folders. Every feed trains
a model of its own on batches of the ImageNet recipe (crop, flip, RandAugment, erasing), mixed by
timm's Mixup, in bfloat16 autocast: forward and backward pass captured as CUDA graphs, soft cross
entropy, fused AdamW. The feeds are

    step  one batch that lies on the device, again and again
    timm  `create_loader` with its prefetcher
    cpu   `fastvim.data.ImageData(decode="cpu")`
    gpu   `fastvim.data.ImageData(decode="gpu")`

Images/s are of whole epochs, from the second one on, beside the share of the last one in which the
host waits for batches. `--fit DECODE` also runs `fastvim fit` with FastVim-T's recipe on the same
files; what its lines tell of the last 100 batches is in the JSON. On a CPU nothing is captured:

    python measurements/vit_loop.py --images 32 --batch 8 --workers 1 --epochs 2
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from loader import theirs
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from fastvim.benchmark.photographs import draw_folders
from fastvim.benchmark.record import device_name, environment
from fastvim.data.images import ImageData
from fastvim.graphed import GraphedModel
from fastvim_cli.train.fitting import SWITCH

CLASSES = 1000
RECIPE = Path(__file__).parents[1] / "recipes" / "imagenet" / "fastvim_tiny.yaml"
# A line of fit: the images/s of the last batches, the percentage of waiting, seconds.
TOLD = re.compile(
    r"^epoch +\d+/.*?(?: ([\d,]+) images/s(?:, waiting (\d+) %)?)?   ([\d.]+) s$", re.M
)


class Step:
    """A training step of the recipe; a captured one on a GPU."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES).to(device).train()
        self.run, self.device = GraphedModel(model), device
        self.mixup = Mixup(0.8, 1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=CLASSES)
        self.loss = SoftTargetCrossEntropy()
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=fused or None)

    def __call__(self, images: Tensor, classes: Tensor) -> Tensor:
        images, target = self.mixup(images, classes)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.run(images)
        loss = self.loss(logits.float(), target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def same(batch: int, device: torch.device, count: int) -> list[tuple[Tensor, Tensor]]:
    classes = torch.arange(batch, device=device)
    return [(torch.randn(batch, 3, 224, 224, device=device), classes)] * count


def ours(root: Path, batch: int, workers: int, device: torch.device, decode: Any) -> Any:
    data = ImageData(str(root), batch_size=batch, num_workers=workers, decode=decode)
    # The data go to the trainer's device.
    data.trainer = L.Trainer(
        accelerator=device.type, devices=1, logger=False, enable_checkpointing=False
    )
    data.opened("train")
    return data.train_dataloader()


def train(loader: Iterable[Any], step: Step, epochs: int) -> list[dict[str, float]]:
    """Train for some epochs; of each images/s, the share of waiting, and the last loss."""
    told = []
    for epoch in range(epochs):
        sampler = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        count, waited, begun = 0, 0.0, time.perf_counter()
        asked, batches = begun, iter(loader)
        while (batch := next(batches, None)) is not None:
            waited += time.perf_counter() - asked
            if batch[0].is_cuda:  # timm makes it on another stream
                for each in batch:
                    each.record_stream(torch.cuda.current_stream())
            loss = step(*batch)
            count += len(batch[0])
            asked = time.perf_counter()
        value = float(loss)  # waits for the GPU
        assert math.isfinite(value), f"a loss of {value}"
        seconds = time.perf_counter() - begun
        told.append({"images/s": count / seconds, "waiting": waited / seconds, "loss": value})
    assert step.run.captured or step.device.type == "cpu", step.run.reason
    return told


def fit(root: Path, arguments: argparse.Namespace, decode: str) -> list[dict[str, Any]]:
    """`fastvim fit` with FastVim-T; images/s of each whole epoch, and what its line tells."""
    words = f"""fit --config {RECIPE} --data.root {root} --data.batch_size {arguments.batch}
        --data.num_workers {arguments.workers} --data.decode {decode} --trainer.devices 1
        --trainer.max_epochs {arguments.epochs} --trainer.limit_val_batches 0
        --trainer.default_root_dir {arguments.work / f"fit_{decode}"}"""
    command = [sys.executable, "-m", "fastvim_cli", *words.split()]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    print(done.stderr, end="")  # noqa: T201
    files = sum(len(found) for _, _, found in os.walk(root / "train"))
    images = files // arguments.batch * arguments.batch
    told: list[dict[str, Any]] = []
    for rate, waiting, seconds in TOLD.findall(done.stdout):
        last = float(rate.replace(",", "")) if rate else None
        share = int(waiting) / 100 if waiting else None
        told.append({"images/s": images / float(seconds), "waiting": share, "told": last})
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"images": 30_000, "batch": 128, "workers": 16, "epochs": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--feeds", nargs="*", default=["step", "timm", "cpu", "gpu"])
    parser.add_argument("--fit", nargs="*", default=[], metavar="DECODE", help="auto, cpu, gpu")
    parser.add_argument("--root", type=Path, help="with train/CLASS and, for --fit, val/CLASS")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/vit_loop"))
    arguments = parser.parse_args()
    batch, epochs, workers = arguments.batch, arguments.epochs, arguments.workers
    if epochs < 2:
        parser.error("--epochs: expected 2 or more, as the first one does not count")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    sys.setswitchinterval(SWITCH)  # as fit does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":  # the default stream waits for the loaders', and they for it
        torch.cuda.set_stream(torch.cuda.Stream())
    root, sizes = arguments.root, [0]
    if root is None:
        root = arguments.work / f"images_{arguments.images}"
        sizes = draw_folders(root, {"train": arguments.images, "val": 2 * batch})

    record: dict[str, Any] = {
        "device": device_name(device),
        **environment(shlex.join(["python", *sys.argv]), {}),
        "cores": len(os.sched_getaffinity(0)),
        "bytes a file": round(statistics.mean(sizes)),
        **{key: value for key, value in vars(arguments).items() if isinstance(value, int)},
        "feeds": {},
    }
    for name in [*arguments.feeds, *(f"fit {decode}" for decode in arguments.fit)]:
        if name.startswith("fit "):
            found = fit(root, arguments, name.removeprefix("fit "))
        elif name == "step":
            found = train(same(batch, device, arguments.images // batch), Step(device), epochs)
        elif name == "timm":
            found = train(theirs(root, batch, workers, device), Step(device), epochs)
        else:
            found = train(ours(root, batch, workers, device, name), Step(device), epochs)
        gc.collect()  # ends the loader's processes, frees the graphs
        rate = statistics.harmonic_mean(each["images/s"] for each in found[1:])
        record["feeds"][name] = {"images/s": rate, "epochs": found}
        every = ", ".join(f"{each['images/s']:,.0f}" for each in found)
        waiting = found[-1]["waiting"]
        share = "" if waiting is None else f", waiting {waiting:.0%}"
        print(f"{name:10} {rate:8,.0f} images/s{share} (epochs: {every})", flush=True)  # noqa: T201
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
