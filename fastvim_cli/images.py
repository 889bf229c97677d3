"""What the commands on image files share: their arguments, the run, the last lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from itertools import islice
from typing import TYPE_CHECKING, Any

from fastvim_cli.arguments import UsageError, add_device, at_least, usable_device
from fastvim_cli.console import note, say
from fastvim_cli.failures import EXIT_FAILURE, Ended
from fastvim_cli.progress import Progress, duration

if TYPE_CHECKING:
    from fastvim.inference.parts.run import Outcome
    from fastvim.inference.parts.shards import Shard
    from fastvim.inference.parts.work import Row, Work

MOST_LINES = 100  # images that are printed one by one
NEED_OUT = ("list", "part_size", "shard", "devices", "ray", "table")


def add_images(
    parser: argparse.ArgumentParser, out: str | None, writes: str, *, parts: bool = True
) -> None:
    """IMAGES, and the options of reading them and of runs over many of them.

    Args:
        parser: of the command.
        out: folder of the files by image where there is no `--out`; None if there are none.
        writes: what is written there.
        parts: with `--out` the work is cut into parts.
    """
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGES", help="files, folders, globs or addresses of these")
    default = "" if out is None else f" (default: {out}{', without parts' if parts else ''})"
    where = "here, and in parts what is done" if parts else "here"
    add("--out", metavar="DIR", help=f"folder or address: writes {writes} {where}{default}")
    help = "values that are black and white (default: of the training, else of the files' type)"
    add("--value-range", type=float, nargs=2, metavar=("BLACK", "WHITE"), help=help)
    help = "refuse an image of more pixels (default: 179 million)"
    add("--max-pixels", type=at_least(1), metavar="N", help=help)
    add_device(parser)
    add("--strict", action="store_true", help="end with 1 if an image has no result")
    if parts:
        _add_parts(parser)
    else:
        parser.set_defaults(status=None, **dict.fromkeys(NEED_OUT), workers=None)
    parser.set_defaults(command=parser.prog, parts=parts)


def _add_parts(parser: argparse.ArgumentParser) -> None:
    """The options of runs over many images."""
    many = parser.add_argument_group(
        "many images",
        "With --out, the work is cut into parts that are written whole. Started again, also with "
        "other numbers of processes, a run goes on from the parts that exist.",
    )
    add = many.add_argument
    help = "instead of IMAGES: .csv, .tsv or .parquet with a column path, .jsonl, .txt"
    add("--list", metavar="TABLE", help=help)
    add("--part-size", type=at_least(1), metavar="ROWS", help="images of a part (default: 1024)")
    help = "the Ith of N shares of the parts (default: as torchrun, SLURM or Kubernetes say)"
    add("--shard", metavar="I/N", help=help)
    help = "processes on this machine: one a GPU, or on a CPU with a share of the cores"
    add("--devices", type=at_least(1), metavar="N", help=help)
    add("--ray", metavar="ADDRESS", help='a Ray cluster, "auto", or "local" for this machine')
    help = "processes that read images (default: this process' cores for a GPU, none for a CPU)"
    add("--workers", type=at_least(0), metavar="N", help=help)
    add("--table", metavar="FILE", help="all rows as one .parquet, .csv or .jsonl at the end")
    add("--status", metavar="OUT", help="say how far the run of that --out is, and do nothing")


def run_images(
    arguments: argparse.Namespace,
    work: Work,
    doing: str,
    *,
    out: str | None = None,
    endings: Collection[str] | None = None,
) -> Outcome:
    """Compute what the arguments of `add_images` say.

    Args:
        arguments: of the command.
        work: what to compute.
        doing: what a terminal shows meanwhile.
        out: folder of the files by image where there is no `--out`.
        endings: of all files that may be images; None for what Pillow reads.
    """
    from fastvim.data.folders import image_endings
    from fastvim.inference.parts.run import Plan, run_here, run_parts
    from fastvim.inference.parts.sources import Source

    source = Source(tuple(arguments.images), arguments.list)
    _check(arguments)
    shard = _shard(arguments)
    device = None if arguments.device is None else usable_device(arguments.device)
    source.require_image(endings or image_endings())
    plan = Plan(
        device,
        arguments.part_size,
        shard,
        arguments.devices or 1,
        arguments.ray,
        arguments.workers,
        arguments.table,
    )
    progress = Progress(doing)
    try:
        if arguments.out is None or not arguments.parts:
            return run_here(work, source, arguments.out or out, plan, progress)
        return run_parts(work, source, arguments.out, plan, progress)
    except KeyboardInterrupt as interrupt:
        safe = (
            ""
            if arguments.out is None or not arguments.parts
            else "the same command goes on from the parts that exist"
        )
        raise KeyboardInterrupt(safe) from interrupt
    finally:
        progress.end()


def _check(arguments: argparse.Namespace) -> None:
    """Raise UsageError for arguments that contradict one another."""
    if arguments.images and arguments.list is not None:
        raise UsageError(f"IMAGES and --list {arguments.list}: expected one of them")
    if not arguments.images and arguments.list is None:
        other = "--list TABLE or " if arguments.parts else ""
        raise UsageError(f"expected {other}IMAGES; see {arguments.command} --help")
    if arguments.devices is not None and arguments.ray is not None:
        raise UsageError(f"--devices and --ray {arguments.ray}: expected one of them")
    if arguments.out is None:
        for name in NEED_OUT:
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')}: expected --out as well")


def _shard(arguments: argparse.Namespace) -> Shard:
    from fastvim.inference.parts.shards import WHOLE, parse_shard, shard_of_environment

    if arguments.out is None or not arguments.parts:
        return WHOLE
    return parse_shard(arguments.shard) if arguments.shard else shard_of_environment()


def reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of an `ImageWork` about reading."""
    limits = arguments.value_range
    return {
        "value_range": None if limits is None else (limits[0], limits[1]),
        "max_pixels": arguments.max_pixels,
    }


def conclude(
    arguments: argparse.Namespace, outcome: Outcome, show: Callable[[Outcome, list[Row]], None]
) -> int:
    """Say how a run ended, and return the exit code.

    Args:
        arguments: of the command.
        outcome: of the run.
        show: prints the results of a complete run: is given the first rows without an error.

    Raises:
        Ended: an image has no result, with `--strict`.
    """
    if outcome.missing:
        note(
            f"{outcome.images - outcome.missing:,} of {outcome.images:,} images are done, the rest "
            f"is in other shares: {arguments.command} --status {arguments.out}"
        )
    else:
        good = (row for row in outcome.rows() if row["error"] is None)
        show(outcome, list(islice(good, MOST_LINES)))
        say(*outcome.written)
    for remark in outcome.opened.remarks:
        note(remark)
    if outcome.failed:
        line = f"{outcome.failed:,} of {outcome.images:,} images have no result"
        if arguments.strict:
            raise Ended(f"error: {line}", EXIT_FAILURE)
        note(line)
    return 0


def show_each(out: str) -> Callable[[Outcome, list[Row]], None]:
    """Prints a line for each image; of more than `MOST_LINES`, how many there are.

    Args:
        out: folder of the files by image.
    """

    def show(outcome: Outcome, first: list[Row]) -> None:
        from fastvim.inference.parts.store import open_store

        if outcome.images > MOST_LINES:
            print(f"{outcome.images - outcome.failed:,} images are done")
            return
        for row in first:
            say(f"{row['path']}: {outcome.opened.describe(row, open_store(out))}")

    return show


def print_status(out: str) -> int:
    """Say how far a run is, and return the exit code."""
    from fastvim.inference.parts.status import status
    from fastvim.inference.parts.store import open_store

    found = status(open_store(out))
    left = "unknown" if found.remaining is None else duration(found.remaining)
    print(f"fastvim {found.command}: {found.images:,} of {found.all_images:,} images are done")
    print(f"parts      {found.parts:,} of {found.all_parts:,}")
    print(f"no result  {found.failed:,} images")
    print(f"rate       {found.rate:,.1f} images/s in the last minutes")
    print(f"time left  {left}")
    return 0
