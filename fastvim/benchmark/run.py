"""A run of several cases, and the record of their results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from fastvim.benchmark.cases import Case, Settings, check_names, parse_size
from fastvim.benchmark.measure import Bench
from fastvim.benchmark.record import Record, Row, device_name, environment
from fastvim.benchmark.training import LOOP
from fastvim.errors import UserError
from fastvim.ops import engine_name, use_engine
from fastvim.ops.dispatch import OPS


class Run:
    """Measures every model at every size in every mode.

    Args:
        models: names, of this library or of timm.
        sizes: pixels of a side, or HEIGHTxWIDTH.
        batches: images at a time: one number, or one for each size.
        modes: some of `MODES`. Default: "graph" on CUDA, "eager" elsewhere.
        device: default: CUDA if there is a GPU.
        dtype: one of `PRECISIONS`. Default: on CUDA bfloat16, with `train` amp; elsewhere float32.
        train, channels_last, warmup, repeats, check, roofline: see `Settings`.
        engine: serves this library's operations, as by `use_engine`.
        out: file of the results, written after every row.
        append: keep the other rows of that file.
        command: the command line, for the record.

    Attributes:
        cases: to be measured.
        rows: those measured so far.
        record: the results, with the rows kept from the file.

    Raises:
        UserError: what can never run; a file of another device.
    """

    def __init__(
        self,
        models: Sequence[str],
        sizes: Sequence[str] = ("224",),
        batches: Sequence[int] = (32,),
        modes: Sequence[str] | None = None,
        *,
        device: torch.device | None = None,
        dtype: str | None = None,
        train: bool = False,
        channels_last: bool = False,
        warmup: int = 10,
        repeats: int = 10,
        check: bool = True,
        roofline: bool = True,
        engine: str | None = None,
        out: Path | None = None,
        append: bool = False,
        command: str = "",
    ) -> None:
        for name, value in (("warmup", warmup), ("repeats", repeats)):
            if value < 1:
                raise UserError(f"{name} {value}: expected 1 or more")
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_cuda = device.type == "cuda"
        default = ("amp" if train else "bfloat16") if on_cuda else "float32"
        settings = Settings(
            device, dtype or default, train, channels_last, warmup, repeats, check, roofline
        )
        self.cases = _cases(models, sizes, batches, modes or ["graph" if on_cuda else "eager"])
        self._bench = Bench(settings)
        for case in self.cases:
            self._bench.validate(case)
        self.rows: list[Row] = []
        self._engine, self._out = engine, out
        self.record = _record(settings, out if append else None)
        with _engine(engine):
            run = environment(command, _engines(settings))
        self.record.runs.append({**run, "loop": LOOP} if train else run)

    def measure(self) -> Iterator[Row]:
        """Measure one case after another. The record is written before each row is given.

        Raises:
            KeyboardInterrupt: with the file that has the rows so far, if there is one.
        """
        try:
            for case in self.cases:
                with _engine(self._engine):
                    row = self._bench.measure(case)
                self.rows.append(row)
                self.record.add(row)
                if self._out is not None:
                    self.record.save(self._out)
                yield row
        except KeyboardInterrupt:
            kept = f"the rows so far are in {self._out}" if self.rows and self._out else ""
            raise KeyboardInterrupt(kept) from None


def _cases(
    models: Sequence[str], sizes: Sequence[str], batches: Sequence[int], modes: Sequence[str]
) -> list[Case]:
    if not models:
        raise UserError("expected the name of at least one model; fastvim models lists ours")
    check_names(models)
    if min(batches) < 1:
        raise UserError(f"batch {min(batches)}: expected 1 or more")
    if len(batches) not in (1, len(sizes)):
        raise UserError(
            f"{len(batches)} batches for {len(sizes)} sizes: expected one for each size, or one "
            "for all"
        )
    shapes = [parse_size(text) for text in sizes]
    every = batches if len(batches) == len(sizes) else list(batches) * len(sizes)
    return [
        Case(model, size, batch, mode)
        for model in dict.fromkeys(models)
        for size, batch in zip(shapes, every, strict=True)
        for mode in dict.fromkeys(modes)
    ]


def _record(settings: Settings, path: Path | None) -> Record:
    """An empty record, or the one in a file if there is one."""
    device = device_name(settings.device)
    if path is None or not path.exists():
        return Record(device)
    record = Record.load(path)
    if record.device != device:
        raise UserError(f"{path} was measured on {record.device}, this is {device}")
    return record


@contextmanager
def _engine(name: str | None) -> Iterator[None]:
    """This engine; with None the one that serves by default."""
    with ExitStack() as stack:
        if name is not None:
            try:
                stack.enter_context(use_engine(name))
            except ValueError as error:
                raise UserError(str(error)) from error
        yield


def _engines(settings: Settings) -> dict[str, str]:
    """The engine of each operation in this run."""
    device, dtype = settings.device.type, settings.precision.products
    return {op: engine_name(op, device, dtype) for op in OPS}
