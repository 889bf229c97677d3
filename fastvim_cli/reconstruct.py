"""`fastvim reconstruct`: what a masked autoencoder makes of image files, a picture for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastvim_cli.arguments import (
    MOST_SEED,
    MOST_SIDE,
    Parser,
    at_least,
    number_where,
    usable_device,
)
from fastvim_cli.console import say
from fastvim_cli.images import add_images, chosen_images, chosen_reader, draw_each
from fastvim_cli.weights import add_model, load

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "mae_fastvim_base_patch16_224.in1k"


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim reconstruct",
        description="Hide most patches of each image, let a masked autoencoder predict them, and "
        "draw original, masked image, reconstruction, and reconstruction with the visible patches "
        "pasted in. Where the model predicts normalised patches (norm_pix_loss), a hidden patch's "
        "brightness and contrast are taken from the original.",
    )
    add = parser.add_argument
    add_model(parser, DEFAULT, checkpoint=True)
    help = "hidden part (default: the model's, 0.75)"
    part = number_where(lambda value: 0 <= value < 1, "at least 0, below 1")
    add("--mask-ratio", type=part, metavar="PART", help=help)
    help = "of the mask, the same for every image (default: 0)"
    add("--seed", type=at_least(0, MOST_SEED), default=0, metavar="N", help=help)
    help = "side in pixels (default: that of the training)"
    add("--size", type=at_least(1, MOST_SIDE), metavar="N", help=help)
    add_images(parser, "reconstructions", "NAME_reconstruction.png")
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim reconstruct --help`."""
    arguments = _parser().parse_intermixed_args(argv)

    from fastvim.data.inputs import Pictures, image_settings
    from fastvim.data.transforms import IMAGE_MODES, evaluation_transform
    from fastvim.errors import require_finite
    from fastvim.models import MaskedAutoencoder
    from fastvim.pictures.reconstruction import draw_reconstruction
    from fastvim.reconstruction import reconstruct
    from fastvim.storage import save_picture

    paths, failures = chosen_images(arguments)
    device = usable_device(arguments.device)
    model, metadata = load(arguments, "reconstruct")
    assert isinstance(model, MaskedAutoencoder)
    settings = image_settings(model, metadata)
    if arguments.size is not None:
        settings["img_size"] = arguments.size
    mean, std = settings["mean"], settings["std"]
    model = model.to(device).eval()

    def draw(path: Path, image: Tensor, target: Path) -> str:
        result = reconstruct(
            model, image, mean, std, mask_ratio=arguments.mask_ratio, seed=arguments.seed
        )
        require_finite(result.loss)
        save_picture(f"{target}_reconstruction.png", draw_reconstruction(result))
        return f"loss {result.loss:.4f}, drawn in {target}_reconstruction.png"

    reader = replace(chosen_reader(arguments, metadata), mode=IMAGE_MODES[settings["in_chans"]])
    read = Pictures(reader, evaluation_transform(**settings))
    say(*draw_each(paths, failures, read, "reconstructing", arguments.out, draw))
