"""`fastvim convert IN OUT`: published weights to a safetensors file, and back."""

from __future__ import annotations

import math
import os

from fastvim_cli.arguments import Parser, at_least, local_path, number_where
from fastvim_cli.console import say
from fastvim_cli.weights import add_options

LICENCE = "The published FastVim weights are CC-BY-NC-SA: not for commercial use, converted or not."

MAPS = "whose maps a segmentor or detector takes (default: evenly spread)"


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim convert",
        description="Translate published FastVim or Vim weights to one safetensors file of this "
        "library, or such a file back to published names and format. A segmentor or detector is "
        "taken whole. " + LICENCE,
    )
    parser.add_argument(
        "source",
        metavar="IN",
        type=os.path.expanduser,
        help="published .ckpt or .pth, .safetensors, or a name of `fastvim models --pretrained`",
    )
    parser.add_argument(
        "target",
        metavar="OUT",
        type=local_path,
        help=".safetensors (ours), .ckpt (published), or a folder for timm and transformers",
    )
    parser.add_argument("--model", metavar="NAME", help="name of the model (default: by its sizes)")
    parser.add_argument(
        "--backbone", action="store_true", help="of a segmentor or detector, the backbone alone"
    )
    add_options(parser)
    parser.add_argument(
        "--img-size", type=at_least(1), metavar="PIXELS", help="side it was trained at"
    )
    untold = parser.add_argument_group("what the weights cannot tell")
    untold.add_argument("--scan-path", choices=("row", "column"))
    untold.add_argument("--pooling", choices=("mean", "max", "none"))
    factor = number_where(lambda value: 0 < value < math.inf, "a number above 0")
    untold.add_argument("--pool-scale", type=factor, metavar="FACTOR")
    untold.add_argument("--out-indices", type=int, nargs="+", metavar="BLOCK", help=MAPS)
    untold.add_argument("--no-alternate", dest="alternate", action="store_false", default=None)
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim convert --help`."""
    arguments = vars(_parser().parse_args(argv))

    from fastvim.weights import convert

    source, target, model = (arguments.pop(key) for key in ("source", "target", "model"))
    ema, backbone = arguments.pop("ema"), arguments.pop("backbone")
    given = dict(arguments.pop("model_args"))
    given |= {option: value for option, value in arguments.items() if value is not None}
    found = convert(source, target, ema=ema, model=model, model_args=given, backbone=backbone)
    kind = {"EMA": "EMA weights", "raw": "weights without averaging"}
    heads = {
        "segmentation": f"a whole segmentor over {found['model']} (--backbone: that alone)",
        "detection": f"a whole detector over {found['model']} (--backbone: that alone)",
        "features": f"{found['model']}, the backbone of a segmentor or detector",
    }
    head = next((head for head in heads if head in found), None)
    what = found["model"] if head is None else heads[head]
    say(f"{source}: {kind.get(found['weights'], 'weights')} of {what}")
    for option, value in {**found["model_args"], **found.get(head or "", {})}.items():
        say(f"  {option:<17} {value}")
    say(f"written to {target}")
