"""Errors of the classes that a configuration brings along: modules, callbacks, loggers, data."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace

from fastvim.errors import UserError
from fastvim_cli.failures import in_worker
from fastvim_cli.train.config_errors import causes

# Packages whose errors are no mistakes of the configuration's author.
LIBRARIES = {"fastvim", "fastvim_cli", "lightning", "torch", "torchvision", "timm", "builtins"}


@contextmanager
def own_errors(config: Namespace) -> Iterator[None]:
    """Raise any error that arises in code of the configuration's author as his mistake.

    Args:
        config: its `class_path`s say which packages are his.

    Raises:
        UserError: with the class and method, the error, file and line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        packages = set(_packages(config.as_dict())) - LIBRARIES
        for cause in causes(error):
            if place := _place(cause, packages):
                name, message = in_worker(cause) or (type(cause).__name__, str(cause))
                raise UserError(f"{place[0]}: {name}: {message} ({place[1]})") from error
        raise


def _packages(value: Any) -> Iterator[str]:
    """The first names of all class paths inside a value."""
    if isinstance(value, Mapping):
        path = value.get("class_path")
        if isinstance(path, str):
            yield path.partition(".")[0]
    inside = value.values() if isinstance(value, Mapping) else value
    if isinstance(inside, list | tuple) or isinstance(value, Mapping):
        for each in inside:
            yield from _packages(each)


def _place(error: BaseException, packages: set[str]) -> tuple[str, str] | None:
    """The last function of these packages that an error went through, with file and line."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in packages:
            code, owner = frame.f_code, frame.f_locals.get("self")
            inside = module if owner is None else f"{module}.{type(owner).__name__}"
            name = f"{inside}.{code.co_name}"
            return name, f"{os.path.basename(code.co_filename)}, line {line}"
    frames = re.findall(r'File "(.+)", line (\d+), in (\S+)', str(error))  # of a loader's worker
    for package in packages:
        file = getattr(sys.modules.get(package), "__file__", None) or "\0"
        folder = os.path.dirname(file) if os.path.basename(file) == "__init__.py" else file
        for path, line, function in reversed(frames):
            if path.startswith(folder):
                return f"{package}: {function}", f"{os.path.basename(path)}, line {line}"
    return None
