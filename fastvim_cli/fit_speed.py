"""`fastvim benchmark --fit RECIPE`: a run's loader and step, alone and together."""

from __future__ import annotations

import argparse
import json
import shlex

from fastvim_cli.arguments import Parser, at_least, local_path, number_where
from fastvim_cli.console import say, table

DESCRIPTION = """\
Time a run of fastvim fit: its loader alone, its step alone (on batches that lie on the device), and
both together, and name what it waits for. It is the run itself, with its data, task, callbacks,
precision and capture, for some seconds; nothing of it is kept. Without --data.root it trains on
JPEG files of 500 x 375 pixels that are made for it, with a spectrum like photographs'.

Any value of the recipe can be overridden, as in fastvim fit: --data.num_workers 8, --data.decode
cpu, --model.capture false, --trainer.accelerator cpu.
"""
EPILOGUE = """\
example:
  fastvim benchmark --fit recipes/imagenet/fastvim_tiny.yaml --data.root /path/to/imagenet
"""


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim benchmark",
        usage="fastvim benchmark --fit RECIPE [--data.root DIR] [OPTION …]",
        description=DESCRIPTION,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    help = "a recipe: a file, or its name below recipes/, as imagenet/fastvim_tiny"
    add("--fit", metavar="RECIPE", required=True, help=help)
    positive = number_where(lambda seconds: 0 < seconds < 1e6, "a number above 0")
    help = "for which each part is timed after its warm-up, at least 3 batches (default: 10)"
    add("--seconds", type=positive, default=10.0, metavar="S", help=help)
    help = "files to make without --data.root (default: 1024), each listed several times"
    add("--images", type=at_least(64), default=1024, metavar="N", help=help)
    add("--out", type=local_path, metavar="FILE.json", help="device, versions, command and figures")
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim benchmark --fit RECIPE --help`."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    for word in overrides:
        if word.startswith("-") and not word.startswith(("--data", "--model", "--trainer")):
            parser.error(f"unrecognized arguments: {word}")

    from fastvim.benchmark.record import device_name, environment
    from fastvim.storage import write_text
    from fastvim_cli.train import time_fit

    speed, device = time_fit(arguments.fit, overrides, arguments.seconds, arguments.images)
    name = device_name(device)
    rows = [("loader alone", speed.loader, ""), ("step alone", speed.step, "")]
    if speed.host is not None:
        rows.append(("step, the host's part", speed.host, ""))
    rows.append(("fit: both", speed.both, f"{speed.waiting / speed.both:.0%}"))
    cells = [
        (part, f"{speed.rate(value):,.0f}", f"{value:,.2f}", waiting)
        for part, value, waiting in rows
    ]
    say(f"{name}, batches of {speed.batch_size}")
    print(table(("", "images/s", "ms a batch", "waiting"), cells))
    print(speed.sentence())
    if arguments.out is not None:
        command = shlex.join(["fastvim", "benchmark", *argv])
        record = {"device": name, **environment(command, {}), **speed.record()}
        write_text(arguments.out, json.dumps(record, indent=1) + "\n")
