"""What this machine lends to a process."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from functools import cache


def cores() -> int:
    """The number of cores that this process may use, at least 1."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def shared_memory() -> float:
    """Bytes of the memory that processes share; infinite where the system does not tell."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:  # not on every system
        return math.inf


@cache
def has_triton() -> bool:
    """Whether Triton is installed, which compiles kernels for GPUs."""
    return importlib.util.find_spec("triton") is not None
