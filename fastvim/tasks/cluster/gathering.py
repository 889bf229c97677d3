"""The time until the processes of a run have found each other, which no connection watches yet.

A process that ends meanwhile would leave the others waiting for half an hour, which is torch's
limit, as they can't know that it had begun.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

_LOOK = 0.2  # seconds between two looks at the processes
_TELL = 30.0  # seconds of waiting, after which a line says so


class Gathering:
    """Looks after a process that waits for the others of its run, while it is entered.

    It ends where a process that it has started itself ends, or the one that has started it.

    Args:
        size: number of processes of the run.
        started: those that this process has started.
        leave: ends this process at once: with a line to print, which may be empty, and an exit
            code.
        tell: prints a line.
        patience: seconds of waiting, after which a line says so.
    """

    def __init__(
        self,
        size: int,
        started: Sequence[subprocess.Popen[bytes]],
        leave: Callable[[str, int], None],
        tell: Callable[[str], None],
        patience: float = _TELL,
    ) -> None:
        self._size, self._started = size, started
        self._leave, self._tell = leave, tell
        self._patience = patience
        self._parent = os.getppid()
        self._complete = threading.Event()

    def __enter__(self) -> Gathering:
        threading.Thread(target=self._look, daemon=True, name="fastvim-gathering").start()
        return self

    def __exit__(self, *error: object) -> None:
        self._complete.set()

    def _look(self) -> None:
        since = time.monotonic()
        while not self._complete.wait(_LOOK):
            if os.getppid() != self._parent:
                return self._leave("", 1)
            for number, process in enumerate(self._started, 1):
                if (code := process.poll()) is not None and not self._complete.is_set():
                    return self._ended(number, code)
            if since and time.monotonic() - since > self._patience:
                self._tell(
                    f"waiting until all {self._size} processes of the run have begun, at "
                    f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                )
                since = 0.0

    def _ended(self, number: int, code: int) -> None:
        """End as a process that this one has started; where it could, it has told why."""
        how = f"was ended by signal {-code}" if code < 0 else "ended"
        line = f"process {number} {how} before all {self._size} had found each other"
        self._leave("" if code > 0 else line, max(code, 1))
