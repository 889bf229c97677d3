"""What a full check has seen of files, kept until they change."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import zlib
from typing import Any

from fastvim import __version__
from fastvim.data.issues import Examined, Look
from fastvim.data.samples import cache_directory
from fastvim.errors import UserError
from fastvim.storage import written

_logger = logging.getLogger(__name__)

VALUES = Look._fields.index("values")
DAMAGE = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    TypeError,
    IndexError,
)  # of a file, its text, its values

Stamp = list[list[int]]  # size and time of each file that a sample is read from


class Known:
    """What is known of the samples of a split.

    One file for each split and its settings lies in `checks`, in the folder of
    `fastvim.data.samples.cache_directory`. A sample counts as known while the sizes and the times
    of its files are the same. A file that is missing or damaged knows nothing.

    Args:
        settings: all that changes what the samples show; JSON's values.
    """

    def __init__(self, settings: Any) -> None:
        text = json.dumps([__version__, Look._fields, settings])
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.path = cache_directory() / "checks" / f"{key}.jsonl.gz"
        self._stats: dict[str, list[int] | None] = {}

    def load(self, files: Examined) -> dict[int, Look]:
        """What is known of the samples, by their indices."""
        kept: dict[str, tuple[Stamp, Look]] = {}
        try:
            with gzip.open(self.path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    name, stamp, *look = json.loads(line)
                    look[VALUES] = tuple(map(tuple, look[VALUES]))
                    kept[name] = stamp, Look(*look)
        except FileNotFoundError:
            return {}
        except DAMAGE as error:
            _logger.debug("%s: not used (%s)", self.path, error)
            return {}
        found = {}
        for index in range(len(files)):
            stamp, look = kept.get(files.filename(index), (None, None))
            if look is not None and stamp == self._stamp(files, index):
                found[index] = look
        return found

    def save(self, files: Examined, looks: dict[int, Look]) -> None:
        """Keep what the samples show; the file is replaced at once or not at all."""
        try:
            with (
                written(self.path) as file,
                gzip.open(file, "wt", encoding="utf-8", compresslevel=4) as lines,
            ):
                for index, look in looks.items():
                    if stamp := self._stamp(files, index):
                        lines.write(json.dumps([files.filename(index), stamp, *look]) + "\n")
        except UserError as error:  # a full or read-only disk: the next run reads the files again
            _logger.warning("what the images show is not kept: %s", error)

    def _stamp(self, files: Examined, index: int) -> Stamp | None:
        """Size and time of the files of a sample; None where one is missing, or there are none."""
        stamps = [self._stat(source) for source in files.sources(index)]
        return [stamp for stamp in stamps if stamp] if stamps and all(stamps) else None

    def _stat(self, source: str) -> list[int] | None:
        if source not in self._stats:
            try:
                told = os.stat(source)
            except (OSError, ValueError):  # not there, or no name that a file can have
                return None
            self._stats[source] = [told.st_size, told.st_mtime_ns]
        return self._stats[source]
