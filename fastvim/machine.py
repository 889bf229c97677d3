"""What this machine lends to a process."""

from __future__ import annotations

import os


def cores() -> int:
    """The number of cores that this process may use, at least 1."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
