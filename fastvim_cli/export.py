"""`fastvim export OUT`: a trained model as a file that runs without this library."""

from __future__ import annotations

from fastvim_cli.arguments import MOST_SIDE, Parser, UsageError, at_least, local_path
from fastvim_cli.console import say
from fastvim_cli.weights import add_model, chosen_model

DEFAULT = "fastvim_small_patch16_224.in1k"
MOST_BATCH = 1 << 16


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim export",
        description="Write a model as a program: .onnx for onnxruntime, OpenVINO and TensorRT, "
        ".pt2 for torch.export, .aoti.pt2 compiled for this kind of CPU by AOTInductor. It takes "
        "any number of images, of any size above a patch. Before it is written it is run at other "
        "sizes than it was made with, and compared with the model. fastvim predict, segment and "
        "reconstruct take the .onnx as --model.",
    )
    add = parser.add_argument
    add("target", metavar="OUT", type=local_path, help=".onnx, .pt2 or .aoti.pt2")
    add_model(parser, DEFAULT, checkpoint=True)
    add("--fixed", action="store_true", help="for one size and one number of images, see below")
    side = at_least(1, MOST_SIDE)
    help = "with --fixed: the images' (default: of the training)"
    add("--size", type=side, nargs=2, metavar=("H", "W"), help=help)
    help = "with --fixed: number of images (default: 1)"
    add("--batch-size", type=at_least(1, MOST_BATCH), metavar="N", help=help)
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim export --help`."""
    arguments = _parser().parse_args(argv)
    if not arguments.fixed and (arguments.size or arguments.batch_size):
        raise UsageError("--size and --batch-size: expected --fixed as well")

    from fastvim.export import export, training_size
    from fastvim.inference.models import load

    model, metadata = load(chosen_model(arguments))
    fixed = None
    if arguments.fixed:
        height, width = arguments.size or training_size(model)
        fixed = (arguments.batch_size or 1, height, width)
    made = export(model, metadata, arguments.target, fixed=fixed)
    say(f"{arguments.target}: a {made.task}, {made.size / 1e6:.1f} MB")
    say(f"  inputs            {', '.join(made.inputs)}")
    say(f"  outputs           {', '.join(made.outputs)}")
    say(f"  largest difference from the model {made.difference:.0e} of the largest value")
    if licence := metadata.get("licence"):
        say(f"  licence           {licence}")
