"""`fastvim predict`: classes of image files, to the terminal, a file and a picture.

Channel models read every file that `fastvim.data.arrays` does, with all of their channels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvim_cli.arguments import Parser, at_least, usable_device
from fastvim_cli.console import say, table, track
from fastvim_cli.images import add_images, chosen_images, chosen_reader, report
from fastvim_cli.weights import add_model, load

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "fastvim_small_patch16_224.in1k"
SHEET_IMAGES = 100  # pictures on the contact sheet at most
TOP = 5  # classes written for each image


def _parser() -> Parser:
    parser = Parser(prog="fastvim predict", description="Classify image files.")
    add = parser.add_argument
    add_model(parser, DEFAULT, checkpoint=True)
    add("--batch-size", type=at_least(1), default=32, metavar="N", help="default: 32")
    add_images(parser, None, "predictions.jsonl and predictions.png")
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim predict --help`."""
    arguments = _parser().parse_intermixed_args(argv)

    import torch

    from fastvim.data.inputs import (
        ALL_ENDINGS,
        Failure,
        class_names,
        image_settings,
        read_batches,
        reader,
    )
    from fastvim.errors import NotFiniteError, require_finite

    chosen_images(arguments, ALL_ENDINGS)  # without any, no weights are fetched
    device, size = usable_device(arguments.device), arguments.batch_size
    model, metadata = load(arguments, "predict")
    names = class_names(model, metadata)
    settings = image_settings(model, metadata)
    read, endings = reader(model, settings, chosen_reader(arguments, metadata))
    paths, failures = chosen_images(arguments, endings)
    model = model.to(device).eval()

    lines: list[dict[str, Any]] = []
    shown: list[tuple[Tensor, dict[str, Any]]] = []
    batches = read_batches(paths, read, size, failures)
    for files, images in track(batches, "predicting, batch", -(-len(paths) // size)):
        with torch.inference_mode():
            probability = model(images.to(device)).float().softmax(dim=-1).cpu()
        values, indices = probability.topk(min(TOP, len(names)))
        for i, file in enumerate(files):
            try:
                require_finite(values[i])
            except NotFiniteError as error:
                failures.append(Failure(file, str(error)))
                continue
            top = [
                {"class": names[index], "index": index, "probability": value}
                for value, index in zip(values[i].tolist(), indices[i].tolist(), strict=True)
            ]
            lines.append({"file": str(file), **top[0], "top": top})
            if len(shown) < SHEET_IMAGES:
                shown.append((images[i], top[0]))

    report(failures, read, len(lines))
    written = []
    if arguments.out is not None:
        failed = [{"file": str(failure.path), "error": failure.reason} for failure in failures]
        title = f"{len(shown)} of {len(lines)} images" if len(shown) < len(lines) else ""
        text, picture = (arguments.out / f"predictions.{ending}" for ending in ("jsonl", "png"))
        _write(text, [*lines, *failed])
        _draw(picture, shown, names, settings, title)
        written = [f"written to {text}", f"drawn in {picture}"]
    rows = [(line["file"], line["class"], f"{line['probability']:.1%}") for line in lines]
    print(table(("image", "class", "probability"), rows, left=("image", "class")))
    say(*written)


def _write(file: Path, lines: list[dict[str, Any]]) -> None:
    from fastvim.storage import write_text

    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(file, text)


def _draw(
    file: Path,
    shown: list[tuple[Tensor, dict[str, Any]]],
    names: list[str],
    settings: dict[str, Any],
    title: str,
) -> None:
    from fastvim.pictures.predictions import Prediction, draw_predictions
    from fastvim.storage import save_picture

    predictions = [
        Prediction(image, best["index"], None, best["probability"]) for image, best in shown
    ]
    sheet = draw_predictions(predictions, names, settings["mean"], settings["std"], title)
    save_picture(file, sheet)
