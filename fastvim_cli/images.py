"""What the commands on image files share: arguments, the loop over files, the last lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastvim_cli.arguments import add_device, local_path
from fastvim_cli.console import note, track

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastvim.data.inputs import Failure, Read

    _Model = TypeVar("_Model", bound=nn.Module)


def add_images(parser: argparse.ArgumentParser, out: str | None, writes: str) -> None:
    """IMAGES, and the options `--out` and `--device`.

    Args:
        parser: of the command.
        out: default of `--out`.
        writes: what is written there.
    """
    default = "" if out is None else f" (default: {out})"
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="files, folders or globs")
    add("--out", default=out, type=local_path, metavar="DIR", help=f"writes {writes} here{default}")
    add_device(parser)


def load_trained(
    path: str, kind: type[_Model], task: str, *required: str
) -> tuple[_Model, dict[str, Any]]:
    """A model that a task has trained, and the metadata of its file.

    Args:
        path: of the weights.
        kind: class of the model.
        task: such as "segmentation", for the message.
        required: keys of the metadata.

    Raises:
        UserError: weights of something else.
    """
    from fastvim.errors import UserError
    from fastvim.weights import load_model

    model, metadata = load_model(path=path)
    if not isinstance(model, kind):
        raise UserError(
            f"{path} holds {metadata['model']}: expected a {task} model as fastvim fit writes it"
        )
    if missing := [name for name in required if name not in metadata]:
        raise UserError(f"{path} does not say {missing[0]}: expected weights of fastvim fit")
    return model, metadata


def draw_each(
    paths: list[Path],
    failures: list[Failure],
    read: Read,
    doing: str,
    out: Path,
    draw: Callable[[Path, Tensor, Path], str],
) -> None:
    """Read files one by one, as images may be of any size, draw each, and print a line for each.

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
    from fastvim.data.inputs import read_batches

    lines: list[str] = []
    taken: set[str] = set()
    for (path,), image in track(read_batches(paths, read, 1, failures), doing, len(paths)):
        out.mkdir(parents=True, exist_ok=True)
        lines.append(f"{path}: {draw(path, image, out / _free_stem(path, taken))}")
    report_failures(failures, read=len(lines))
    for line in lines:
        print(line)


def report_failures(failures: list[Failure], *, read: int) -> None:
    """Print a line for each file that gave no image.

    Raises:
        UserError: none was read.
    """
    from fastvim.errors import UserError

    for failure in failures:
        note(f"skipped {failure.path}: {failure.reason}")
    if not read:
        raise UserError(f"no image among {len(failures)} files could be read")


def _free_stem(path: Path, taken: set[str]) -> str:
    """A name without ending for a file's pictures that is not in `taken`."""
    name, number = path.stem, 1
    while name in taken:
        number += 1
        name = f"{path.stem}-{number}"
    taken.add(name)
    return name
