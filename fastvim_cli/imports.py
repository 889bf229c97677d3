"""Imports of the library, which take most of a short command's time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Keep Python's collector of cycles away from the hundreds of thousands of objects that come.

    It would look at them again and again, in a sixth of the time, and find nothing to free.
    Afterwards as well: what has been imported stays.
    """
    enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if len(sys.modules) > before:
                gc.freeze()
            gc.enable()
