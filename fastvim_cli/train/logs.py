"""What a training run logs, so that neither a kill nor a full disk loses or halves it."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from fastvim.errors import MachineError
from fastvim.storage import problem, remove_parts, write_text

_logger = logging.getLogger(__name__)


class ConfigFile(SaveConfigCallback):
    """Writes the configuration into the folder of the first logger; complete or not at all."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = trainer.log_dir
        if trainer.is_global_zero and not self.already_saved:
            assert folder is not None
            remove_parts(Path(folder).parent.glob("version_*/*.part"))  # of earlier starts
            text = self.parser.dump(self.config, skip_unset=False)
            write_text(Path(folder) / self.config_filename, text)
        self.already_saved = True


class TableLogger(CSVLogger):
    """Lightning's table of metrics, `metrics.csv`.

    Rows that the disk refuses are said, kept, and written with later ones. They do not end a run:
    what it is for is in its checkpoints.
    """

    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Table(self.log_dir)
        return self._experiment


class _Table(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._refused = False

    def save(self) -> None:
        if not self.metrics:
            return
        file, known = Path(self.metrics_file_path), list(self.metrics_keys)
        try:
            if self._record_new_keys() or not file.exists():
                rows = _read(file) if file.exists() else []
                write_text(file, self._lines([*rows, *self.metrics], header=True))
            else:
                _append(file, self._lines(self.metrics))
        except (OSError, MachineError) as error:
            self.metrics_keys = known
            if not self._refused:
                reason = f"{file}: {problem(error)}" if isinstance(error, OSError) else error
                _logger.warning("%s; its rows are kept and written later", reason)
            self._refused = True
        else:
            self.metrics, self._refused = [], False

    def _lines(self, rows: Iterable[Mapping[str, Any]], header: bool = False) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys, extrasaction="ignore")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _read(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        return list(csv.DictReader(lines))


def _append(file: Path, text: str) -> None:
    """Append a text, or nothing of it."""
    size = file.stat().st_size
    try:
        with file.open("ab") as table:
            table.write(text.encode())
    except OSError:
        os.truncate(file, size)
        raise
