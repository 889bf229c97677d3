"""What the tests of the kernels share."""

from __future__ import annotations

import importlib
import pkgutil

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick(quick_interpreter):
    """All of them may launch kernels."""


@pytest.fixture
def forget_launches():
    """For a test that changes what launches are made of: none is kept before or after it.

    Gives the function that forgets them.
    """

    def forget():
        package = importlib.import_module("fastvim.ops.triton")
        launches = importlib.import_module("fastvim.ops.triton.launch").Launches
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            for value in vars(importlib.import_module(info.name)).values():
                if isinstance(value, launches):
                    value.clear()

    forget()
    yield forget
    forget()
