"""`fastvim channels`: accuracy of trained channel models on subsets of the channels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fastvim.data.channels import ChannelData
from fastvim.errors import UserError
from fastvim.models import FastChannelVim
from fastvim.tasks.subsets import (
    Subset,
    by_size,
    channel_subsets,
    draw_subsets,
    subset_accuracies,
)
from fastvim.weights import load_model
from fastvim_cli.arguments import Parser, usable_device

DESCRIPTION = """\
Accuracy of the same weights on all channels of a table's images, and on every subset of them.
"""


def _parser() -> Parser:
    parser = Parser(prog="fastvim channels", description=DESCRIPTION)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="weights written by fastvim fit")
    add("--root", required=True, metavar="DIR", help="of the images, as in the training's data")
    add("--table", default="table.csv", metavar="TABLE", help="default: table.csv")
    add("--split", choices=("val", "test"), default="val", help="default: val")
    add("--names", nargs="+", metavar="NAME", help="of the models (default: their folders')")
    add("--most", type=int, metavar="N", help="subsets of each size at most (default: all)")
    add("--batch-size", type=int, default=128, metavar="N")
    add("--num-workers", type=int, default=0, metavar="N")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="DEVICE")
    add("--out", type=Path, metavar="DIR", help="writes channels.json and channels.png here")
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim channels --help`."""
    arguments = _parser().parse_args(argv)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    names = arguments.names or [Path(path).resolve().parent.name for path in arguments.checkpoints]
    if len(set(names)) != len(arguments.checkpoints):
        raise UserError(f"--names {' '.join(names)}: expected a different one for each checkpoint")
    accuracies: dict[str, dict[Subset, float]] = {}
    for name, path in zip(names, arguments.checkpoints, strict=True):
        accuracies[name] = _evaluate(path, arguments, errors)
    console.print(_table(accuracies))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        record = {
            name: [{"channels": list(subset), "accuracy": value} for subset, value in of.items()]
            for name, of in accuracies.items()
        }
        (arguments.out / "channels.json").write_text(json.dumps(record, indent=1) + "\n")
        title = "the same weights on every subset of the channels"
        draw_subsets(accuracies, title).savefig(arguments.out / "channels.png", dpi=130)
        console.print(f"written to {arguments.out}/channels.json and channels.png")


def _evaluate(path: str, arguments: Any, errors: Console) -> dict[Subset, float]:
    """The accuracies of one checkpoint."""
    model, metadata = load_model(path=path)
    if not isinstance(model, FastChannelVim):
        raise UserError(f"{path}: {metadata['model']} takes all channels at once")
    if missing := {"mean", "std", "img_size", "class_names"} - metadata.keys():
        raise UserError(f"{path} does not say {min(missing)}: expected weights of fastvim fit")
    data = ChannelData(
        arguments.root,
        model.in_chans,
        tuple(metadata["mean"]),
        tuple(metadata["std"]),
        table=arguments.table,
        img_size=metadata["img_size"],
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        augment={"dropout": 0.0},  # whose holes may be larger than the images, unused here
    )
    data.setup("validate" if arguments.split == "val" else "test")
    if data.class_names != metadata["class_names"]:
        raise UserError(f"{path}: trained on other classes than the table has")
    loader = data.val_dataloader() if arguments.split == "val" else data.test_dataloader()
    subsets = channel_subsets(model.in_chans, arguments.most)
    model = model.to(usable_device(arguments.device)).eval()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        quiet = not errors.is_terminal
        yield from track(
            loader, f"{len(subsets)} subsets", console=errors, transient=True, disable=quiet
        )

    return subset_accuracies(model, batches(), subsets)


def _table(accuracies: dict[str, dict[Subset, float]]) -> Table:
    """Mean, least and best accuracy of every number of channels."""
    table = Table("channels", "subsets", *accuracies, box=None)
    for column in table.columns:
        column.justify = "right"
    columns = [by_size(of) for of in accuracies.values()]
    for size in columns[0]:
        cells = []
        for sizes in columns:
            values = sizes[size]
            mean = f"{np.mean(values):.1%}"
            spread = f" ({min(values):.0%} to {max(values):.0%})" if len(values) > 1 else ""
            cells.append(mean + spread)
        table.add_row(str(size), str(len(columns[0][size])), *cells)
    return table
