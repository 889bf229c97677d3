"""`fastvim segment`: the class of every pixel of image files, a picture and a PNG for each."""

from __future__ import annotations

from fastvim_cli.arguments import MOST_SIDE, Parser, at_least, number_where
from fastvim_cli.images import (
    add_images,
    conclude,
    print_status,
    reading,
    run_images,
    show_each,
)
from fastvim_cli.weights import add_model, chosen_model, first_word_as_model

MOST_SCALE = 100
OUT = "segments"
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
    add_images(parser, OUT, "the pictures")
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


def run(argv: list[str]) -> int:
    """Run the command; see `fastvim segment --help`."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.status is not None:
        return print_status(arguments.status)
    first_word_as_model(arguments)

    from fastvim.inference.segment import Segment

    work = Segment(
        chosen_model(arguments),
        **reading(arguments),
        window=arguments.window,
        stride=arguments.stride,
        scales=tuple(arguments.scales),
        flip=arguments.flip,
    )
    outcome = run_images(arguments, work, "segmenting", out=OUT)
    return conclude(arguments, outcome, show_each(arguments.out or OUT))
