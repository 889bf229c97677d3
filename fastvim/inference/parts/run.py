"""A run over any number of images: agree on a list, compute what is missing, collect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from fastvim.errors import UserError
from fastvim.inference.parts.collect import (
    check_table,
    collected,
    failures_in,
    write_table,
)
from fastvim.inference.parts.devices import compute_on_devices
from fastvim.inference.parts.loop import Report, Run, compute, readers, rows
from fastvim.inference.parts.manifest import agree
from fastvim.inference.parts.over_ray import compute_over_ray
from fastvim.inference.parts.shards import WHOLE, Shard, local_share
from fastvim.inference.parts.sources import Source
from fastvim.inference.parts.store import open_store
from fastvim.inference.parts.work import Opened, Row, Work


class Listener(Report, Protocol):
    """Is told how a run goes on, and what it is about to do."""

    def begin(self, images: int, done: int) -> None:
        """This process has that many images to do, of which others are done."""
        ...

    def say(self, line: str) -> None:
        """A line for the user."""
        ...


@dataclass(frozen=True)
class Plan:
    """How a run is to be done; nothing here changes a row.

    Args:
        device: of the model; None for that of `own_device`, and of the nodes with `ray`.
        part_size: rows of a part; None for that of a run that goes on, else `PART_SIZE`.
        shard: the share of this process.
        devices: processes on this machine, each with a device of its own.
        ray: address of a Ray cluster that computes instead; "local" for this machine alone.
        workers: processes that read images for each that computes; None for what suits the device.
        table: one file of all rows at the end, beside what the work writes.
    """

    device: torch.device | None = None
    part_size: int | None = None
    shard: Shard = WHOLE
    devices: int = 1
    ray: str | None = None
    workers: int | None = None
    table: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What is there when a process ends.

    Attributes:
        images: of the whole run.
        missing: of these, in parts that others have still to compute.
        failed: rows with an error among the others.
        rows: reads all of them, in the list's order; of a complete run.
        opened: the work, with what it has heard.
        written: lines about the last files, of a complete run.
    """

    images: int
    missing: int
    failed: int
    rows: Callable[[], Iterator[Row]]
    opened: Opened
    written: list[str]


def run_parts(work: Work, source: Source, out: str, plan: Plan, listener: Listener) -> Outcome:
    """Compute the parts of a run that do not exist yet, and collect them when all of them do.

    Args:
        work: what to compute.
        source: of which images.
        out: folder or address of the results; the parts lie in `parts` there.
        plan: how.
        listener: is told how it goes.

    Raises:
        UserError: a mistake in any of these, or the folder has parts of another run.
    """
    if plan.table is not None:
        check_table(plan.table)
    alone = plan.devices == 1 and plan.ray is None
    device = plan.device or own_device()
    opened = work.open(device if alone else torch.device("cpu"))
    store = open_store(out)
    manifest, new = agree(
        store.below("parts"),
        work.command,
        opened.weights,
        opened.settings(),
        source.identity(),
        lambda: opened.items(source.items(opened.endings, store.root)),
        plan.part_size,
    )
    run = Run(store, manifest)
    done = manifest.done(run.parts)
    mine = [part for part in range(manifest.parts) if plan.shard.has(part)]
    missing = [part for part in mine if part not in done]
    if plan.shard.said:
        listener.say(f"shard {plan.shard} ({plan.shard.said}); --shard 1/1 for all images")
    if not new:
        listener.say(
            f"{run.parts.root}: {len(done):,} of {manifest.parts:,} parts are done"
            + ("" if missing else ", none is left to compute here")
        )
    images = sum(map(manifest.size, mine))
    listener.begin(images, images - sum(map(manifest.size, missing)))
    if missing and plan.ray is not None:
        compute_over_ray(plan.ray, plan.device, work, run, opened, missing, listener, plan.workers)
    elif missing and not alone:
        compute_on_devices(plan.devices, device, work, run, opened, missing, listener, plan.workers)
    elif missing:
        workers = readers(device) if plan.workers is None else plan.workers
        compute(run, opened, missing, device, listener, workers)
    left = set(range(manifest.parts)).difference(manifest.done(run.parts))
    there = [part for part in range(manifest.parts) if part not in left]
    failed = failures_in(run, there)
    _require_result(failed, manifest.listing.rows, run)
    if not left and plan.table is not None:
        write_table(plan.table, collected(run), opened.columns)
    return Outcome(
        images=manifest.listing.rows,
        missing=sum(map(manifest.size, left)),
        failed=failed,
        rows=lambda: collected(run),
        opened=opened,
        written=[] if left else opened.finish(lambda: collected(run), store),
    )


def _require_result(failed: int, images: int, run: Run | None = None) -> None:
    """Raise UserError if no image has a result; parts without any are removed."""
    if failed < images:
        return
    if run is not None:  # such as of a folder that was not there, or another range of values
        run.parts.remove()
    raise UserError(f"no image among {images} files could be read")


def run_here(
    work: Work, source: Source, out: str | None, plan: Plan, listener: Listener
) -> Outcome:
    """Compute all images in this process, without parts: what is lost with it is computed anew.

    Args:
        work: what to compute.
        source: of which images.
        out: folder of the files by image; None for a work without any.
        plan: its device and workers.
        listener: is told how it goes.
    """
    device = plan.device or own_device()
    opened = work.open(device)
    store = None if out is None else open_store(out)
    items = list(opened.items(source.items(opened.endings, store.root if store else None)))
    listener.begin(len(items), 0)
    workers = readers(device) if plan.workers is None else plan.workers
    batches = rows(opened, [items], device, store, listener, workers)
    found = [row for batch in batches for row in batch]
    failed = sum(row["error"] is not None for row in found)
    _require_result(failed, len(items))
    written = [] if store is None else opened.finish(lambda: iter(found), store)
    return Outcome(len(items), 0, failed, lambda: iter(found), opened, written)


def own_device() -> torch.device:
    """A GPU where there is one, of several that of this process by its place on the machine."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_share()[0] % torch.cuda.device_count())
