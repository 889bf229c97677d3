"""The warm process of the tests of faults, and the small run that they harm."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / "tasks"), str(TESTS / "data"), str(Path(__file__).parent)]

from fuzzing import Warm  # noqa: E402
from small import Small  # noqa: E402


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A warm process, and what its commands read."""
    folder = tmp_path_factory.mktemp("small")
    with Warm(folder) as warm:
        yield Small(folder, warm)
