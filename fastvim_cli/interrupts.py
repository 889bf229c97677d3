"""Ctrl-C ends a command once, wherever it is, and its workers say nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AGAIN = 0.1  # seconds


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Ctrl-C as KeyboardInterrupt in this process alone, and again where it is lost.

    A terminal sends it to all processes of a command. Forked ones, as a loader's workers, leave it
    to this one, which ends them. Python drops what is raised in a destructor or around a fork.
    """
    main, process = threading.main_thread(), os.getpid()
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if threading.current_thread() is not main or before is not signal.default_int_handler:
        yield  # ignored, as of nohup, or somebody else's
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise KeyboardInterrupt

    def again(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            hook(lost)
        elif os.getpid() == process and main.ident is not None:
            send = threading.Timer(_AGAIN, signal.pthread_kill, (main.ident, signal.SIGINT))
            send.daemon = True
            send.start()

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = again
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook
