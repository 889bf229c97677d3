"""`fastvim benchmark`: speed and memory of models, after a check of what they compute."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from fastvim.benchmark import (
    MODES,
    PRECISIONS,
    Bench,
    Case,
    Record,
    Row,
    Settings,
    check_names,
    draw,
    markdown,
    parse_size,
)
from fastvim.benchmark.cases import size_name
from fastvim.benchmark.record import device_name, environment, rate_text
from fastvim.errors import UserError
from fastvim.ops import engine_name, use_engine
from fastvim.ops.dispatch import OPS
from fastvim_cli.arguments import Parser, usable_device

EXIT_WRONG = 1

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
    add("--batch", nargs="+", type=int, default=[32], metavar="N", help=help)
    help = (
        "amp: bfloat16 autocast over float32 weights (default: on CUDA bfloat16, with --train amp;"
    )
    add("--dtype", choices=list(PRECISIONS), help=f"{help} elsewhere float32)")
    help = "graph: one captured CUDA graph; compiled-graph: torch.compile, then captured"
    help += " (default: graph on CUDA, eager elsewhere)"
    add("--mode", nargs="+", choices=MODES, help=help)
    add("--train", action="store_true", help="time forward and backward")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, metavar="DEVICE", help=f"default: {device}")
    add("--engine", metavar="NAME", help="serve our operations by this engine, as use_engine does")
    add("--channels-last", action="store_true", help="memory format for convolutional models")
    add("--warmup", type=int, default=10, metavar="N", help="untimed calls (default: 10)")
    add("--repeats", type=int, default=10, metavar="N", help="timed groups of calls (default: 10)")
    add("--no-check", action="store_true", help="time without checking")
    add("--no-floor", action="store_true", help="leave out the floor of our models")
    add("--out", type=Path, metavar="FILE.json", help="results, written after every row")
    add("--append", action="store_true", help="keep the other rows that --out has")
    add("--plot", type=Path, metavar="FILE.png", help="picture of images/s against size")
    add("--markdown", action="store_true", help="print a Markdown table")
    help = "measure nothing: show, plot or print the results in this file"
    add("--from", dest="source", type=Path, metavar="FILE.json", help=help)
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim benchmark --help`."""
    # Intermixed: models may follow options.
    arguments = _parser().parse_intermixed_args(argv)
    console = Console(highlight=False)
    if arguments.source is not None:
        if arguments.models:
            raise UserError(f"--from measures nothing: expected no models, got {arguments.models}")
        record = Record.load(arguments.source)
        _show(console, record, record.rows, arguments)
        return
    settings, cases = _settings(arguments), _cases(arguments)
    bench = Bench(settings)
    for case in cases:
        bench.validate(case)
    record = _record(arguments, settings)
    command = shlex.join(["fastvim", "benchmark", *argv])
    with _engine(arguments.engine):
        record.runs.append(environment(command, _engines(settings)))
        rows = _measure(bench, cases, record, arguments.out, console)
    _show(console, record, rows, arguments)
    if any(row.wrong for row in rows):
        raise SystemExit(EXIT_WRONG)


def _settings(arguments: argparse.Namespace) -> Settings:
    for name, value in (("warmup", arguments.warmup), ("repeats", arguments.repeats)):
        if value < 1:
            raise UserError(f"--{name} {value}: expected 1 or more")
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
    if not arguments.models:
        raise UserError("expected the name of at least one model; fastvim models lists ours")
    check_names(arguments.models)
    sizes = [parse_size(text) for text in arguments.size]
    batches = arguments.batch
    if min(batches) < 1:
        raise UserError(f"--batch {min(batches)}: expected 1 or more")
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
    with ExitStack() as stack:
        if name is not None:
            try:
                stack.enter_context(use_engine(name))
            except ValueError as error:
                raise UserError(str(error)) from error
        yield


def _engines(settings: Settings) -> dict[str, str]:
    """What serves each operation of our models in this run."""
    device, dtype = settings.device.type, settings.precision.products
    return {op: engine_name(op, device, dtype) for op in OPS}


def _measure(
    bench: Bench, cases: list[Case], record: Record, out: Path | None, console: Console
) -> list[Row]:
    """Measure the cases, writing each row at once; an interruption shows what there is."""
    errors = Console(stderr=True, highlight=False)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    rows: list[Row] = []
    try:
        with progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                description = f"{case.model}  {size_name(case.size)} ({case.batch})  {case.mode}"
                progress.update(task, description=description)
                rows.append(bench.measure(case))
                record.add(rows[-1])
                if out is not None:
                    record.save(out)
                progress.advance(task)
                if not errors.is_terminal:  # a log file: a line for each row instead of the bar
                    errors.print(f"{description}  {_rate(rows[-1])}", soft_wrap=True)
    except KeyboardInterrupt:
        if rows:
            console.print(_table(rows))
        kept = f"the rows so far are in {out}" if rows and out is not None else ""
        raise KeyboardInterrupt(kept) from None
    return rows


def _show(console: Console, record: Record, rows: list[Row], arguments: argparse.Namespace) -> None:
    """Table or Markdown of the rows; picture of all in the record."""
    if arguments.markdown:
        sys.stdout.write(markdown(rows))
    else:
        console.print(f"{record.device}, {_common(rows)}", markup=False)
        console.print(_table(rows))
    errors = Console(stderr=True, highlight=False)
    for row in rows:
        if row.failure is not None:
            where = f"{row.model} {size_name(row.size)} ({row.batch}) {row.mode}"
            errors.print(f"{where}: {row.failure}", markup=False, soft_wrap=True, style="red")
    if arguments.plot is not None:
        draw(record, arguments.plot)
        console.print(f"drawn in {arguments.plot}", markup=False, soft_wrap=True)


def _common(rows: Iterable[Row]) -> str:
    words = {(row.dtype, "training step" if row.train else "inference") for row in rows}
    return "; ".join(", ".join(pair) for pair in sorted(words))


def _table(rows: list[Row]) -> Table:
    """One line per row; columns that no row has are left out."""
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
    table = Table(*shown, box=None)
    for column in table.columns:
        column.justify = "left" if column.header in ("model", "mode") else "right"
        column.no_wrap = True
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    return table


def _rate(row: Row) -> str:
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
