"""`fastvim models`: what can be built, and what computes it on this machine."""

from __future__ import annotations

from fastvim_cli.arguments import Parser
from fastvim_cli.console import table


def _parser() -> Parser:
    parser = Parser(prog="fastvim models", description="List the models of this library.")
    parser.add_argument(
        "--engines", action="store_true", help="list instead which engine serves each operation"
    )
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim models --help`."""
    print(_engines() if _parser().parse_args(argv).engines else _models())


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
                str(backbone.grid_size[0] * backbone.patch_embed.stride),
                str(backbone.in_chans),
                str(backbone.patch_embed.patch_size),
                str(backbone.embed_dim),
                str(len(backbone.blocks)),
                f"{sum(parameter.numel() for parameter in model.parameters()):,}",
            )
        )
    return table(("model", "image", "channels", "patch", "width", "blocks", "parameters"), rows)


def _engines() -> str:
    import torch

    from fastvim.ops import engine_name
    from fastvim.ops.dispatch import OPS

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    header = ("operation", *devices)
    rows = [(op, *(engine_name(op, device) for device in devices)) for op in OPS]
    return table(header, rows, left=header)
