"""`fastvim models`: what can be built, what it costs, and what computes it on this machine."""

from __future__ import annotations

import argparse

from fastvim_cli.arguments import MOST_SIDE, Parser, at_least
from fastvim_cli.console import table

DTYPES = ("float32", "float16", "bfloat16", "amp")


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim models",
        description="List the models of this library, or count what one of them costs: "
        "multiply-adds of products, convolutions and scans; elements that these and the four "
        "operations write; memory of tensors on a GPU. Nothing is run.",
    )
    sizes = parser.add_argument_group("of NAME")
    sizes.add_argument(
        "--size", nargs="+", metavar="PIXELS", help="a side, or height and width (default: its own)"
    )
    count = at_least(1, MOST_SIDE)
    sizes.add_argument("--batch", type=count, metavar="N", help="images (default: 1)")
    sizes.add_argument("--channels", type=count, metavar="N", help="of images of a channel model")
    sizes.add_argument(
        "--dtype", choices=DTYPES, help="amp: products alone in bfloat16 (default: float32)"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("name", metavar="NAME", nargs="?", help="count what this model costs")
    instead.add_argument("--engines", action="store_true", help="list the engine of each operation")
    instead.add_argument("--pretrained", action="store_true", help="list the published weights")
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim models --help`."""
    arguments = (parser := _parser()).parse_args(argv)
    given = [n for n in ("size", "batch", "channels", "dtype") if getattr(arguments, n) is not None]
    if arguments.name is None and given:
        parser.error(f"--{given[0]}: expected the NAME of a model as well")
    if arguments.name is not None:
        print(_costs(arguments))
    elif arguments.engines:
        print(_engines())
    else:
        print(_pretrained() if arguments.pretrained else _models())


def _costs(arguments: argparse.Namespace) -> str:
    from fastvim.benchmark.cases import parse_size
    from fastvim.benchmark.profile import describe

    name, size = arguments.name, arguments.size and parse_size("x".join(arguments.size))
    options = (arguments.batch or 1, size, arguments.dtype or "float32", arguments.channels)
    return table((name, ""), describe(name, *options), left=(name, ""))


def _models() -> str:
    import timm
    import torch

    from fastvim.benchmark.profile import image_size
    from fastvim.models import create_model
    from fastvim.models.masked import encoder_of
    from fastvim.registry import default_cfgs

    rows = []
    for name in timm.list_models(list(default_cfgs)):
        with torch.device("meta"):
            model = create_model(name)
        backbone = encoder_of(model)
        rows.append(
            (
                name,
                str(image_size(backbone)[0]),
                str(backbone.in_chans),
                str(backbone.patch_embed.patch_size),
                str(backbone.embed_dim),
                str(len(backbone.blocks)),
                f"{sum(parameter.numel() for parameter in model.parameters()):,}",
            )
        )
    return table(("model", "image", "channels", "patch", "width", "blocks", "parameters"), rows)


def _pretrained() -> str:
    from fastvim.weights.fetch import here
    from fastvim.weights.table import ENTRIES

    rows = []
    for entry in ENTRIES.values():
        file = here(entry.url)
        size = entry.megabytes if file is None else file.stat().st_size / 1e6
        rows.append(
            (
                entry.name,
                entry.task,
                entry.data,
                ", ".join(f"{metric} {value}" for metric, value in entry.number.items()) or "-",
                entry.licence,
                "-" if size is None else f"{size:.1f}",
                "no" if file is None else "yes",
            )
        )
    header = ("name", "task", "data", "published", "licence", "MB", "here")
    return table(header, rows, left=("name", "task", "data", "published", "licence"))


def _engines() -> str:
    import torch

    from fastvim.ops import engine_name
    from fastvim.ops.dispatch import OPS

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    header = ("operation", *devices)
    rows = [(op, *(engine_name(op, device) for device in devices)) for op in OPS]
    return table(header, rows, left=header)
