"""Full disks, lost workers, vanished files: one line, nothing lost, and the run goes on afterwards.

`make test-faults` runs all draws.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fuzzing import Ended, groups
from small import COMMANDS, Small, fresh, half_written
from tally import Tally
from vanishing import GONE

DISKS, DISKS_IN_ALL = 70, 2
WORKERS, WORKERS_IN_ALL = 20, 0
FILES, FILES_IN_ALL = 20, 2


def fill(disk: Path, room: int) -> Path:
    """A file that leaves so many bytes of a disk."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        free = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - room, 1))
    return ballast


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("seeds", groups(DISKS, DISKS_IN_ALL, size=2))
def test_full_disks(seeds, small, record_property):
    if small.warm.disk is None:
        pytest.skip("needs a file system of its own: unshare --map-root-user --mount")
    tally, disk = Tally(), small.warm.disk
    for seed in seeds:
        command = ("fit", *COMMANDS)[seed % (1 + len(COMMANDS))]
        small.unharmed(command)
        whole = size(small.folder / "unharmed" / command)
        ballast = fill(disk, int(np.random.default_rng(seed).integers(1.1 * whole)))
        folder = fresh(disk / command)
        ended = small.warm.run(*small.words(command), cwd=small.warm.folder / "disk" / command)
        problems = list(ended.problems)
        if ended.code and "the disk is full" not in ended.stderr:
            problems.append(f"{ended}")
        # What it left goes on elsewhere.
        shutil.rmtree(small.folder / "elsewhere", ignore_errors=True)
        elsewhere = Path(shutil.copytree(folder, small.folder / "elsewhere"))
        problems += half_written(elsewhere) + small.ends_well(command, elsewhere)
        tally.count(f"{command}, disk full", seed, problems)
        shutil.rmtree(folder)
        ballast.unlink()
    tally.record(record_property)


def harmed(small: Small, folder: Path, data: str, **options: Any) -> Ended:
    """Train with a class of data that does harm."""
    config = yaml.safe_load(small.recipe.read_text())
    config["data"]["class_path"] = data
    config["data"]["init_args"] |= options
    (folder / "harmed.yaml").write_text(yaml.safe_dump(config))
    return small.warm.run("fit", "--config", "harmed.yaml", cwd=folder)


@pytest.mark.parametrize("seeds", groups(WORKERS, WORKERS_IN_ALL, size=2))
def test_lost_workers(seeds, small, record_property):
    tally = Tally()
    for seed in seeds:
        rng, role = np.random.default_rng(seed), ("train", "val")[seed % 2]
        folder = fresh(small.folder / "lost_worker")
        index = int(rng.integers({"train": 48, "val": 6}[role]))
        lost = {"name": "SIGKILL", "role": role, "index": index, "num_workers": 1}
        ended = harmed(small, folder, "lost_workers.SignalledData", **lost)
        problems = ended.problems + half_written(folder)
        if ended.code != 1 or "worker" not in ended.stderr:
            problems.append(f"not named: {ended}")
        problems += small.ends_well("fit", folder)
        tally.count("worker lost", seed, problems)
    tally.record(record_property)


@pytest.mark.parametrize("seeds", groups(FILES, FILES_IN_ALL, size=2))
def test_vanished_files(seeds, small, record_property):
    tally = Tally()
    for seed in seeds:
        rng, role = np.random.default_rng(seed), ("train", "val")[seed % 2]
        folder = fresh(small.folder / "vanished")
        shutil.copytree(small.images, folder / "images")
        files = sorted((folder / "images" / role).rglob("*.png"))
        one = bool(rng.integers(2))
        path = files[rng.integers(len(files))] if one else folder / "images" / role
        index = int(rng.integers(len(files)))
        options = {"root": "images", "path": str(path), "role": role, "index": index}
        ended = harmed(small, folder, "vanishing.VanishingData", **options)
        problems = ended.problems + half_written(folder / "run")
        gone = path.with_name(path.name + GONE)
        if gone.exists():
            gone.rename(path)
        named = path.name in ended.stderr
        if ended.code and not named:
            problems.append(f"not named: {ended}")
        if ended.code or not named:  # a training image that is named has another in its place
            problems += small.ends_well("fit", folder)
        tally.count(f"{'file' if one else 'folder'} vanished", seed, problems)
    tally.record(record_property)
