"""`fastvim benchmark`: speed and memory of models, after a check of what they compute."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from fastvim_cli import fit_speed
from fastvim_cli.arguments import Parser, add_device, at_least, local_path, usable_device
from fastvim_cli.console import note, say, table, track

# Written out, so that the help page does not import torch. The tests compare them.
MODES = ("eager", "compiled", "graph", "compiled-graph")
DTYPES = ("float32", "float16", "bfloat16", "amp")

DESCRIPTION = """\
Time models of this library and of timm, with random weights, on random images.

Each is checked first: our models against their float32 reference (2 images of at most 512 pixels a
side; 224 in training, with the gradients), and each mode against the eager model on fresh images.
A row that fails is marked and not timed. The exit code is then 1.

Inference is the forward pass on images that lie on the device. Training (--train) is timed twice.
"images/s" is the bare step: forward pass, cross entropy in float32 and backward pass, with
gradients set to None before. As a graph it is captured whole, and checked in eval mode. "loop
images/s" is the loop that fastvim fit runs: the model's two passes (in mode graph as two graphs),
loss, AdamW and the average of the weights; uncompiled, over float32 weights (amp, float32).

Times are medians over --repeats groups of calls, each of 50 ms or more (20 on a CPU). Memory is the
most in live tensors, weights and a graph's own pool included. The roofline of our models is the
time of the blocks' large products and of moving the other bytes once.

fastvim benchmark --fit RECIPE times a run of fastvim fit instead (--fit RECIPE --help).
"""
EPILOGUE = """\
example:
  fastvim benchmark fastvim_tiny_patch16_224 vit_tiny_patch16_224 --size 224 512 1024 2048 \\
      --batch 128 32 8 2 --mode graph compiled-graph --out results.json --plot results.png
"""


def _parser() -> Parser:
    """Its values are the options of `fastvim.benchmark.Run`, and three more."""
    parser = Parser(
        prog="fastvim benchmark",
        description=DESCRIPTION,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="names, ours and timm's")
    help = "sides in pixels, or HEIGHTxWIDTH (default: 224)"
    add("--size", dest="sizes", nargs="+", default=["224"], metavar="N", help=help)
    help = "images at a time: one number, or one for each size (default: 32)"
    number: dict[str, Any] = {"type": at_least(1), "metavar": "N"}
    add("--batch", dest="batches", nargs="+", default=[32], **number, help=help)
    help = "amp: bfloat16 autocast over float32 weights (default: on CUDA bfloat16, for --train amp"
    add("--dtype", choices=DTYPES, help=f"{help}; elsewhere float32)")
    help = "graph: a captured CUDA graph (default on CUDA); compiled-graph: torch.compile, captured"
    add("--mode", dest="modes", nargs="+", choices=MODES, help=help)
    add("--train", action="store_true", help="time training: the bare step, and the loop of fit")
    add_device(parser)
    add("--engine", metavar="NAME", help="serve our operations by this engine, as use_engine does")
    add("--channels-last", action="store_true", help="memory format for convolutional models")
    add("--warmup", default=10, **number, help="untimed calls (default: 10)")
    add("--repeats", default=10, **number, help="timed groups of calls (default: 10)")
    add("--no-check", dest="check", action="store_false", help="time without checking")
    add("--no-roofline", "--no-floor", dest="roofline", action="store_false", help="leave it out")
    add("--out", type=local_path, metavar="FILE.json", help="results, written after every row")
    add("--append", action="store_true", help="keep the other rows of --out")
    add("--plot", type=local_path, metavar="FILE.png", help="picture of images/s against size")
    add("--markdown", action="store_true", help="print a Markdown table")
    add("--from", dest="source", type=local_path, metavar="FILE.json", help="show earlier results")
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim benchmark --help`."""
    if any(word.partition("=")[0] == "--fit" for word in argv):
        return fit_speed.run(argv)
    parser = _parser()
    options = vars(parser.parse_intermixed_args(argv))  # models may follow options
    source, picture, as_markdown = map(options.pop, ("source", "plot", "markdown"))
    if source is not None and options["models"]:
        parser.error(f"--from measures nothing: expected no models, got {options['models']}")
    if options["append"] and options["out"] is None:
        parser.error("--append needs --out FILE.json")
    if picture is not None:
        import matplotlib  # noqa: F401  # if it is missing, the measurements are not wasted
    options["device"] = usable_device(options["device"])

    from fastvim import benchmark

    def text() -> str:
        if as_markdown:
            return benchmark.markdown(rows).rstrip()
        columns = benchmark.columns(rows)
        cells = table(list(columns), zip(*columns.values(), strict=True), left=("model", "mode"))
        return f"{record.device}, {benchmark.subject(rows)}\n{cells}"

    if source is not None:
        record = benchmark.Record.load(source)
        rows = record.rows
    else:
        bench = benchmark.Run(**options, command=shlex.join(["fastvim", "benchmark", *argv]))
        record, rows = bench.record, bench.rows
        try:
            for row in track(bench.measure(), "measured", len(bench.cases)):
                if not sys.stderr.isatty():  # a log file: a line for each row
                    note(f"{benchmark.describe(row)}  {benchmark.rate(row)}")
        except KeyboardInterrupt:
            if rows:
                print(text())
            raise
    print(text())
    for row in (row for row in rows if row.failure is not None):
        note(f"{benchmark.describe(row)}: {row.failure}")
    if picture is not None:
        benchmark.draw(record, picture)
        say(f"drawn in {picture}")
    if source is None and any(row.wrong for row in rows):
        raise SystemExit(1)
