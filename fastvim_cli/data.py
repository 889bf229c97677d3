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
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastvim.data.arrays import read_array
from fastvim.data.remote import UnreadableFileError, is_url, join
from fastvim.data.table import SPLITS, read_table, require_columns, require_values, splits_of
from fastvim.errors import UserError
from fastvim_cli import check
from fastvim_cli.arguments import Parser

DESCRIPTION = """\
Mean and standard deviation of each channel over all pixels, of the values as stored: what a recipe
wants as mean and std. Without a column of splits, the training split is the one that a run with the
same split_seed has.
"""


class Moments(NamedTuple):
    """Of each channel: the number of values, their mean and the sum of squared deviations.

    Attributes:
        number: of one channel; all have as many.
        mean: float64 (C,).
        squares: float64 (C,).
    """

    number: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, image: np.ndarray) -> Moments:
        """Those of an image (C, H, W)."""
        values = image.reshape(len(image), -1).astype(np.float64)
        mean = values.mean(axis=1)
        return cls(values.shape[1], mean, ((values - mean[:, None]) ** 2).sum(axis=1))

    def __or__(self, other: Moments) -> Moments:
        """Those of both sets of values (Chan, Golub, LeVeque 1979)."""
        number = self.number + other.number
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.number / number)
        between = delta**2 * (self.number * other.number / number)
        return Moments(number, mean, self.squares + other.squares + between)


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
    add("--split", choices=(*SPLITS, "all"), default="train", help=help)
    help = "of the permutation that divides a table without splits (default: 0)"
    add("--split-seed", type=int, default=0, metavar="N", help=help)
    add("--images", type=int, metavar="N", help="a random choice of so many (default: all)")
    add("--skip-unreadable", action="store_true", help="leave out what cannot be read, and say so")
    add("--workers", type=int, default=4, metavar="N", help="files read at a time (default: 4)")
    add("--attempts", type=int, default=4, metavar="N", help="to fetch a file (default: 4)")
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
    for name, least in {"images": 1, "workers": 1, "attempts": 1, "split_seed": 0}.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    reading = {"attempts": arguments.attempts, "storage_options": arguments.storage_options}
    paths = _paths(arguments, reading)
    total: Moments | None = None
    used, failures = 0, []
    results = _measure(paths, arguments.workers, reading)
    quiet = not errors.is_terminal
    for path, result in track(
        results, "reading", len(paths), console=errors, transient=True, disable=quiet
    ):
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
        errors.print(f"skipped {failure}", markup=False, soft_wrap=True)
    if total is None:
        raise UserError(f"{arguments.table}: none of {len(paths)} images could be read")
    _show(console, total, f"{used:,} images of {arguments.table}")


def _paths(arguments: argparse.Namespace, reading: dict[str, Any]) -> list[str]:
    """The files that the arguments choose."""
    url = arguments.table
    table = read_table(url, **reading)
    require_columns(table, [arguments.path_column], url)
    require_values(table, arguments.path_column, url)
    paths = table[arguments.path_column].astype(str).to_numpy(dtype=object)
    if arguments.split != "all":
        splits = splits_of(table, arguments.split_column, arguments.split_seed, url)
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


def _show(console: Console, total: Moments, title: str) -> None:
    std = np.sqrt(total.squares / total.number)
    table = Table("channel", "mean", "standard deviation", box=None)
    for column in table.columns:
        column.justify = "right"
    for channel, (centre, spread) in enumerate(zip(total.mean, std, strict=True)):
        table.add_row(str(channel), f"{centre:.6g}", f"{spread:.6g}")
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
    for name, values in (("mean", total.mean), ("std", std)):
        text = ", ".join(f"{value:.6g}" for value in values)
        console.print(f"{name}: [{text}]", markup=False, soft_wrap=True)


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an object such as {{}}")
    return value
