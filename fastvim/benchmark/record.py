"""Results: one row per case, the file that keeps them, and their table in Markdown."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastvim
from fastvim.benchmark.cases import Size, size_name
from fastvim.errors import UserError

OUT_OF_MEMORY = "out of memory"


@dataclass
class Row:
    """The outcome of one case.

    Attributes:
        model, size, batch, mode, dtype, train, channels_last: the case; `size` is (height, width).
        ours: whether it is a model of this library.
        images_per_second: at the median latency.
        latency_ms: median milliseconds of a batch.
        latency_quartiles_ms: the quartiles around it.
        memory_gib: most memory in live tensors (`timing.peak_gib`); None on a CPU.
        engine_error: relative error against the float32 definitions; None where not checked.
        checked_size: of the images on which that was found.
        mode_error: relative error against the eager model on fresh images; None where not checked.
        bound: on both errors.
        floor_ms: the floor of this model at this batch; None where not measured.
        failure: why the row has no times, or times that must not be used; None where all is well.
        run: index into `Record.runs`.
    """

    model: str
    size: Size
    batch: int
    mode: str
    dtype: str
    train: bool = False
    channels_last: bool = False
    ours: bool = False
    images_per_second: float | None = None
    latency_ms: float | None = None
    latency_quartiles_ms: tuple[float, float] | None = None
    memory_gib: float | None = None
    engine_error: float | None = None
    checked_size: Size | None = None
    mode_error: float | None = None
    bound: float | None = None
    floor_ms: float | None = None
    failure: str | None = None
    run: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells the row from others."""
        case = (self.model, self.size, self.batch, self.mode, self.dtype)
        return (*case, self.train, self.channels_last)

    @property
    def share_of_floor(self) -> float | None:
        """Floor over latency, 1 at best."""
        if self.floor_ms is None or self.latency_ms is None:
            return None
        return self.floor_ms / self.latency_ms

    @property
    def wrong(self) -> bool:
        """Whether it failed for another reason than too little memory."""
        return self.failure is not None and self.failure != OUT_OF_MEMORY


@dataclass
class Record:
    """Rows measured on one device, and the runs that made them.

    Attributes:
        device: its name.
        runs: command, versions, date and engines of each run.
        rows: in the order measured.
    """

    device: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Append a row of the latest run; an earlier row of the same case goes."""
        row.run = len(self.runs) - 1
        self.rows = [other for other in self.rows if other.key != row.key] + [row]

    def save(self, path: Path) -> None:
        """Write the JSON, a line for each row; an interruption leaves the former file."""
        lines = [
            f'{{"device": {_json(self.device)},',
            f'"runs": [\n{_lines(self.runs)}\n],',
            f'"rows": [\n{_lines(asdict(row) for row in self.rows)}\n]}}',
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            UserError: a file of something else.
        """
        if not path.exists():
            raise FileNotFoundError(f"no results at {path}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [_row(values) for values in content["rows"]]
            return cls(content["device"], list(content["runs"]), rows)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a file of fastvim benchmark ({error})") from error


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _lines(values: Iterable[object]) -> str:
    """A line for each, so that two files of results can be compared line by line."""
    return ",\n".join(map(_json, values))


def _row(values: dict[str, Any]) -> Row:
    """A row from JSON, which knows no tuples."""
    known = {entry.name for entry in fields(Row)}
    pairs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Row(**{key: value for key, value in pairs.items() if key in known})


def environment(command: str, engines: dict[str, str]) -> dict[str, Any]:
    """What a run's numbers depend on beside the device."""
    return {
        "command": command,
        "date": date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "fastvim": fastvim.__version__,
            "torch": torch.__version__,
            "timm": version("timm"),
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "engines": engines,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the processor with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def labels(rows: Iterable[Row], batches: bool = False) -> dict[tuple[str, ...], list[Row]]:
    """Rows by series: all that is the same in every row is left out of the series' names.

    Args:
        rows: of any number of series.
        batches: whether two batches at one size make two series.

    Returns:
        From (model, what else tells the series, …) to its rows, smallest image first.
    """
    rows = list(rows)
    varying = [name for name in SERIES if len({_word(row, name) for row in rows}) > 1]
    without_batch = [(row.key[:2] + row.key[3:]) for row in rows]
    if batches and len(set(without_batch)) < len(rows):
        varying.append("batch")
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row.model, *(word for name in varying if (word := _word(row, name))))
        found.setdefault(key, []).append(row)
    return {key: sorted(rows, key=lambda r: r.size[0] * r.size[1]) for key, rows in found.items()}


SERIES = ("mode", "dtype", "train", "channels_last")


def _word(row: Row, name: str) -> str:
    """How a series' name says an attribute."""
    words = {
        "batch": f"batch {row.batch}",
        "mode": row.mode,
        "dtype": row.dtype,
        "train": "training" if row.train else "inference",
        "channels_last": "channels last" if row.channels_last else "",
    }
    return words[name]


def markdown(rows: Iterable[Row]) -> str:
    """Images per second as a Markdown table: models down, sizes (batches) across."""
    rows = list(rows)
    columns = sorted({(row.size, row.batch) for row in rows}, key=lambda c: (c[0][0] * c[0][1], c))
    heads = [f"{size_name(size)} ({batch})" for size, batch in columns]
    lines = [
        f"| images/s | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
    ]
    for key, series in labels(rows).items():
        cells = {(row.size, row.batch): _cell(row) for row in series}
        entries = [cells.get(column, "-") for column in columns]
        lines.append(f"| {', '.join(key)} | {' | '.join(entries)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if row.failure is not None or row.images_per_second is None:
        return OUT_OF_MEMORY if row.failure == OUT_OF_MEMORY else "failed"
    return rate_text(row.images_per_second)


def rate_text(rate: float) -> str:
    """Images per second with three digits or more."""
    digits = 0 if rate >= 100 else 1 if rate >= 10 else 2
    return f"{rate:,.{digits}f}"
