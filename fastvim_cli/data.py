"""`fastvim data`: facts about a set of images.

`stats TABLE` computes the mean and standard deviation of each channel, `check --config RECIPE`
counts what is wrong (`fastvim_cli.check`).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

from fastvim_cli import check
from fastvim_cli.arguments import Parser, at_least
from fastvim_cli.console import note, table, track

if TYPE_CHECKING:
    from fastvim.data.moments import Moments
    from fastvim.data.remote import UnreadableFileError

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
    add("--images", type=at_least(1), metavar="N", help="a random choice of so many (default: all)")
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
    else:
        _stats(arguments)


def _stats(arguments: argparse.Namespace) -> None:
    """`fastvim data stats`."""
    from fastvim.data.remote import UnreadableFileError
    from fastvim.errors import UserError

    reading = {"attempts": arguments.attempts, "storage_options": arguments.storage_options}
    paths = _paths(arguments, reading)
    total: Moments | None = None
    used, failures = 0, []
    results = _measure(paths, arguments.workers, reading)
    for path, result in track(results, "reading", len(paths)):
        if isinstance(result, UnreadableFileError):
            if not arguments.skip_unreadable:
                raise result
            failures.append(result)
        elif total is not None and len(result.mean) != len(total.mean):
            raise UserError(
                f"{path}: {len(result.mean)} channels; those before have {len(total.mean)}"
            )
        else:
            total, used = result if total is None else total | result, used + 1
    for failure in failures:
        note(f"skipped {failure}")
    if total is None:
        raise UserError(f"{arguments.table}: none of {len(paths)} images could be read")
    _show(total, f"{used:,} images of {arguments.table}")


def _paths(arguments: argparse.Namespace, reading: dict[str, Any]) -> list[str]:
    """The files that the arguments choose."""
    import numpy as np

    from fastvim.data.remote import is_url, join
    from fastvim.data.table import read_table, require_columns, require_values, splits_of
    from fastvim.errors import UserError

    url = arguments.table
    frame = read_table(url, **reading)
    require_columns(frame, [arguments.path_column], url)
    require_values(frame, arguments.path_column, url)
    paths = frame[arguments.path_column].astype(str).to_numpy(dtype=object)
    if arguments.split != "all":
        splits = splits_of(frame, arguments.split_column, arguments.split_seed, url)
        paths = paths[splits == arguments.split]
        if not len(paths):
            raise UserError(f"{url}: no rows of the split {arguments.split!r}")
    if arguments.images is not None and arguments.images < len(paths):
        chosen = np.random.RandomState(0).permutation(len(paths))[: arguments.images]
        paths = paths[np.sort(chosen)]
    root = arguments.root
    if root is None:
        root = url.rpartition("/")[0] if is_url(url) else os.path.dirname(url)
    return [join(root, path) for path in paths]


def _measure(
    paths: list[str], workers: int, reading: dict[str, Any]
) -> Iterator[tuple[str, Moments | UnreadableFileError]]:
    """The moments of each image, or why it has none, in the order of the paths."""

    from fastvim.data.arrays import read_array
    from fastvim.data.moments import Moments
    from fastvim.data.remote import UnreadableFileError

    def measure(path: str) -> Moments | UnreadableFileError:
        try:
            return Moments.of(read_array(path, **reading))
        except UnreadableFileError as error:
            return error

    remaining = iter(paths)
    with ThreadPoolExecutor(workers) as pool:
        # In portions: an error ends the reading soon, not after all the files.
        while portion := list(islice(remaining, 8 * workers)):
            yield from zip(portion, pool.map(measure, portion), strict=True)


def _show(total: Moments, title: str) -> None:
    import numpy as np

    std = np.sqrt(total.squares / total.number)
    channels = enumerate(zip(total.mean, std, strict=True))
    rows = [(str(i), f"{centre:.6g}", f"{spread:.6g}") for i, (centre, spread) in channels]
    print(title)
    print(table(("channel", "mean", "standard deviation"), rows, left=()))
    for name, values in (("mean", total.mean), ("std", std)):
        print(f"{name}: [{', '.join(f'{value:.6g}' for value in values)}]")


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an object such as {{}}")
    return value
