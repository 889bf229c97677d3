"""`fastvim data`: facts about a set of images.

`stats TABLE` computes the mean and standard deviation of each channel, `check --config RECIPE`
counts what is wrong (`fastvim_cli.check`), `pack ROOT OUT` puts images into few large files
(`fastvim_cli.pack`).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from fastvim_cli import check, pack
from fastvim_cli.arguments import Parser, at_least
from fastvim_cli.console import note, say, table, track

DESCRIPTION = """\
Mean and standard deviation of each channel over all pixels, of the values as stored: what a recipe
wants as mean and std. Without a column of splits, the training split is the one that a run with the
same split_seed has.
"""


def _parser() -> Parser:
    parser = Parser(prog="fastvim data", description="Facts about a set of images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    help = "what is wrong with a recipe's images"
    check.add_arguments(commands.add_parser("check", help=help, description=check.DESCRIPTION))
    help = "images in few large files, for slow disks and few cores"
    pack.add_arguments(commands.add_parser("pack", help=help, description=pack.DESCRIPTION))
    stats = commands.add_parser(
        "stats", help="mean and standard deviation of each channel", description=DESCRIPTION
    )
    add = stats.add_argument
    add("table", metavar="TABLE", help="CSV, TSV or Parquet file, or its URL")
    add("--root", metavar="DIR", help="folder or URL of relative paths (default: the table's)")
    add("--path-column", default="path", metavar="NAME", help="default: path")
    add("--split-column", default="split", metavar="NAME", help="default: split")
    help = "images of this split (default: train)"
    add("--split", choices=("train", "val", "test", "all"), default="train", help=help)
    help = "of the permutation that divides a table without splits (default: 0)"
    add("--split-seed", type=at_least(0), default=0, metavar="N", help=help)
    add("--images", type=at_least(1), metavar="N", help="a random choice of N (default: all)")
    add("--skip-unreadable", action="store_true", help="leave out what cannot be read, and say so")
    add(
        "--workers",
        type=at_least(1),
        default=4,
        metavar="N",
        help="files read at a time (default: 4)",
    )
    add("--attempts", type=at_least(1), default=4, metavar="N", help="to fetch a file (default: 4)")
    help = "arguments of the fsspec filesystem"
    add("--storage-options", type=_json, default={}, metavar="JSON", help=help)
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim data --help`."""
    parser = _parser()
    arguments, others = parser.parse_known_args(argv)
    if arguments.command == "check":
        check.check(arguments, others)
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    elif arguments.command == "pack":
        pack.pack(arguments)
    else:
        _stats(arguments)


def _stats(arguments: argparse.Namespace) -> None:
    """`fastvim data stats`."""
    from fastvim.data.moments import add_up, measure
    from fastvim.data.table import list_images
    from fastvim.errors import UserError

    reading = {"attempts": arguments.attempts, "storage_options": arguments.storage_options}
    paths = list_images(
        arguments.table,
        root=arguments.root,
        path_column=arguments.path_column,
        split_column=arguments.split_column,
        split=None if arguments.split == "all" else arguments.split,
        split_seed=arguments.split_seed,
        count=arguments.images,
        **reading,
    )
    measured = track(measure(paths, arguments.workers, **reading), "reading", len(paths))
    total, used, skipped = add_up(measured, arguments.skip_unreadable)
    for error in skipped:
        note(f"skipped {error}")
    if total is None:
        raise UserError(f"{arguments.table}: none of {len(paths)} images could be read")
    say(f"{used:,} images of {arguments.table}")
    columns = {"mean": total.mean, "standard deviation": total.std}
    channels = enumerate(zip(*columns.values(), strict=True))
    rows = [(str(channel), *(f"{value:.6g}" for value in values)) for channel, values in channels]
    print(table(("channel", *columns), rows, left=()))
    for name, values in (("mean", total.mean), ("std", total.std)):
        print(f"{name}: [{', '.join(f'{value:.6g}' for value in values)}]")


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an object such as {{}}")
    return value
