"""`fastvim predict`: classes of image files, to the terminal, a file and a picture."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.data import ImageNetInfo, get_img_extensions, resolve_model_data_config
from torch import Tensor, nn

from fastvim.checkpoint import load_model
from fastvim.cli.arguments import Parser
from fastvim.data.files import UNREADABLE
from fastvim.data.transforms import Transform, evaluation_transform
from fastvim.errors import UserError
from fastvim.tasks.report import Prediction, draw_predictions

SHEET_IMAGES = 100  # pictures on the contact sheet at most
TOP = 5  # classes written for each image


class Failure(NamedTuple):
    """A file that gave no image, and why."""

    path: Path
    reason: str


def _parser() -> Parser:
    parser = Parser(prog="fastvim predict", description="Classify image files.")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders or globs")
    parser.add_argument("--model", metavar="NAME", help="default: the one the checkpoint names")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights: of this library, or published ones"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="writes predictions.jsonl and predictions.png here"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="DEVICE"
    )
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim predict --help`."""
    arguments = _parser().parse_args(argv)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: expected at least 1")
    paths, failures = find_images(arguments.images)
    model, metadata = load_model(arguments.model, arguments.checkpoint)
    if arguments.checkpoint is None:
        errors.print("no --checkpoint: the weights are the initial ones, the classes are random")
    settings = image_settings(model, metadata)
    names = class_names(model, metadata)
    model = model.to(_device(arguments.device)).eval()

    lines: list[dict[str, Any]] = []
    shown: list[Prediction] = []
    batches = _batches(paths, evaluation_transform(**settings), arguments.batch_size, failures)
    total = -(-len(paths) // arguments.batch_size)
    quiet = not errors.is_terminal
    for files, images in track(
        batches, "predicting", total, console=errors, transient=True, disable=quiet
    ):
        probability = _probabilities(model, images.to(arguments.device))
        values, indices = probability.topk(min(TOP, probability.shape[1]))
        for i, file in enumerate(files):
            top = [
                {"class": names[index], "index": index, "probability": value}
                for value, index in zip(values[i].tolist(), indices[i].tolist(), strict=True)
            ]
            lines.append({"file": str(file), **top[0], "top": top})
            if len(shown) < SHEET_IMAGES:
                best = top[0]
                shown.append(Prediction(images[i], best["index"], None, best["probability"]))

    for failure in failures:
        errors.print(f"skipped {failure.path}: {failure.reason}", markup=False, soft_wrap=True)
    if not lines:
        raise UserError(f"no image among {len(failures)} files could be read")
    console.print(_table(lines))
    if arguments.out is not None:
        _write(arguments.out, lines, failures)
        title = f"{len(shown)} of {len(lines)} images" if len(shown) < len(lines) else ""
        figure = draw_predictions(shown, names, settings["mean"], settings["std"], title)
        figure.savefig(arguments.out / "predictions.png", dpi=110)
        console.print(f"written to {arguments.out}/predictions.jsonl and predictions.png")


def find_images(patterns: list[str]) -> tuple[list[Path], list[Failure]]:
    """Image files that files, folders (with all below them) and globs name, each once.

    A name that leads to nothing is a failure among the others, not the end.
    """
    found: dict[Path, None] = {}
    failures = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in get_img_extensions()]
            reason = "a folder without images"
        elif path.exists():
            files, reason = [path], ""
        else:
            files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            reason = "no such file"
        if not files:
            failures.append(Failure(path, reason))
        found.update(dict.fromkeys(files))
    return list(found), failures


def image_settings(model: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """How to prepare an image: as the checkpoint says, else as the model's configuration does."""
    config = resolve_model_data_config(model)
    channels, *size = config["input_size"]
    default = {
        "img_size": tuple(size),
        "in_chans": channels,
        "mean": config["mean"],
        "std": config["std"],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }
    settings = {key: metadata.get(key, value) for key, value in default.items()}
    settings["mean"], settings["std"] = tuple(settings["mean"]), tuple(settings["std"])
    return settings


def class_names(model: nn.Module, metadata: dict[str, Any]) -> list[str]:
    """Names of the outputs: the checkpoint's, ImageNet's for 1000 of them, else their numbers."""
    count = int(getattr(model, "num_classes", 0))
    if count < 1:
        raise UserError("the model has no classes to predict: its head is empty")
    names = metadata.get("class_names") or []
    if len(names) == count:
        return list(names)
    if count == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(count)]
    return [f"class {i}" for i in range(count)]


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable on this machine") from error


def _batches(
    paths: list[Path], transform: Transform, size: int, failures: list[Failure]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Files that could be read and their images (B, C, H, W); the others join `failures`."""
    remaining = iter(paths)
    while chunk := list(islice(remaining, size)):
        files, images = [], []
        for path in chunk:
            try:
                with Image.open(path) as image:
                    images.append(transform(image))
                files.append(path)
            except UnidentifiedImageError:
                failures.append(Failure(path, "not an image"))
            except UNREADABLE as error:
                failures.append(Failure(path, f"damaged: {error}"))
        if files:
            yield files, torch.stack(images)


@torch.inference_mode()
def _probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).float().softmax(dim=-1).cpu()


def _table(lines: list[dict[str, Any]]) -> Table:
    table = Table("image", "class", "probability", box=None)
    table.columns[2].justify = "right"
    for line in lines:
        table.add_row(line["file"], line["class"], f"{line['probability']:.1%}")
    return table


def _write(folder: Path, lines: list[dict[str, Any]], failures: list[Failure]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    failed = [{"file": str(failure.path), "error": failure.reason} for failure in failures]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [*lines, *failed])
    (folder / "predictions.jsonl").write_text(text, encoding="utf-8")
