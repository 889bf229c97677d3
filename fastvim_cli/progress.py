"""How a run over many images goes: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from fastvim_cli.console import note, overwrite

if TYPE_CHECKING:
    from fastvim.inference.parts.loop import Spent
    from fastvim.inference.parts.work import Failure

MOST_FAILURES = 20  # that are named
_LOG, _BAR = 60.0, 0.2  # seconds from one line to the next
_MANY = 1000  # images of a run whose end says how fast it was


class Progress:
    """Prints to standard error, as `fastvim.inference.parts.run.Listener` says.

    Args:
        doing: what is done, for the bar.
    """

    def __init__(self, doing: str) -> None:
        self.doing = doing
        self.failures = 0
        self._terminal = sys.stderr.isatty()
        self._all = self._before = self._done = 0
        self._spent: Spent | None = None  # of all processes
        self._began = self._shown = time.monotonic()

    def begin(self, images: int, done: int) -> None:
        """Images to do, and how many of them were done before."""
        self._all, self._before = images, done
        self._began = self._shown = time.monotonic()

    def advance(self, images: int, spent: Spent) -> None:
        """That many more are done."""
        self._done += images
        self._spent = spent.plus(self._spent) if self._spent else spent
        now = time.monotonic()
        if now - self._shown >= (_BAR if self._terminal else _LOG):
            self._shown = now
            line = self._line()
            if self._terminal:
                overwrite(line)
            else:
                note(line)

    def failed(self, failure: Failure) -> None:
        """Name an image without a result, one of the first."""
        self.failures += 1
        if self.failures <= MOST_FAILURES:
            self.say(f"skipped {failure.path}: {failure.reason}")

    def say(self, line: str) -> None:
        """Print a line."""
        self._clear()
        note(line)

    def end(self) -> None:
        """Take the bar away; say how fast many images were, and how many failures have no line."""
        self._clear()
        if self._done >= _MANY and self._spent:
            note(f"{self._line()}{self._waited()}")
        if self.failures > MOST_FAILURES:
            note(f"… and {self.failures - MOST_FAILURES:,} more")

    def _line(self) -> str:
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        done = self._before + self._done
        left = f", {duration((self._all - done) / rate)} left" if rate and done < self._all else ""
        return f"{self.doing} {done:,}/{self._all:,}, {rate:,.1f} images/s{left}"

    def _waited(self) -> str:
        """The share of the time for which the processes waited for images to be read."""
        assert self._spent
        share = 100 * self._spent.waiting / max(self._spent.seconds, 1e-9)
        return f"; waited for images {share:.0f} % of the time"

    def _clear(self) -> None:
        if self._terminal:
            overwrite("")


def duration(seconds: float) -> str:
    """`2 h 5 min`, `3 min`, `40 s`."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 90 else f"{round(seconds)} s"
