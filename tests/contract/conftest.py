"""Both engines of a CPU."""

from __future__ import annotations

import pytest

from fastvim import use_engine


@pytest.fixture(params=["reference", "numba"])
def engine(request):
    with use_engine(request.param):
        yield request.param
