"""`fastvim benchmark`: speed and memory of models, after a check of what they compute."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastvim_cli.arguments import Parser, add_device, at_least, local_path, usable_device
from fastvim_cli.console import note, table, track

if TYPE_CHECKING:
    from fastvim.benchmark import Bench, Case, Record, Row, Settings

EXIT_WRONG = 1

# Those of `fastvim.benchmark`, which imports torch; a test compares.
MODES = ("eager", "compiled", "graph", "compiled-graph")
DTYPES = ("float32", "float16", "bfloat16", "amp")

DESCRIPTION = """\
Time models of this library and of timm, at random weights on random images.

Each is checked first: our models beside their float32 definitions (2 images of at most 512 pixels
a side; 224 in training, with the gradients), and each mode beside the eager model on fresh images.
A row that fails is marked and not timed, and the exit code is then 1.

Inference is the forward pass on images that lie on the device. A training step (--train) is the
forward pass, cross entropy in float32 and the backward pass, with gradients set to None before; no
optimizer. As a graph it is captured whole, and a replay writes the gradients anew; it is checked as
captured in eval mode, timed as captured in train mode. Times are medians over --repeats groups of
calls, each of 50 ms or more (20 on a CPU). Memory is the most in live tensors, weights and a
graph's own pool included. The floor of our models is the time of the blocks' large products and of
moving the other bytes once.
"""
EPILOGUE = """\
example:
  fastvim benchmark fastvim_tiny_patch16_224 vit_tiny_patch16_224 --size 224 512 1024 2048 \\
      --batch 128 32 8 2 --mode graph compiled-graph --out results.json --plot results.png
"""


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim benchmark",
        description=DESCRIPTION,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="names, ours and timm's")
    help = "sides in pixels, or HEIGHTxWIDTH (default: 224)"
    add("--size", nargs="+", default=["224"], metavar="N", help=help)
    help = "images at a time: one number, or one for each size (default: 32)"
    add("--batch", nargs="+", type=at_least(1), default=[32], metavar="N", help=help)
    help = (
        "amp: bfloat16 autocast over float32 weights (default: on CUDA bfloat16, with --train amp;"
    )
    add("--dtype", choices=DTYPES, help=f"{help} elsewhere float32)")
    help = "graph: one captured CUDA graph; compiled-graph: torch.compile, then captured"
    help += " (default: graph on CUDA, eager elsewhere)"
    add("--mode", nargs="+", choices=MODES, help=help)
    add("--train", action="store_true", help="time forward and backward")
    add_device(parser)
    add("--engine", metavar="NAME", help="serve our operations by this engine, as use_engine does")
    add("--channels-last", action="store_true", help="memory format for convolutional models")
    add("--warmup", type=at_least(1), default=10, metavar="N", help="untimed calls (default: 10)")
    add(
        "--repeats",
        type=at_least(1),
        default=10,
        metavar="N",
        help="timed groups of calls (default: 10)",
    )
    add("--no-check", action="store_true", help="time without checking")
    add("--no-floor", action="store_true", help="leave out the floor of our models")
    add("--out", type=local_path, metavar="FILE.json", help="results, written after every row")
    add("--append", action="store_true", help="keep the other rows that --out has")
    add("--plot", type=local_path, metavar="FILE.png", help="picture of images/s against size")
    add("--markdown", action="store_true", help="print a Markdown table")
    help = "measure nothing: show, plot or print the results in this file"
    add("--from", dest="source", type=local_path, metavar="FILE.json", help=help)
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim benchmark --help`."""
    # Intermixed: models may follow options.
    arguments = _parser().parse_intermixed_args(argv)

    from fastvim.benchmark import Bench, Record
    from fastvim.benchmark.record import environment
    from fastvim.errors import UserError

    if arguments.source is not None:
        if arguments.models:
            raise UserError(f"--from measures nothing: expected no models, got {arguments.models}")
        record = Record.load(arguments.source)
        _show(record, record.rows, arguments)
        return
    settings, cases = _settings(arguments), _cases(arguments)
    bench = Bench(settings)
    for case in cases:
        bench.validate(case)
    record = _record(arguments, settings)
    command = shlex.join(["fastvim", "benchmark", *argv])
    with _engine(arguments.engine):
        record.runs.append(environment(command, _engines(settings)))
        rows = _measure(bench, cases, record, arguments.out)
    _show(record, rows, arguments)
    if any(row.wrong for row in rows):
        raise SystemExit(EXIT_WRONG)


def _settings(arguments: argparse.Namespace) -> Settings:
    from fastvim.benchmark import Settings

    device = usable_device(arguments.device)
    default = "amp" if arguments.train else "bfloat16"
    return Settings(
        device=device,
        dtype=arguments.dtype or (default if device.type == "cuda" else "float32"),
        train=arguments.train,
        channels_last=arguments.channels_last,
        warmup=arguments.warmup,
        repeats=arguments.repeats,
        check=not arguments.no_check,
        floor=not arguments.no_floor,
    )


def _cases(arguments: argparse.Namespace) -> list[Case]:
    """Every model at every size in every mode; a model's modes follow one another."""
    from fastvim.benchmark import Case, check_names, parse_size
    from fastvim.errors import UserError

    if not arguments.models:
        raise UserError("expected the name of at least one model; fastvim models lists ours")
    check_names(arguments.models)
    sizes = [parse_size(text) for text in arguments.size]
    batches = arguments.batch
    if len(batches) == 1:
        batches = batches * len(sizes)
    if len(batches) != len(sizes):
        raise UserError(
            f"{len(batches)} numbers for --batch, {len(sizes)} for --size: expected one for each "
            "size, or one for all"
        )
    on_cuda = usable_device(arguments.device).type == "cuda"
    modes = arguments.mode or ["graph" if on_cuda else "eager"]
    return [
        Case(model, size, batch, mode)
        for model in dict.fromkeys(arguments.models)
        for size, batch in zip(sizes, batches, strict=True)
        for mode in dict.fromkeys(modes)
    ]


def _record(arguments: argparse.Namespace, settings: Settings) -> Record:
    """An empty record, or the one to append to."""
    from fastvim.benchmark import Record
    from fastvim.benchmark.record import device_name
    from fastvim.errors import UserError

    device = device_name(settings.device)
    if not arguments.append:
        return Record(device)
    if arguments.out is None:
        raise UserError("--append needs --out FILE.json")
    if not arguments.out.exists():
        return Record(device)
    record = Record.load(arguments.out)
    if record.device != device:
        raise UserError(f"{arguments.out} was measured on {record.device}, this is {device}")
    return record


@contextmanager
def _engine(name: str | None) -> Iterator[None]:
    """That engine, or with None whichever serves by itself."""
    from fastvim.errors import UserError
    from fastvim.ops import use_engine

    with ExitStack() as stack:
        if name is not None:
            try:
                stack.enter_context(use_engine(name))
            except ValueError as error:
                raise UserError(str(error)) from error
        yield


def _engines(settings: Settings) -> dict[str, str]:
    """What serves each operation of our models in this run."""
    from fastvim.ops import engine_name
    from fastvim.ops.dispatch import OPS

    device, dtype = settings.device.type, settings.precision.products
    return {op: engine_name(op, device, dtype) for op in OPS}


def _measure(bench: Bench, cases: list[Case], record: Record, out: Path | None) -> list[Row]:
    """Measure the cases, writing each row at once; an interruption shows what there is."""
    from fastvim.benchmark.cases import size_name

    rows: list[Row] = []
    try:
        for case in track(cases, "measuring", len(cases)):
            rows.append(bench.measure(case))
            record.add(rows[-1])
            if out is not None:
                record.save(out)
            if not sys.stderr.isatty():  # a log file: a line for each row
                where = f"{case.model}  {size_name(case.size)} ({case.batch})  {case.mode}"
                note(f"{where}  {_rate(rows[-1])}")
    except KeyboardInterrupt:
        if rows:
            print(_table(rows))
        kept = f"the rows so far are in {out}" if rows and out is not None else ""
        raise KeyboardInterrupt(kept) from None
    return rows


def _show(record: Record, rows: list[Row], arguments: argparse.Namespace) -> None:
    """Table or Markdown of the rows; picture of all in the record."""
    from fastvim.benchmark import draw, markdown
    from fastvim.benchmark.cases import size_name

    if arguments.markdown:
        sys.stdout.write(markdown(rows))
    else:
        print(f"{record.device}, {_common(rows)}")
        print(_table(rows))
    for row in rows:
        if row.failure is not None:
            note(f"{row.model} {size_name(row.size)} ({row.batch}) {row.mode}: {row.failure}")
    if arguments.plot is not None:
        draw(record, arguments.plot)
        print(f"drawn in {arguments.plot}")


def _common(rows: Iterable[Row]) -> str:
    words = {(row.dtype, "training step" if row.train else "inference") for row in rows}
    return "; ".join(", ".join(pair) for pair in sorted(words))


def _table(rows: list[Row]) -> str:
    """One line per row; columns that no row has are left out."""
    from fastvim.benchmark.cases import size_name

    columns = {
        "model": [row.model for row in rows],
        "image": [size_name(row.size) for row in rows],
        "batch": [str(row.batch) for row in rows],
        "mode": [row.mode for row in rows],
        "images/s": [_rate(row) for row in rows],
        "ms": [_number(row.latency_ms, ",.2f") for row in rows],
        "GiB": [_number(row.memory_gib, ".2f") for row in rows],
        "error": [_number(_error(row), ".0e") for row in rows],
        "share of floor": [_number(row.share_of_floor, ".0%") for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    return table(list(shown), list(zip(*shown.values(), strict=True)), left=("model", "mode"))


def _rate(row: Row) -> str:
    from fastvim.benchmark.record import rate_text

    if row.images_per_second is not None and row.failure is None:
        return rate_text(row.images_per_second)
    return "failed" if row.wrong else "out of memory"


def _error(row: Row) -> float | None:
    """The larger of the errors found."""
    return max(
        (error for error in (row.engine_error, row.mode_error) if error is not None), default=None
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
