"""How far a run is, from its parts alone."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastvim.errors import UserError
from fastvim.inference.parts.collect import failures_in
from fastvim.inference.parts.loop import Run
from fastvim.inference.parts.manifest import NAME, read_manifest
from fastvim.inference.parts.store import Store

WINDOW = 600.0  # seconds that a rate is taken over


@dataclass(frozen=True)
class Status:
    """What a run has done.

    Attributes:
        command: of the run.
        parts: that exist, of `all_parts`.
        images: in them, of `all_images`.
        failed: of those images.
        rate: images per second of the last minutes; 0 where no part came.
        remaining: seconds at that rate; None where nobody can tell.
    """

    command: str
    parts: int
    all_parts: int
    images: int
    all_images: int
    failed: int
    rate: float
    remaining: float | None


def status(out: Store, now: float | None = None) -> Status:
    """How far the run in an output folder is.

    Args:
        out: the folder.
        now: the time in seconds since 1970; None for the clock's.

    Raises:
        UserError: no run is there.
    """
    store = out.below("parts")
    manifest = read_manifest(store)
    if manifest is None:
        raise UserError(f"{out.root}: no run, expected {store.path(NAME)}")
    run = Run(out, manifest)
    done = manifest.done(store)
    images = sum(manifest.size(part) for part in done)
    rate = _rate(run, done, time.time() if now is None else now)
    left = manifest.listing.rows - images
    remaining = 0.0 if not left else left / rate if rate else None
    failed = failures_in(run, done)
    return Status(
        manifest.command,
        len(done),
        manifest.parts,
        images,
        manifest.listing.rows,
        failed,
        rate,
        remaining,
    )


def _rate(run: Run, done: dict[int, float], now: float) -> float:
    """Images per second in the parts of the last minutes, from the first one of these on."""
    recent = sorted((when, part) for part, when in done.items() if now - when <= WINDOW)
    if len(recent) < 2:
        return 0.0
    # What came before the first of them is not known: its images count as the clock's start.
    images = sum(run.manifest.size(part) for _, part in recent[1:])
    return images / max(now - recent[0][0], 1e-9)
