"""`fastvim data pack ROOT OUT`: the images of class folders in few large files."""

from __future__ import annotations

import argparse

from fastvim_cli.arguments import MOST_SIDE, at_least
from fastvim_cli.console import note, say, track

DESCRIPTION = """\
Copies the files of class folders (ROOT/train/CLASS/*, val and test too, or train.tar) byte for byte
into tar files of about 1 GiB with an index. OUT is then a root like ROOT, with the same images in
the same order: fastvim fit --data.root OUT. Loading processes map the large files into memory,
where a slow or remote disk would open many small ones.
"""
# A training crop of the recipes has at least this share of the area.
SMALLEST, SIDE = 0.08, 224


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("root", metavar="ROOT", help="folder of the splits, as --data.root takes it")
    add("out", metavar="OUT", help="new or empty folder")
    help = "default: those of train, val and test that are there"
    add("--splits", nargs="+", metavar="NAME", help=help)
    help = (
        "store JPEG files whose shorter side has N pixels (quality 90, antialiased, upright, 8 bits"
        "; images that are no larger, of more bits or unreadable stay as they are). They are read "
        "faster, and training sees less: its small crops have fewer pixels. Of 256 x 256 pixels "
        f"the smallest crop, {SMALLEST} of the area, has {_side(256)} x {_side(256)}, enlarged to "
        f"{SIDE} (default: the files as they are)"
    )
    add("--size", type=at_least(1, MOST_SIDE), metavar="N", help=help)
    help = "files read at a time (default: 4)"
    add("--workers", type=at_least(1), default=4, metavar="N", help=help)


def pack(arguments: argparse.Namespace) -> None:
    """Pack the images of class folders.

    Args:
        arguments: of `add_arguments`.
    """
    from fastvim.data import packing
    from fastvim.errors import counted

    root, out, size = arguments.root, arguments.out, arguments.size
    chosen = {"splits": arguments.splits, "size": size, "workers": arguments.workers}
    packed = packing.pack(root, out, **chosen, watch=track)
    for split in packed:
        images, files = counted(split.images, "images"), counted(split.parts, "files")
        say(f"{split.split}: {images}, {split.size / 1e6:,.1f} MB in {files}")
        for kind, (number, first) in split.as_is.items():
            say(f"  {number:,} x {kind}, stored as it is, first: {first}")
        for kind, (number, first) in split.left_out.items():
            say(f"  {number:,} x {kind}, left out, first: {first}")
    if others := packing.not_packed(root, packed):
        note(f"not packed: {others} (--splits packs others)")
    if size is not None:
        side = _side(size)
        enlarged = f", enlarged to {SIDE} x {SIDE} by the recipes" if side < SIDE else ""
        say(f"small crops: {SMALLEST} of {size} x {size} pixels are {side} x {side}{enlarged}")
    say(f"packed: fastvim fit --data.root {out} reads it in place of {root}")


def _side(size: int) -> int:
    """Of the smallest crop of a square of this size."""
    return round(size * SMALLEST**0.5)
