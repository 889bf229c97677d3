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
def warm(tmp_path_factory):
    """One warm process for all tests of faults: it takes seconds to begin."""
    with Warm(tmp_path_factory.mktemp("warm")) as process:
        yield process


@pytest.fixture(scope="session")
def small(warm, tmp_path_factory):
    """The warm process, and what its commands read."""
    return Small(tmp_path_factory.mktemp("small"), warm)
