"""`fastvim detect`: boxes and masks of the objects in image files, a picture for each and JSON."""

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

OUT = "detections"
DEFAULT = "cascade_mask_rcnn_fastvim_small_patch16_1024.coco"


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim detect",
        description="Find the objects in image files of any size, as the test of a detector does. "
        "NAME_detections.png shows boxes, masks, classes and scores; detections.json holds all "
        "results in COCO's format, in the pixels of the images, and the name of each file. A "
        "first word that is a file of weights is taken for --model.",
    )
    add = parser.add_argument
    add_images(parser, OUT, "the pictures and the results")
    add_model(parser, DEFAULT)
    help = "draw and count what has at least this score (default: 0.5); the results hold all"
    score = number_where(lambda value: 0 <= value <= 1, "0 to 1")
    add("--score", type=score, default=0.5, metavar="SCORE", help=help)
    help = "longer side that an image is resized to (default: the evaluation's)"
    add("--img-size", type=at_least(1, MOST_SIDE), metavar="N", help=help)
    return parser


def run(argv: list[str]) -> int:
    """Run the command; see `fastvim detect --help`."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.status is not None:
        return print_status(arguments.status)
    first_word_as_model(arguments)

    from fastvim.inference.detect import Detect

    work = Detect(
        chosen_model(arguments),
        **reading(arguments),
        score=arguments.score,
        img_size=arguments.img_size,
    )
    outcome = run_images(arguments, work, "detecting", out=OUT)
    return conclude(arguments, outcome, show_each(arguments.out or OUT))
