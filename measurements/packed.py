"""Opening and reading an image in a loading process: from folders and from a pack.

    python measurements/packed.py [--images 2000] [--rounds 15] [--out FILE] [--work /tmp/packed]

JPEG files of 500 x 375 pixels are made and packed first. One process reads all of them in an order
of its own each round, from both in turn, hot in the page cache: CPU time an image, the minimum and
the median of the rounds. Then the first half of the order after both have been dropped from the
cache: time an image, the smallest and the largest of three, image by image, and from the pack with
batches of 128 announced (`PackedFolders.read_ahead`). Last the CPU time of a whole sample of the
ImageNet recipe, hot, 40 images in each of 60 turns, from a pack of smaller images too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvim.benchmark.photographs import draw_folders
from fastvim.benchmark.record import device_name
from fastvim.data.folders import ClassFolders
from fastvim.data.images import ImageData
from fastvim.data.packed import PackedFolders
from fastvim.data.packing import pack
from fastvim.data.sampler import Seeded
from fastvim.data.splits import open_folder

BATCH = 128
SOME, TURNS = 40, 60  # images of a turn


def read(reader: ClassFolders, order: list[int], ahead: bool = False) -> None:
    for begin in range(0, len(order), BATCH):
        batch = order[begin : begin + BATCH]
        if ahead and isinstance(reader, PackedFolders):
            reader.read_ahead(batch)
        for index in batch:
            file, _ = reader[index]
            with file:
                file.read()


def augment(dataset: Seeded, order: list[int]) -> None:
    for index in order:
        dataset[index]


def spent(clock: Callable[[], float], work: Callable[[], None], number: int) -> float:
    """Microseconds an image."""
    begun = clock()
    work()
    return 1e6 * (clock() - begun) / number


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 1) if isinstance(value, float) else value


def drop(folder: Path) -> None:
    """Take the files of a folder out of the page cache; nobody has them mapped."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/packed"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    roots = {"folders": arguments.work / "folders", "pack": arguments.work / "pack"}
    size = sum(draw_folders(roots["folders"], {"train": arguments.images}, classes=20))
    pack(roots["folders"], roots["pack"])

    record: dict[str, Any] = {
        "device": device_name(torch.device("cpu")),
        "images": arguments.images,
        "rounds": arguments.rounds,
        "bytes a file": size // arguments.images,
    }
    order = list(range(arguments.images))
    readers = {name: open_folder(str(root), "train") for name, root in roots.items()}
    hot: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(arguments.rounds):
        random.shuffle(order)
        for name, reader in readers.items():
            hot[name].append(spent(time.process_time, partial(read, reader, order), len(order)))
    record["hot, CPU microseconds an image"] = {
        name: [min(each), statistics.median(each)] for name, each in hot.items()
    }
    cold: dict[str, list[float]] = {}
    del readers, reader
    for _ in range(3):
        random.shuffle(order)
        some = order[: len(order) // 2]
        for kind, name in (("folders", "folders"), ("pack", "pack"), ("pack, ahead", "pack")):
            drop(arguments.work)
            fresh = open_folder(str(roots[name]), "train")
            work = partial(read, fresh, some, kind == "pack, ahead")
            cold.setdefault(kind, []).append(spent(time.perf_counter, work, len(some)))
            del fresh, work
    record["cold, microseconds an image"] = {
        kind: [min(each), max(each)] for kind, each in cold.items()
    }
    smaller = arguments.work / "smaller"
    pack(roots["folders"], smaller, size=256)
    samples = {}
    for name, root in {**roots, "pack, --size 256": smaller}.items():
        samples[name] = Seeded(ImageData(str(root), num_workers=0).opened("train"), 0)
    whole: dict[str, list[float]] = {name: [] for name in samples}
    some = random.sample(order, min(SOME, len(order)))
    for turn in range(TURNS):
        for name in sorted(samples, reverse=bool(turn % 2)):
            work = partial(augment, samples[name], some)
            whole[name].append(spent(time.process_time, work, len(some)))
    record["sample, CPU microseconds an image"] = {
        name: [min(each), statistics.median(each)] for name, each in whole.items()
    }
    record["load"] = [round(value, 1) for value in os.getloadavg()]
    text = json.dumps(rounded(record), indent=1)
    print(text)  # noqa: T201
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
