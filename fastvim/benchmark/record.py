"""Results: one row per case, and the file that keeps them."""

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
from fastvim.benchmark.cases import Size
from fastvim.errors import UserError
from fastvim.storage import write_text

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
        loop_images_per_second, loop_ms, loop_memory_gib: the same of the training loop that
            `fastvim fit` runs (`training.LOOP`); None if not measured.
        engine_error: relative error against the float32 reference; None if not checked.
        checked_size: of the images of that check.
        mode_error: relative error against the eager model on fresh images; None if not checked.
        loop_error: relative error of the loop's gradients against the eager model's, likewise.
        bound: on these errors.
        roofline_ms: milliseconds of a batch at the roofline; None if not measured.
        failure: why the row has no times, or times that must not be used; else None.
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
    loop_images_per_second: float | None = None
    loop_ms: float | None = None
    loop_memory_gib: float | None = None
    engine_error: float | None = None
    checked_size: Size | None = None
    mode_error: float | None = None
    loop_error: float | None = None
    bound: float | None = None
    roofline_ms: float | None = None
    failure: str | None = None
    run: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the case."""
        case = (self.model, self.size, self.batch, self.mode, self.dtype)
        return (*case, self.train, self.channels_last)

    @property
    def share_of_roofline(self) -> float | None:
        """Time at the roofline over latency, 1 at best."""
        if self.roofline_ms is None or self.latency_ms is None:
            return None
        return self.roofline_ms / self.latency_ms

    @property
    def error(self) -> float | None:
        """The largest of the errors found."""
        found = (self.engine_error, self.mode_error, self.loop_error)
        return max((error for error in found if error is not None), default=None)

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
        """Append a row of the latest run, in place of an earlier row of the same case."""
        row.run = len(self.runs) - 1
        self.rows = [other for other in self.rows if other.key != row.key] + [row]

    def save(self, path: Path) -> None:
        """Write the JSON, a line for each row. An interruption leaves the earlier file."""
        lines = [
            f'{{"device": {_json(self.device)},',
            f'"runs": [\n{_lines(self.runs)}\n],',
            f'"rows": [\n{_lines(asdict(row) for row in self.rows)}\n]}}',
        ]
        write_text(path, "\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            UserError: another kind of file.
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
    """One line for each value, so that two files can be compared line by line."""
    return ",\n".join(map(_json, values))


def _row(values: dict[str, Any]) -> Row:
    """A row from JSON, which has lists for tuples. Earlier files call the roofline the floor."""
    known = {entry.name for entry in fields(Row)}
    values = {"roofline_ms": values.get("floor_ms"), **values}
    pairs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Row(**{key: value for key, value in pairs.items() if key in known})


def environment(command: str, engines: dict[str, str]) -> dict[str, Any]:
    """What a run's numbers depend on, apart from the device."""
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
    """Name of the GPU, or of the processor and its number of threads in torch."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
