"""`fastvim segment`: the class of every pixel of image files, a picture and a PNG for each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvim_cli.arguments import (
    MOST_SIDE,
    Parser,
    UsageError,
    at_least,
    number_where,
    usable_device,
)
from fastvim_cli.console import say
from fastvim_cli.images import add_images, chosen_images, chosen_reader, draw_each
from fastvim_cli.weights import add_model, first_word_as_model, load

if TYPE_CHECKING:
    from torch import Tensor

MOST_SCALE = 100
DEFAULT = "upernet_fastvim_small_patch16_512.ade20k"


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim segment",
        description="Label every pixel of image files of any size, as the test of a segmentor "
        "does: the image is resized as in its data, and predicted in overlapping windows. A first "
        "word that is a file of weights is taken for --model. "
        "NAME_overlay.png shows the classes over the image, with a legend; NAME_classes.png holds "
        "the index of each pixel's class, in the size of the image.",
    )
    add = parser.add_argument
    add_images(parser, "segments", "the pictures")
    add_model(parser, DEFAULT)
    help = "side of the windows (default: the training's)"
    add("--window", type=at_least(1, MOST_SIDE), metavar="N", help=help)
    help = "from one window to the next (default: the training's; two thirds of a --window)"
    add("--stride", type=at_least(1), metavar="N", help=help)
    help = "average over these factors on the sides of the image (default: 1)"
    expected = f"factors above 0, at most {MOST_SCALE}"
    factor = number_where(lambda value: 0 < value <= MOST_SCALE, expected)
    add("--scales", type=factor, nargs="+", default=[1.0], metavar="FACTOR", help=help)
    add("--flip", action="store_true", help="average over the mirror images as well")
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim segment --help`."""
    arguments = _parser().parse_intermixed_args(argv)
    first_word_as_model(arguments)

    import torch
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    from fastvim.data.dense_data import prepare_scene
    from fastvim.data.inputs import Pictures
    from fastvim.errors import require_finite
    from fastvim.models.heads.sliding import multi_scale_flip, sliding_window
    from fastvim.pictures.segmentation import draw_classes, index_image, legend
    from fastvim.storage import save_picture

    paths, failures = chosen_images(arguments)
    device = usable_device(arguments.device)
    required = ("mean", "std", "base_size", "class_names")
    model, metadata = load(arguments, "segment", *required)
    names = metadata["class_names"]
    settings = {name: metadata[name] for name in ("base_size", "mean", "std")}
    settings["antialias"] = metadata.get("antialias", True)
    model = model.to(device).eval()
    window, stride = _windows(arguments, metadata["segmentation"])

    def logits(images: Tensor) -> Tensor:
        if window is None:
            return model(images)
        return sliding_window(model, images, window, stride)

    @torch.inference_mode()
    def draw(path: Path, pixels: Tensor, target: Path) -> str:
        image = Image.fromarray(pixels[0].movedim(0, -1).numpy())
        prepared = prepare_scene(image, **settings)[None].to(device)
        size = (image.height, image.width)
        scores = multi_scale_flip(logits, prepared, size, arguments.scales, arguments.flip)
        require_finite(scores)
        classes = scores[0].argmax(dim=0).byte().cpu().numpy()
        save_picture(f"{target}_classes.png", index_image(classes, names))
        save_picture(f"{target}_overlay.png", draw_classes(image, classes, names))
        shares = ", ".join(entry.text for entry in legend([classes], names)[:3])
        return f"{shares}, drawn in {target}_overlay.png"

    read = Pictures(chosen_reader(arguments, metadata), pil_to_tensor)
    say(*draw_each(paths, failures, read, "segmenting", arguments.out, draw))


def _windows(arguments: argparse.Namespace, trained: dict[str, Any]) -> tuple[int | None, int]:
    """Side of the windows, None for the whole image at once, and from one to the next."""
    if arguments.window is None:
        if arguments.stride and trained["window"] is None:
            raise UsageError("--stride: this model sees whole images, expected --window as well")
        return trained["window"], arguments.stride or trained["stride"]
    return arguments.window, arguments.stride or max(1, round(arguments.window * 2 / 3))
