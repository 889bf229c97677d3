"""Read, compute, commit: the parts of one process, in order, while the next images are read.

C, H, W: channels, height and width of an image; B: images of a batch
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import Dataset

from fastvim.data.workers import WatchedLoader
from fastvim.errors import UserError
from fastvim.inference.parts.formats import encode
from fastvim.inference.parts.listing import read_items
from fastvim.inference.parts.manifest import Manifest
from fastvim.inference.parts.shards import local_share
from fastvim.inference.parts.store import Store
from fastvim.inference.parts.work import Failure, Item, Opened, Read, Row, Work
from fastvim.machine import cores
from fastvim.streams import own_stream

SAFE = "the parts that exist are safe: the same command goes on from them"


class Spent(NamedTuple):
    """Seconds that a process took for some images, and how many of these it waited for them."""

    seconds: float = 0.0
    waiting: float = 0.0

    def plus(self, other: Spent) -> Spent:
        """The sum of both."""
        return Spent(self.seconds + other.seconds, self.waiting + other.waiting)


class Report(Protocol):
    """Is told how a run goes on."""

    def advance(self, images: int, spent: Spent) -> None:
        """That many images are done, failures included."""
        ...

    def failed(self, failure: Failure) -> None:
        """One of them failed."""
        ...


@dataclass(frozen=True)
class Run:
    """The parts of an output folder; can be pickled.

    Attributes:
        out: the folder.
        manifest: what its parts have in common.
    """

    out: Store
    manifest: Manifest

    @property
    def parts(self) -> Store:
        """Where the parts lie."""
        return self.out.below("parts")


def open_for(work: Work, run: Run, device: torch.device) -> Opened:
    """Open a work in a process that did not begin the run.

    Raises:
        UserError: the weights are others here.
    """
    opened = work.open(device)
    if opened.weights != run.manifest.weights:
        raise UserError(
            f"{socket.gethostname()}: other weights than the run's: {opened.weights}, expected "
            f"{run.manifest.weights}; the file must be the same on every machine"
        )
    return opened


def compute(
    run: Run,
    opened: Opened,
    parts: Iterable[int],
    device: torch.device,
    report: Report,
    workers: int,
) -> None:
    """Compute parts and write each of them whole.

    Args:
        run: that they belong to.
        opened: the work.
        parts: their numbers, in the order to compute them.
        device: of the model.
        report: is told of every batch.
        workers: processes that read images; 0 reads between the batches.
    """
    manifest, numbers = run.manifest, list(parts)
    columns = opened.columns() if manifest.format == "parquet" else None
    listed = (read_items(run.parts, manifest.listing, part) for part in numbers)
    found = rows(opened, listed, device, run.out, report, workers)
    for part in numbers:
        done: list[Row] = []
        while len(done) < manifest.size(part):
            done += next(found)
        run.parts.write(manifest.name(part), encode(done, manifest.format, columns))


def rows(
    opened: Opened,
    lists: Iterable[list[Item]],
    device: torch.device,
    out: Store | None,
    report: Report,
    workers: int,
) -> Iterator[list[Row]]:
    """The rows of each batch, in the order of the items; no batch is of two lists.

    Args:
        opened: the work.
        lists: of items, taken as they are needed.
        out: of `Opened.rows`.

    The other arguments are those of `compute`.
    """
    size = opened.batch_size
    batches = (items[i : i + size] for items in lists for i in range(0, len(items), size))
    loader = WatchedLoader(
        _Reading(opened.read),
        batch_sampler=batches,  # of items instead of indices
        num_workers=workers,
        collate_fn=_as_it_is,  # `_Reading` gives whole batches
        patience=0,
        finish=partial(_prepared, opened),
    )
    if device.type == "cuda" and workers:
        loader.ahead = device
    with own_stream(device):  # the default one waits for what a decoder does
        yield from _computed(opened, loader, out, report)


def _computed(
    opened: Opened, batches: Iterable[_Batch], out: Store | None, report: Report
) -> Iterator[list[Row]]:
    begun = time.perf_counter()
    for batch in batches:
        read = time.perf_counter()
        good = [item for item, reason in zip(batch.items, batch.reasons, strict=True) if not reason]
        results = iter(opened.rows(good, batch.images, out) if good else ())
        done: list[Row] = []
        for item, reason in zip(batch.items, batch.reasons, strict=True):
            row = {"error": reason} if reason else next(results)
            error = row.pop("error", None)
            if error is not None:
                report.failed(Failure(item["path"], error))
            done.append({"path": item["path"], **row, "error": error})
        opened.hear(batch.told)
        ended = time.perf_counter()
        report.advance(len(done), Spent(ended - begun, read - begun))
        yield done
        begun = time.perf_counter()


def readers(device: torch.device, processes: int | None = None) -> int:
    """How many processes read images for one that computes: none for a CPU, which has no idle core.

    Args:
        device: of the model.
        processes: that compute on this machine; None for what a scheduler's variables say.
    """
    if device.type == "cpu":
        return 0
    return max(1, cores() // (processes or local_share()[1]))


class _Batch(NamedTuple):
    items: Sequence[Item]
    reasons: Sequence[str]  # "" for each that could be read
    images: Any  # of those, by `Read.batch`, then by `Opened.prepare`; None of none
    told: Any  # of `Read.told`


class _Reading(Dataset[_Batch]):
    """Reads the images of batches; an error is a value, which loses one image and no batch."""

    def __init__(self, read: Read) -> None:
        self.read = read

    def __getitems__(self, items: list[Item]) -> _Batch:
        reasons, images = [], []
        for item in items:
            try:
                if not (reason := item.get("error", "")):
                    images.append(self.read(item["path"]))
            except UserError as error:
                reason = _reason(item, error)
            reasons.append(reason)
        return _Batch(items, reasons, self.read.batch(images) if images else None, self.read.told())


def _prepared(opened: Opened, batch: _Batch) -> _Batch:
    """A batch with images for `Opened.rows`, and without those that could not be decoded."""
    if batch.images is None:
        return batch
    images, errors = opened.prepare(batch.images)
    reasons = list(batch.reasons)
    read = [number for number, reason in enumerate(reasons) if not reason]
    for place, error in errors.items():
        reasons[read[place]] = _reason(batch.items[read[place]], error)
    return batch._replace(images=images, reasons=reasons)


def _reason(item: Item, error: UserError) -> str:
    return str(error).removeprefix(f"{item['path']}: ")


def _as_it_is(batch: Any) -> Any:
    return batch
