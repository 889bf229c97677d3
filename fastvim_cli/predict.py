"""`fastvim predict`: classes of image files, to the terminal, a file and a picture.

Channel models read every file that `fastvim.data.arrays` does, with all of their channels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.data import ImageNetInfo
from torch import Tensor, nn

from fastvim.data import channel_transforms
from fastvim.data.arrays import DECODERS
from fastvim.data.transforms import evaluation_transform
from fastvim.errors import UserError
from fastvim.models import FastChannelVim, MaskedAutoencoder
from fastvim.models.heads.upernet import UPerNet
from fastvim.tasks.pictures.predictions import Prediction, draw_predictions
from fastvim.weights import load_model
from fastvim_cli.arguments import Parser, usable_device
from fastvim_cli.images import (
    Failure,
    arrays,
    find_images,
    image_settings,
    pictures,
    read_batches,
    report_failures,
)

SHEET_IMAGES = 100  # pictures on the contact sheet at most
TOP = 5  # classes written for each image


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
    model, metadata = load_model(arguments.model, arguments.checkpoint)
    of_channels = isinstance(model, FastChannelVim)
    paths, failures = find_images(arguments.images, DECODERS if of_channels else None)
    if isinstance(model, MaskedAutoencoder):
        raise UserError(
            f"{arguments.checkpoint or arguments.model} is a masked autoencoder, which has no "
            "classes: see fastvim reconstruct"
        )
    if isinstance(model, UPerNet):
        raise UserError(f"{arguments.checkpoint} labels pixels: see fastvim segment")
    if arguments.checkpoint is None:
        errors.print("no --checkpoint: the weights are the initial ones, the classes are random")
    settings = image_settings(model, metadata)
    names = class_names(model, metadata)
    model = model.to(usable_device(arguments.device)).eval()

    lines: list[dict[str, Any]] = []
    shown: list[Prediction] = []
    if of_channels:
        size = (settings["img_size"], settings["mean"], settings["std"])
        read = arrays(channel_transforms.evaluation_transform(*size))
    else:
        read = pictures(evaluation_transform(**settings))
    batches = read_batches(paths, read, arguments.batch_size, failures)
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

    report_failures(failures, errors, read=len(lines))
    console.print(_table(lines))
    if arguments.out is not None:
        _write(arguments.out, lines, failures)
        title = f"{len(shown)} of {len(lines)} images" if len(shown) < len(lines) else ""
        picture = draw_predictions(shown, names, settings["mean"], settings["std"], title)
        picture.save(arguments.out / "predictions.png")
        console.print(f"written to {arguments.out}/predictions.jsonl and predictions.png")


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
