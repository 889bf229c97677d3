"""The loader of class folders beside timm's with its prefetcher, the same work, on the CPU.

    python measurements/loader.py [--images 256] [--rounds 9] [--workers 2] [--out FILE]
        [--work /tmp/loader]

JPEG files of 500 x 375 pixels are made first. Both loaders run the ImageNet recipe: crop, flip,
RandAugment, normalisation and erasing, to batches of float32 images on the CPU. They take turns in
one process. CPU time of a worker is that of a loader with one worker, of all that it does; that of
the main process is of collecting and finishing the batches. Medians over the rounds; the ratio is
the median of the rounds' own ratios, as other work on the machine weighs on both turns alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader

from fastvim.benchmark.photographs import draw_folders
from fastvim.benchmark.record import device_name
from fastvim.data.finishing import CPU
from fastvim.data.images import ImageData
from fastvim.data.transforms import fix_posterize


class Stamped:
    """Collates a batch, and tells the CPU time that its process has used up to then."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> tuple[Any, float]:
        return self.collate(samples), time.process_time()


def ours(root: Path, batch: int, workers: int) -> Any:
    data = ImageData(str(root), batch_size=batch, num_workers=workers)
    data.setup("fit")
    return data.train_dataloader()


def theirs(root: Path, batch: int, workers: int, device: torch.device = CPU) -> Any:
    dataset = create_dataset("", root=str(root / "train"), split="train", is_training=True)
    loader = create_loader(
        dataset,
        input_size=(3, 224, 224),
        batch_size=batch,
        is_training=True,
        interpolation="bicubic",
        auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=0.0,
        re_prob=0.25,
        re_mode="pixel",
        num_workers=workers,
        pin_memory=device.type == "cuda",
        device=device,
    )
    fix_posterize(dataset.transform)  # Pillow 13 would end it
    return loader


LOADERS = {"ours": ours, "timm": theirs}


def worker_seconds(batches: Iterable[Any], batch: int) -> float:
    """CPU time of the only worker for an image, from the end of its first batch on."""
    stamps = [stamp for _, stamp in batches]
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1) / batch


def whole(loader: Any, batch: int) -> tuple[float, float]:
    """Images/s of an epoch, and CPU time of this process for an image."""
    begun, used, count = time.perf_counter(), time.process_time(), 0
    for images, _ in loader:
        assert images.shape == (batch, 3, 224, 224)
        assert images.dtype == torch.float32
        count += batch
    return count / (time.perf_counter() - begun), (time.process_time() - used) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/loader"))
    arguments = parser.parse_args()
    sizes = draw_folders(arguments.work, {"train": arguments.images, "val": arguments.images})
    batch = arguments.batch
    alone, several = {}, {}
    for name, make in LOADERS.items():
        loader = make(arguments.work, batch, 1)
        inner = getattr(loader, "loader", loader)  # timm's is wrapped by its prefetcher
        inner.collate_fn = Stamped(inner.collate_fn)
        alone[name] = inner
        several[name] = make(arguments.work, batch, arguments.workers)
        whole(several[name], batch)  # starts the workers
    found: dict[str, dict[str, list[float]]] = {name: {} for name in LOADERS}
    for turn in range(arguments.rounds):
        for name in sorted(LOADERS, reverse=bool(turn % 2)):
            rate, seconds = whole(several[name], batch)
            values = {"images/s": rate, "main process, ms an image": 1000 * seconds}
            batches = DataLoader.__iter__(alone[name])  # as they leave the worker
            values["worker, ms an image"] = 1000 * worker_seconds(batches, batch)
            for key, value in values.items():
                found[name].setdefault(key, []).append(value)

    record: dict[str, Any] = {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "load": [round(value, 1) for value in os.getloadavg()],
        "bytes a file": round(statistics.mean(sizes)),
        **{key: value for key, value in vars(arguments).items() if isinstance(value, int)},
    }
    for key, values in found["ours"].items():
        pairs = list(zip(values, found["timm"][key], strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        middle = {name: statistics.median(found[name][key]) for name in LOADERS}
        record[key] = {**middle, "ours / timm": ratio}
        print(f"{key}: {middle['ours']:.2f}, timm {middle['timm']:.2f}, ratio {ratio:.3f}")  # noqa: T201
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(record)  # noqa: T201


if __name__ == "__main__":
    main()
