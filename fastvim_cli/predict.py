"""`fastvim predict`: classes of image files, to the terminal, a file and a picture.

Channel models read every file that `fastvim.data.arrays` does, with all of their channels.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fastvim_cli.arguments import Parser, at_least
from fastvim_cli.console import table
from fastvim_cli.images import MOST_LINES, add_images, conclude, print_status, reading, run_images
from fastvim_cli.imports import without_collections
from fastvim_cli.weights import add_model, chosen_model

if TYPE_CHECKING:
    from fastvim.inference.parts.run import Outcome
    from fastvim.inference.parts.work import Row

DEFAULT = "fastvim_small_patch16_224.in1k"
MOST_CLASSES = 20  # that are counted one by one


def _parser() -> Parser:
    parser = Parser(prog="fastvim predict", description="Classify image files.")
    add = parser.add_argument
    add_model(parser, DEFAULT, checkpoint=True)
    help = "default: 32, on a GPU 128 if they are of at most 256 pixels a side"
    add("--batch-size", type=at_least(1), metavar="N", help=help)
    help = (
        "who decodes JPEG files: Pillow (cpu, the default), or the GPU, in batches, with "
        "probabilities that differ a little; auto: the GPU where there is one that can"
    )
    add("--decode", choices=("cpu", "gpu", "auto"), default="cpu", help=help)
    add_images(parser, None, "predictions.jsonl and predictions.png")
    return parser


def run(argv: list[str]) -> int:
    """Run the command; see `fastvim predict --help`."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.status is not None:
        return print_status(arguments.status)

    with without_collections():
        from fastvim.inference.classify import Classify
        from fastvim.inference.inputs import ALL_ENDINGS

    work = Classify(
        chosen_model(arguments),
        **reading(arguments),
        batch_size=arguments.batch_size,
        decode=arguments.decode,
    )
    outcome = run_images(arguments, work, "predicting", endings=ALL_ENDINGS)
    return conclude(arguments, outcome, _show)


def _show(outcome: Outcome, first: list[Row]) -> None:
    """The best class of each image; of many images, how often each class is the best one."""
    if outcome.images <= MOST_LINES:
        lines = [(row["path"], row["class"], f"{row['probability']:.1%}") for row in first]
        print(table(("image", "class", "probability"), lines, left=("image", "class")))
        return
    counts = Counter(row["class"] for row in outcome.rows() if row["error"] is None)
    best = [(name, f"{count:,}") for name, count in counts.most_common(MOST_CLASSES)]
    if rest := sum(counts.values()) - sum(count for _, count in counts.most_common(MOST_CLASSES)):
        best.append((f"{len(counts) - MOST_CLASSES} more classes", f"{rest:,}"))
    print(table(("class", "images"), best))
