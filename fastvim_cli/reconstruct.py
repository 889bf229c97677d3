"""`fastvim reconstruct`: what a masked autoencoder makes of image files, a picture for each."""

from __future__ import annotations

from fastvim_cli.arguments import MOST_SEED, MOST_SIDE, Parser, at_least, number_where
from fastvim_cli.images import (
    add_images,
    conclude,
    reading,
    run_images,
    show_each,
)
from fastvim_cli.weights import add_model, chosen_model

OUT = "reconstructions"
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
    add_images(parser, OUT, "NAME_reconstruction.png", parts=False)
    return parser


def run(argv: list[str]) -> int:
    """Run the command; see `fastvim reconstruct --help`."""
    arguments = _parser().parse_intermixed_args(argv)

    from fastvim.inference.reconstruct import Reconstruct

    work = Reconstruct(
        chosen_model(arguments),
        **reading(arguments),
        mask_ratio=arguments.mask_ratio,
        seed=arguments.seed,
        size=arguments.size,
    )
    outcome = run_images(arguments, work, "reconstructing", out=OUT)
    return conclude(arguments, outcome, show_each(arguments.out or OUT))
