"""`fastvim models`: what can be built, and what computes it on this machine."""

from __future__ import annotations

import timm
import torch
from rich.console import Console
from rich.table import Table

from fastvim.models import create_model
from fastvim.models.masked import encoder_of
from fastvim.ops import engine_name
from fastvim.ops.dispatch import OPS
from fastvim_cli.arguments import Parser

FAMILIES = ("fastvim_*", "vim_*", "mae_fastvim_*", "mae_vim_*")


def _parser() -> Parser:
    parser = Parser(prog="fastvim models", description="List the models of this library.")
    parser.add_argument(
        "--engines", action="store_true", help="list instead which engine serves each operation"
    )
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim models --help`."""
    console = Console(highlight=False)
    console.print(_engines() if _parser().parse_args(argv).engines else _models())


def _models() -> Table:
    table = Table("model", "image", "patch", "width", "blocks", "parameters", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in timm.list_models(list(FAMILIES)):
        with torch.device("meta"):
            model = create_model(name)
        backbone = encoder_of(model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        table.add_row(
            name,
            str(backbone.grid_size[0] * backbone.patch_embed.stride),
            str(backbone.patch_embed.patch_size),
            str(backbone.embed_dim),
            str(len(backbone.blocks)),
            f"{parameters:,}",
        )
    return table


def _engines() -> Table:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    table = Table("operation", *devices, box=None)
    for op in OPS:
        table.add_row(op, *(engine_name(op, device) for device in devices))
    return table
