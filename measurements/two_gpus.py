"""Training on two GPUs beside one: the same numbers, and how many images a second.

    python measurements/two_gpus.py [--out measurements/two_gpus.json] [--work /tmp/two_gpus]
        [--only "one, memory" fsdp2]

Every run is `fastvim fit` on images drawn here. First FastVim-B is timed on one GPU whose kernels
are not compiled yet, again on one, then on two: started by `--trainer.devices 2` and by `torchrun`,
from files and from memory, and without the gradients' exchange. Then FastVim-T trains for 20 steps
in float32 (no TF32, drop-path or Mixup) on one GPU, on two with `ddp` and on two with `fsdp2`, the
same 64 images a step. Exit code 1 if the first gradient or the weights after SGD differ by more
than 1e-5 of their norm, or a loss of AdamW by more than 1e-3 of itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, optim
from torch.utils.data import DataLoader

from fastvim.benchmark.record import device_name
from fastvim.tasks import Classification
from fastvim.tasks.sharding import local, whole

CLASSES, STEPS, BATCH = 16, 60, 128  # steps of a timed epoch; images on a GPU
IMAGES = 2 * STEPS * BATCH
EXACT_STEPS, EXACT_BATCH = 20, 64  # images over all GPUs
EPOCHS = 3
LIMITS = {"gradient": 1e-5, "sgd_weights": 1e-5, "adamw_losses": 1e-3}
STREAMS = "AccumulateGrad"  # what torch's warning of mismatched streams names


class SGDTask(Classification):
    """A classifier trained by plain SGD: differences of the gradients do not grow."""

    def make_optimizer(self) -> optim.Optimizer:
        assert self.model is not None
        return optim.SGD(self.model.parameters(), lr=self.peak_lr, momentum=0.9)


class Memory(L.LightningDataModule):
    """One batch of random images, again and again, without reading or decoding."""

    num_classes, seed, value_range = CLASSES, 0, None
    class_names = [str(each) for each in range(CLASSES)]  # noqa: RUF012
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, batch_size: int = BATCH) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(BATCH, 3, 224, 224, generator=generator).pin_memory()
        batch = (images, torch.randint(CLASSES, (BATCH,), generator=generator).pin_memory())
        return DataLoader([batch] * STEPS, batch_size=None)


class Record(L.Callback):
    """Writes the first gradient, the losses and the weights of a run, and its times.

    Args:
        file: where to, by the first process.
        exchange: False keeps every process's gradients to itself.
    """

    def __init__(self, file: str, exchange: bool = True) -> None:
        self.file, self.exchange = file, exchange
        self.seconds: list[float] = []
        self.losses: list[Tensor] = []
        self.gradient: Tensor | None = None
        self.first_step = 0.0
        self.compiled: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if not self.exchange:
            trainer.strategy.model.require_backward_grad_sync = False
        import triton

        def heard(**event: Any) -> None:
            if not event["cache_hit"]:
                self.compiled.append(event["times"].total / 1e6)

        triton.knobs.compilation.listener = heard

    def on_train_epoch_start(self, *args: Any) -> None:
        torch.cuda.synchronize()
        self.start = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.gradient is None and trainer.max_steps == EXACT_STEPS:
            gradients = [each.grad for each in pl_module.model.parameters()]
            self.gradient = torch.cat([whole(each).flatten().cpu() for each in gradients])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach())
        if not self.first_step:
            torch.cuda.synchronize()
            self.first_step = time.perf_counter() - self.start

    def on_train_epoch_end(self, *args: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        losses = trainer.strategy.reduce(torch.stack(self.losses), reduce_op="mean")
        weights = [each.detach() for each in pl_module.model.parameters()]
        held = sum(local(each).numel() for each in weights)
        found = {
            "gradient": self.gradient,
            "losses": losses.cpu(),
            "weights": torch.cat([whole(each).flatten().cpu() for each in weights]),
            "held": held / sum(each.numel() for each in weights),
            "seconds": self.seconds,
            "first_step": self.first_step,
            "compiled": [len(self.compiled), sum(self.compiled)],
            "gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        if trainer.is_global_zero:
            torch.save(found, self.file)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def draw(folder: Path, index: int) -> None:
    """An image of 256 pixels: smooth noise whose colour follows from its class. Some validate."""
    generator = np.random.default_rng(index)
    target = (
        folder / ("train" if index < IMAGES else "val") / f"{index % CLASSES:02}" / f"{index}.jpg"
    )
    pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels[..., index % 3] //= 1 + index % CLASSES
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(target, quality=90)


def recipe(work: Path, name: str, *, model: str, batch: int, devices: int, **changes: Any) -> Path:
    """The configuration of a run that writes `NAME.pt`; dotted keys change values."""
    task = {"model": model, "num_classes": CLASSES, "warmup_epochs": 0, "ema_decay": 0.9999}
    record = {"class_path": "two_gpus.Record", "init_args": {"file": str(work / f"{name}.pt")}}
    data = {"root": str(work / "images"), "batch_size": batch, "num_workers": 14}
    config: dict[str, Any] = {
        "model": {"class_path": "fastvim.tasks.Classification", "init_args": task},
        "data": {"class_path": "fastvim.data.images.ImageData", "init_args": data},
        "trainer": {
            "default_root_dir": str(work / name),
            "devices": devices,
            "precision": "bf16-mixed",
            "max_epochs": EPOCHS,
            "limit_train_batches": STEPS,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "callbacks": [record],
        },
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def start(work: Path, name: str, gpus: str, torchrun: bool, **changes: Any) -> subprocess.Popen:
    """Start `fastvim fit` on some GPUs, its output in `NAME.log`."""
    devices = len(gpus.split(","))
    file = recipe(work, name, devices=devices, **changes)
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m"]
    command = [sys.executable, "-m", *(launcher if torchrun else []), "fastvim_cli", "fit"]
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": paths}
    environment |= {"OMP_NUM_THREADS": "1"}
    if changes.get("trainer__precision") == "32-true":
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    with (work / f"{name}.log").open("w") as log:
        words = [*command, "--config", str(file)]
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment)


def finish(work: Path, name: str, process: subprocess.Popen) -> dict[str, Any]:
    """What a run has recorded, and how often its log has torch's warning of streams."""
    process.wait()
    log = (work / f"{name}.log").read_text()
    if process.returncode:
        say(f"{name}: exit code {process.returncode}\n{log[-3000:]}")
        return {}
    return {**torch.load(work / f"{name}.pt"), "streams": log.count(STREAMS)}


def timed(work: Path, only: list[str]) -> list[dict[str, Any]]:
    """Images a second of FastVim-B, of all runs or of those named."""
    base = {"model": "fastvim_base_patch16_224", "batch": BATCH}
    memory = {"data": {"class_path": "two_gpus.Memory", "init_args": {"batch_size": BATCH}}}
    apart = {"file": str(work / "two, memory, no exchange.pt"), "exchange": False}
    alone = {"trainer__callbacks": [{"class_path": "two_gpus.Record", "init_args": apart}]}
    sharded = {"trainer__strategy": "fsdp2"}
    runs: list[tuple[str, str, bool, dict[str, Any]]] = [
        ("one, cold", "0", False, {}),
        ("one", "0", False, {}),
        ("two", "0,1", False, {}),
        ("two, torchrun", "0,1", True, {}),
        ("one, memory", "0", False, memory),
        ("two, memory", "0,1", False, memory),
        ("two, memory, no exchange", "0,1", False, {**memory, **alone}),
        ("two, memory, fsdp2", "0,1", False, {**memory, **sharded}),
    ]
    rows = []
    for name, gpus, torchrun, changes in runs:
        if only and name not in only:
            continue
        began = time.perf_counter()
        found = finish(work, name, start(work, name, gpus, torchrun, **base, **changes))
        if not found:
            continue
        images = STEPS * BATCH * len(gpus.split(","))
        keys = ("seconds", "first_step", "compiled", "streams", "gib", "held")
        row = {"run": name, "images_per_second": images / min(found["seconds"][1:])}
        rows.append({**row, **{key: found[key] for key in keys}})
        rows[-1]["whole_command"] = time.perf_counter() - began
        say(json.dumps(rows[-1]))
    return rows


def compared(work: Path, strategies: list[str]) -> dict[str, dict[str, float]]:
    """Relative differences from one GPU, of two with each strategy."""
    plain = {"mixup": 0.0, "cutmix": 0.0, "ema_decay": None, "model_args": {"drop_path_rate": 0.0}}
    changes: dict[str, Any] = {
        "model": "fastvim_tiny_patch16_224",
        "trainer__precision": "32-true",
        "trainer__max_steps": EXACT_STEPS,
        "trainer__max_epochs": -1,
        "data__init_args__num_workers": 4,
        **{f"model__init_args__{key}": value for key, value in plain.items()},
    }
    started, found = {}, {}
    for kind, task in (("sgd", "two_gpus.SGDTask"), ("adamw", "fastvim.tasks.Classification")):
        for strategy in ("one", *strategies):
            gpus = "0" if strategy == "one" else "0,1"
            own = {**changes, "model__class_path": task, "batch": EXACT_BATCH}
            if kind == "sgd":
                own["model__init_args__lr"] = 0.4  # of 512 images
            if strategy != "one":
                own |= {"trainer__strategy": strategy, "batch": EXACT_BATCH // 2}
            name = f"{kind}, {strategy}"
            started[name] = start(work, name, gpus, False, **own)
            if strategy == "one" and kind == "sgd":
                time.sleep(20)  # its kernels are compiled, or are being so
    for name, process in started.items():
        found[name] = finish(work, name, process)
    result = {}
    for strategy in strategies:
        runs = [found[f"{kind}, {run}"] for kind in ("sgd", "adamw") for run in ("one", strategy)]
        if not all(runs):
            continue
        (sgd, theirs, adamw, others) = runs
        result[strategy] = {
            "gradient": difference(theirs["gradient"], sgd["gradient"]),
            "sgd_weights": difference(theirs["weights"], sgd["weights"]),
            "adamw_losses": float(
                ((others["losses"] - adamw["losses"]) / adamw["losses"]).abs().max()
            ),
            "sgd_losses": float(((theirs["losses"] - sgd["losses"]) / sgd["losses"]).abs().max()),
            "held": theirs["held"],
        }
        say(f"{strategy} {json.dumps(result[strategy])}")
    return result


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The norm of a difference beside the norm."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/two_gpus"))
    parser.add_argument("--only", nargs="*", default=[], help="names of timed runs, and strategies")
    arguments = parser.parse_args()
    strategies = [each for each in ("ddp", "fsdp2") if each in arguments.only or not arguments.only]
    work: Path = arguments.work
    for split, index in product(("train", "val"), range(CLASSES)):
        (work / "images" / split / f"{index:02}").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(draw, work / "images"), range(IMAGES + CLASSES), chunksize=64))
    os.environ.setdefault("TRITON_CACHE_DIR", str(work / "triton"))
    record: dict[str, Any] = {
        "device": device_name(torch.device("cuda")),
        "torch": torch.__version__,
    }
    record |= {"steps": STEPS, "batch_a_gpu": BATCH, "exact_batch": EXACT_BATCH}
    record["rows"] = timed(work, arguments.only)
    record["differences"] = compared(work, strategies)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        say(f"{row['run']:<26} {row['images_per_second']:8.0f} images/s   {row['seconds']}")
    good = len(record["differences"]) == len(strategies)
    for found in record["differences"].values():
        good &= all(found[name] <= limit for name, limit in LIMITS.items())
    say("within the limits" if good else "NOT within the limits")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
