"""jsonargparse's error messages, many lines for a program, as one line for a person."""

from __future__ import annotations

import inspect
import pydoc
import re
from collections.abc import Iterable

from fastvim.errors import nearest

# Lines of a message that give Python's view of it.
NOISE = ("Does not validate against any", "Subtypes:", "Errors:", "Given value")


def explain(message: str, keys: Iterable[str]) -> str:
    """One line from a message of jsonargparse, with the nearest valid names for a wrong one.

    Args:
        message: of its `ArgumentError`.
        keys: the dotted keys of a configuration.
    """
    section = _find(r"class_path '([\w.]+)'", message)
    option = _find(r"[Oo]ption '([\w.]+)'", message)
    flag = _find(r"^unrecognized arguments: --([\w.]+)", message)
    missing = _find(r"the following arguments are required: (.+)", message)
    if section and option:
        return f"{section} has no option '{option}'{nearest(option, _options(section))}"
    if section and missing:
        return f"{section} needs a value for {missing}"
    if option or flag:
        group = _find(r"Group '([\w.]+)' does not accept", message)
        key = f"{group}.{option}" if group else option or flag
        return f"unknown key '{key}'{nearest(key, keys)}"

    where = re.findall(r'Parser key "([\w.]+)"', message)
    expected = re.findall(
        r"Expected an? (?:<class ')?(.+?)(?:'>)?(?:\. Got value: .*)?$", message, re.M
    )
    value = _find(r"Got value: (.+)", message) or _find(r"Given value: (.+)", message)
    reason = _find(r"Problem with given class_path '[\w.]+':\s+(.+)", message)
    if section and reason and not reason.startswith("Parser key"):
        return f"{where[0]}: {section}: {reason}"
    if where and expected and value:
        key = f"{section}.{where[-1]}" if section else where[-1]
        kinds = [
            kind.removeprefix("typing.").partition(":")[0]
            for kind in expected
            if kind != "NoneType" and not kind.startswith("path but")
        ]
        return f"{key} is {value}: expected {' or '.join(kinds)}"
    lines = (line.strip() for line in message.splitlines())
    return " ".join(line for line in lines if line and not line.startswith(NOISE))


def first_cause(error: BaseException) -> BaseException:
    """What an error was raised from in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _find(pattern: str, message: str) -> str:
    """The first group of a match, or an empty string."""
    match = re.search(pattern, message, re.MULTILINE)
    return match[1] if match else ""


def _options(class_path: str) -> list[str]:
    """The arguments of a class and of its bases; none if there is no such class."""
    found = pydoc.locate(class_path)
    bases = found.__mro__[:-1] if inspect.isclass(found) else ()
    return list({name: None for base in bases for name in inspect.signature(base).parameters})
