"""`fastvim channels`: accuracy of trained channel models on subsets of the channels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastvim_cli.arguments import Parser, add_device, at_least, local_path, usable_device
from fastvim_cli.console import say, table, track
from fastvim_cli.weights import add_options, model_choice

if TYPE_CHECKING:
    from fastvim.tasks.subsets import Subset

DESCRIPTION = """\
Accuracy of the same weights on all channels of a table's images, and on every subset of them.
"""


def _parser() -> Parser:
    parser = Parser(prog="fastvim channels", description=DESCRIPTION)
    add = parser.add_argument
    help = "weights: files, or published ones by name (fastvim models --pretrained)"
    add("checkpoints", nargs="+", metavar="NAME_OR_FILE", help=help)
    add("--root", required=True, metavar="DIR", help="of the images, as in the training's data")
    add("--table", default="table.csv", metavar="TABLE", help="default: table.csv")
    add("--split", choices=("val", "test"), default="val", help="default: val")
    add("--names", nargs="+", metavar="NAME", help="of the models (default: their folders')")
    add("--most", type=at_least(1), metavar="N", help="subsets of each size at most (default: all)")
    add("--batch-size", type=at_least(1), default=128, metavar="N")
    add("--num-workers", type=at_least(0), default=0, metavar="N")
    add_options(parser)
    add_device(parser)
    add("--out", type=local_path, metavar="DIR", help="writes channels.json and channels.png here")
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim channels --help`."""
    arguments = _parser().parse_args(argv)

    from fastvim.errors import UserError
    from fastvim.storage import save_figure, write_text
    from fastvim.tasks.subsets import draw_subsets
    from fastvim.weights import is_file_name

    names = arguments.names or [
        Path(each).resolve().parent.name if is_file_name(each) else each
        for each in arguments.checkpoints
    ]
    if len(set(names)) != len(arguments.checkpoints):
        raise UserError(f"--names {' '.join(names)}: expected a different one for each checkpoint")
    accuracies = {
        name: _evaluate(path, arguments)
        for name, path in zip(names, arguments.checkpoints, strict=True)
    }
    written_to = []
    if arguments.out is not None:
        record = {
            name: [{"channels": list(subset), "accuracy": value} for subset, value in found.items()]
            for name, found in accuracies.items()
        }
        write_text(arguments.out / "channels.json", json.dumps(record, indent=1) + "\n")
        title = "the same weights on every subset of the channels"
        save_figure(arguments.out / "channels.png", draw_subsets(accuracies, title), dpi=130)
        written_to = [f"written to {arguments.out}/channels.json and channels.png"]
    print(_table(accuracies))
    say(*written_to)


def _evaluate(path: str, arguments: argparse.Namespace) -> dict[Subset, float]:
    """The accuracies of one checkpoint."""
    from fastvim.data.channels import ChannelData
    from fastvim.data.classes import KnownClasses
    from fastvim.errors import UserError
    from fastvim.inference.models import load_for
    from fastvim.models import FastChannelVim
    from fastvim.tasks.subsets import channel_subsets, subset_accuracies
    from fastvim.weights import known_classes

    model, metadata = load_for(
        "channels", model_choice(path, arguments), ("mean", "std", "img_size")
    )
    assert isinstance(model, FastChannelVim)
    data = ChannelData(
        arguments.root,
        model.in_chans,
        tuple(metadata["mean"]),
        tuple(metadata["std"]),
        table=arguments.table,
        img_size=metadata["img_size"],
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        augment={"defocus": 0.0, "dropout": 0.0},  # unused here; too large for small images
    )
    names, _ = known_classes(metadata)  # none are published for JUMP-CP
    data.known = KnownClasses(path, names) if names else None
    data.setup("validate" if arguments.split == "val" else "test")
    if data.num_classes != model.num_classes:
        raise UserError(
            f"{path}: {model.num_classes} classes; {data.classes_from} has {data.num_classes}"
        )
    loader = data.val_dataloader() if arguments.split == "val" else data.test_dataloader()
    subsets = channel_subsets(model.in_chans, arguments.most)
    model = model.to(usable_device(arguments.device)).eval()
    batches = track(loader, f"{len(subsets)} subsets, batch", len(loader))
    return subset_accuracies(model, batches, subsets)


def _table(accuracies: dict[str, dict[Subset, float]]) -> str:
    """Mean, lowest and highest accuracy for each number of channels."""
    from fastvim.tasks.subsets import by_size

    columns = [by_size(found) for found in accuracies.values()]
    rows = []
    for size, subsets in columns[0].items():
        cells = []
        for values in (sizes[size] for sizes in columns):
            spread = f" ({min(values):.0%} to {max(values):.0%})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.1%}{spread}")
        rows.append((str(size), str(len(subsets)), *cells))
    return table(("channels", "subsets", *accuracies), rows, left=())
