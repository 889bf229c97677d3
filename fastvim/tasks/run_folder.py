"""The folder of a run: its newest checkpoint, and whether the run is started again.

A run has a name, which its checkpoints hold and the file `.run` in its folder: a second run in the
same folder is another one, although it may be at an earlier step.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvim.errors import UserError
from fastvim.storage import write_text
from fastvim.weights.unpickle import read_pickled

_FILE = ".run"
RUN = "run"  # key of a checkpoint, and of the file
# How often a scheduler has started a job or its processes again.
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class Saved:
    """A checkpoint, without its weights.

    Attributes:
        path: of the file.
        run: name of its run; None where it is not told.
        step: optimiser steps done; infinite where the file cannot be read.
        batches: training batches done.
        changed: when the file was written, in seconds.
    """

    path: Path
    run: str | None
    step: float
    batches: int
    changed: float


def newest(root: Path, run: str | None = None) -> list[Saved]:
    """The checkpoints named `last` of a run, and Lightning's `hpc_ckpt_*`, from the newest on.

    The newest has done the most steps, then the most batches. One that cannot be read comes first:
    who reads it says so.

    Args:
        root: folder of the run.
        run: its name; None takes the run that wrote last.
    """
    found = sorted(map(_read, _files(root)), key=lambda each: each.changed)
    named = [each.run for each in found if each.run is not None]
    run = run or (named[-1] if named else None)
    own = [each for each in found if each.run in (None, run)]
    return sorted(own, key=lambda each: (each.step, each.batches, each.changed), reverse=True)


def name_of(root: Path, checkpoint: str | None) -> str | None:
    """The name of the run that goes on from a checkpoint; None if that begins a run.

    One that goes on from its newest checkpoint keeps its name. One that goes back to an earlier
    one, or to a file elsewhere, is another run, or what it has left behind would be its newest.
    """
    if checkpoint is None:
        return None
    for each in _files(root):
        if each.samefile(checkpoint):
            run = _read(each).run
            latest = newest(root, run)
            return run if latest[0].path.samefile(checkpoint) else None
    return None


def begin(root: Path, run: str, token: str) -> None:
    """Say that a run begins in a folder, or begins again.

    Args:
        root: the folder.
        run: name of the run.
        token: of this start, which the other processes look for.
    """
    write_text(root / _FILE, json.dumps({RUN: run, "token": token}))


def has_begun(root: Path, token: str) -> bool:
    """Whether this process sees the start that `begin` has told."""
    return _told(root).get("token") == token


def requeued(root: Path, job: str) -> None:
    """Say that a run goes on when SLURM starts its job again."""
    write_text(root / _FILE, json.dumps({**_told(root), "requeued": job}))


def started_again(
    root: Path, count: int, variables: Mapping[str, str] = os.environ
) -> list[Saved] | None:
    """The checkpoints of a run that its scheduler has started again; None in a first start.

    torchrun and SLURM count their restarts (`restarts`), torchrun on each machine by itself.
    `requeued` has told the job that this library put back into the queue. Lightning's checkpoints
    of such a job are known by their names.

    Args:
        root: folder of the run.
        count: of restarts, the largest of all processes.
        variables: of the environment.
    """
    told, job = _told(root), variables.get("SLURM_JOB_ID")
    if count or (job is not None and told.get("requeued") == job):
        return newest(root, told.get(RUN))
    if job is not None and any(root.glob("hpc_ckpt_*.ckpt")):
        return newest(root)
    return None


def restarts(variables: Mapping[str, str] = os.environ) -> int:
    """How often torchrun or SLURM has started these processes again."""
    counts = (variables.get(name, "") for name in _RESTARTS)
    return sum(int(count) for count in counts if count.isdecimal())


def _told(root: Path) -> dict[str, str]:
    try:
        told = json.loads((root / _FILE).read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _files(root: Path) -> Iterator[Path]:
    yield from (root / "checkpoints").glob("last*.ckpt")
    yield from root.glob("hpc_ckpt_*.ckpt")


def _read(path: Path) -> Saved:
    changed = path.stat().st_mtime
    try:
        content: dict[str, Any] = read_pickled(path, mmap=True)
        progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        step, batches = int(content["global_step"]), int(progress["processed"])
    except (UserError, KeyError, TypeError, ValueError):
        return Saved(path, None, math.inf, 0, changed)
    return Saved(path, content.get(RUN), step, batches, changed)
