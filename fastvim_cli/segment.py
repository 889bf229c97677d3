"""`fastvim segment`: the class of every pixel of image files, a picture and a PNG for each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from fastvim.data.segmentation import EvaluationTransform
from fastvim.errors import UserError
from fastvim.models.heads.sliding import multi_scale_flip, sliding_window
from fastvim.models.heads.upernet import UPerNet
from fastvim.tasks.pictures.segmentation import draw_classes, index_image, legend
from fastvim_cli.arguments import Parser, usable_device
from fastvim_cli.images import (
    find_images,
    free_stem,
    load_trained,
    read_upright,
    report_failures,
)

TOLD = ("mean", "std", "base_size", "class_names")  # in the file, beside the weights


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim segment",
        description="Label every pixel of image files of any size, as the test of a trained model "
        "does: the image is resized as in its data, and predicted in overlapping windows. "
        "NAME_overlay.png shows the classes over the image, with a legend; NAME_classes.png holds "
        "the index of each pixel's class, in the size of the image.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="weights of a segmentation model of fastvim fit")
    add("images", nargs="+", metavar="IMAGES", help="files, folders or globs")
    add(
        "--out",
        default=Path("segments"),
        metavar="DIR",
        type=Path,
        help="writes the pictures here (default: segments)",
    )
    add("--window", type=int, metavar="N", help="side of the windows (default: the training's)")
    help = "from one window to the next (default: the training's; two thirds of a --window)"
    add("--stride", type=int, metavar="N", help=help)
    help = "average over these factors on the sides of the image (default: 1)"
    add("--scales", type=float, nargs="+", default=[1.0], metavar="FACTOR", help=help)
    add("--flip", action="store_true", help="average over the mirror images as well")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="DEVICE")
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim segment --help`."""
    arguments = _parser().parse_args(argv)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if min(arguments.scales) <= 0:
        raise UserError(f"--scales {min(arguments.scales):g}: expected factors above 0")
    for name in ("window", "stride"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            raise UserError(f"--{name} {given}: expected at least 1")
    paths, failures = find_images(arguments.images)
    model, metadata = load_trained(arguments.checkpoint, UPerNet, "segmentation", TOLD)
    names = metadata["class_names"]
    transform = EvaluationTransform(metadata["base_size"], metadata["mean"], metadata["std"])
    model = model.to(usable_device(arguments.device)).eval()
    window, stride = _windows(arguments, metadata["segmentation"])

    @torch.inference_mode()
    def classes_of(image: Image.Image) -> np.ndarray:
        """The class of each pixel, (H, W)."""

        def logits(version: Tensor) -> Tensor:
            if window is None:
                return model(version)
            return sliding_window(model, version, window, stride)

        prepared = transform.prepare(image)[None].to(arguments.device)
        size = (image.height, image.width)
        scores = multi_scale_flip(logits, prepared, size, arguments.scales, arguments.flip)
        return scores[0].argmax(dim=0).byte().cpu().numpy()

    lines: list[str] = []
    taken: set[str] = set()
    for path, image in read_upright(paths, failures, errors, "segmenting"):
        classes = classes_of(image)
        stem = free_stem(path, taken)
        arguments.out.mkdir(parents=True, exist_ok=True)
        index_image(classes, names).save(arguments.out / f"{stem}_classes.png")
        drawn = arguments.out / f"{stem}_overlay.png"
        draw_classes(image, classes, names).save(drawn)
        shares = ", ".join(entry.text for entry in legend([classes], names)[:3])
        lines.append(f"{path}: {shares}, drawn in {drawn}")

    report_failures(failures, errors, read=len(lines))
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _windows(arguments: argparse.Namespace, trained: dict[str, Any]) -> tuple[int | None, int]:
    """Side of the windows, None for the whole image at once, and from one to the next."""
    if arguments.window is None:
        return trained["window"], arguments.stride or trained["stride"]
    return arguments.window, arguments.stride or max(1, round(arguments.window * 2 / 3))
