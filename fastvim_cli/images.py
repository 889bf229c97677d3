"""What the commands on image files share: arguments, the loop over files, the last lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvim_cli.arguments import add_device, at_least, local_path
from fastvim_cli.console import note, track

if TYPE_CHECKING:
    from torch import Tensor

    from fastvim.data.inputs import Failure, Read
    from fastvim.data.pixels import PictureReader


def add_images(parser: argparse.ArgumentParser, out: str | None, writes: str) -> None:
    """IMAGES, and the options `--out`, `--value-range`, `--max-pixels` and `--device`.

    Args:
        parser: of the command.
        out: default of `--out`.
        writes: what is written there.
    """
    default = "" if out is None else f" (default: {out})"
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="files, folders or globs")
    add("--out", default=out, type=local_path, metavar="DIR", help=f"writes {writes} here{default}")
    help = "values that are black and white (default: of the training, else of the files' type)"
    add("--value-range", type=float, nargs=2, metavar=("BLACK", "WHITE"), help=help)
    help = "refuse an image of more pixels (default: 179 million)"
    add("--max-pixels", type=at_least(1), metavar="N", help=help)
    add_device(parser)


def chosen_images(
    arguments: argparse.Namespace, endings: Collection[str] | None = None
) -> tuple[list[Path], list[Failure]]:
    """The files that IMAGES name, and the names without one; see `find_images`.

    Raises:
        UserError: there is no file at all.
    """
    from fastvim.data.inputs import find_images

    paths, failures = find_images(arguments.images, endings)
    if not paths:
        report(failures)
    return paths, failures


def chosen_reader(arguments: argparse.Namespace, metadata: dict[str, Any]) -> PictureReader:
    """Reads pictures as the training did, or as `--value-range` and `--max-pixels` say.

    Args:
        arguments: with those of `add_images`.
        metadata: of the weights' file.
    """
    from fastvim.data.inputs import picture_reader

    return picture_reader(metadata, arguments.value_range, arguments.max_pixels)


def draw_each(
    paths: list[Path],
    failures: list[Failure],
    read: Read,
    doing: str,
    out: Path,
    draw: Callable[[Path, Tensor, Path], str],
) -> list[str]:
    """Read files one by one, as images may be of any size, and draw each; a line for each.

    Args:
        paths: of the files.
        failures: of other files; reported with those that cannot be read.
        read: prepares an image.
        doing: what a terminal shows meanwhile.
        out: folder of the pictures.
        draw: takes the file, its image (1, C, H, W), and the path of its pictures without their
            ending; returns the line.

    Raises:
        UserError: no file could be read.
    """
    from fastvim.data.inputs import Failure, read_batches
    from fastvim.errors import NotFiniteError

    lines: list[str] = []
    taken: set[str] = set()
    for (path,), image in track(read_batches(paths, read, 1, failures), doing, len(paths)):
        out.mkdir(parents=True, exist_ok=True)
        try:
            lines.append(f"{path}: {draw(path, image, out / _free_stem(path, taken))}")
        except NotFiniteError as error:
            failures.append(Failure(path, str(error)))
    report(failures, read, len(lines))
    return lines


def report(failures: list[Failure], read: Read | None = None, count: int = 0) -> None:
    """Print a line for each file that gave no image, and one each if others are dark or hold more.

    Args:
        failures: the files without an image.
        read: how the others were read.
        count: of the others.

    Raises:
        UserError: none was read.
    """
    from fastvim.data.inputs import Pictures
    from fastvim.data.issues import SEVERAL_IMAGES
    from fastvim.errors import UserError

    for failure in failures:
        note(f"skipped {failure.path}: {failure.reason}")
    if not count:
        raise UserError(f"no image among {len(failures)} files could be read")
    if isinstance(read, Pictures) and read.several:
        note(f"{read.several:,} x {SEVERAL_IMAGES}")
    if isinstance(read, Pictures) and (warning := read.brightest.warning()):
        note(f"{warning} (here --value-range)")


def _free_stem(path: Path, taken: set[str]) -> str:
    """A name without ending for a file's pictures that is not in `taken`."""
    name, number = path.stem, 1
    while name in taken:
        number += 1
        name = f"{path.stem}-{number}"
    taken.add(name)
    return name
