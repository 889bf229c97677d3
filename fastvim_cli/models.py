"""`fastvim models`: what can be built, and what computes it on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvim_cli.arguments import Parser
from fastvim_cli.console import table

if TYPE_CHECKING:
    from fastvim.models import FastVim


def _parser() -> Parser:
    parser = Parser(prog="fastvim models", description="List the models of this library.")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--engines", action="store_true", help="list instead which engine serves each operation"
    )
    instead.add_argument(
        "--pretrained", action="store_true", help="list instead the published weights"
    )
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim models --help`."""
    arguments = _parser().parse_args(argv)
    if arguments.engines:
        print(_engines())
    else:
        print(_pretrained() if arguments.pretrained else _models())


def _models() -> str:
    import timm
    import torch

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
                str(_side(backbone)),
                str(backbone.in_chans),
                str(backbone.patch_embed.patch_size),
                str(backbone.embed_dim),
                str(len(backbone.blocks)),
                f"{sum(parameter.numel() for parameter in model.parameters()):,}",
            )
        )
    return table(("model", "image", "channels", "patch", "width", "blocks", "parameters"), rows)


def _side(backbone: FastVim) -> int:
    """Pixels of a side of the images that the position embedding is made for."""
    patches = backbone.patch_embed
    return (backbone.grid_size[0] - 1) * patches.stride + patches.patch_size


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
