"""jsonargparse's error messages, many lines for a program, as one line for a person."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from jsonargparse import Namespace

from fastvim.errors import OptionError, UserError, nearest
from fastvim_cli.train.class_paths import EXPECTED

# Lines of a message that give Python's view of it.
NOISE = ("Does not validate against any", "Subtypes:", "Errors:", "Given value")


def explain(message: str, keys: Iterable[str]) -> str:
    """One line from a message of jsonargparse, with the nearest valid names for a wrong one.

    Args:
        message: of its `ArgumentError`.
        keys: the dotted keys of a configuration.
    """
    section = _find(r"class_path '([\w.]+)'", message)
    if refused := _find(r"Importing '([^']+)' is not allowed", message):
        return f"{refused}: not imported; expected {EXPECTED}"
    option = _find(r"[Oo]ption '([\w.]+)'", message)
    flag = _find(r"^unrecognized arguments: --([\w.]+)", message)
    missing = _find(r"the following arguments are required: (.+)", message)
    where = re.findall(r'Parser key "([\w.]+)"', message)
    if option in where:  # another class that was tried does not have it
        option = ""
    if several := _find(r"- (Multiple subclasses with name .+)\.$", message):
        return f"{where[0]}: {several}"
    if section and option:
        return f"{section} has no option '{option}'{nearest(option, _options(section))}"
    if section and missing:
        return f"{section} needs a value for {missing}"
    if option or flag:
        group = _find(r"Group '([\w.]+)' does not accept", message)
        key = f"{group}.{option}" if group else option or flag
        return f"unknown key '{key}'{nearest(key, keys)}"

    expected = re.findall(
        r"Expected an? (?:<class ')?(.+?)(?:'>)?(?:\. Got value: .*)?$",
        re.sub(r"invalid literal for int\(\).*", "Expected a <class 'int'>", message),
        re.MULTILINE,
    )
    value = _find(r"Got value: (.+)", message) or _find(r"Given value: (.+)", message)
    reason = _find(r"Problem with given class_path '[\w.]+':\s+(.+)", message)
    if section and reason and not reason.startswith("Parser key"):
        return f"{where[0]}: {section}: {reason}"
    if where and expected and value:
        kinds = [
            kind.removeprefix("typing.").replace("Literal", "one of ").partition(":")[0]
            for kind in expected
            if kind != "NoneType" and not kind.startswith("path but")
        ]
        if nested := re.fullmatch(r"NestedArg\(key='(.*)', val=(.*)\)", value):
            where, value = [*where, nested[1]], nested[2]
        several = " or ".join(dict.fromkeys(kinds)) or "the name of a class"
        return f"{'.'.join(where)} {value}: expected {several}"
    lines = (line.strip() for line in message.splitlines())
    return " ".join(line for line in lines if line and not line.startswith(NOISE))


def of_one_of_several(message: str) -> str:
    """What the constructor of a class raised where an option takes several kinds of values.

    jsonargparse keeps the errors of all the kinds as text alone. Empty for any other message.
    """
    section = _find(r"class_path='([\w.]+)'", message)
    reasons = [
        line.strip().removeprefix("- ")
        for line in message.splitlines()
        if line.lstrip().startswith("- ") and "- Expected a" not in line
    ]
    return f"{section}: {'; '.join(reasons)}" if section and reasons else ""


@contextmanager
def options_as_written(config: Namespace) -> Iterator[None]:
    """Raise the user's mistake of what jsonargparse wraps, with the option as the user writes it.

    Args:
        config: with the sections `data`, `model` and `trainer`.

    Raises:
        UserError: of an `OptionError` one that names `data.batch_size`, not `batch_size`.
    """
    try:
        yield
    except ValueError as error:
        mistake = next((each for each in causes(error) if isinstance(each, UserError)), None)
        if isinstance(mistake, OptionError):
            option = _written(mistake, config)
            raise OptionError(option, mistake.value, mistake.expected) from error
        if mistake is None or mistake is error:
            raise
        raise UserError(str(mistake)) from error


def _written(mistake: OptionError, config: Namespace) -> str:
    """The dotted key of an option: where several sections have it, the one with that value."""
    found: dict[str, object] = {}
    for name in ("data", "model", "trainer"):
        section = config.get(name) or {}
        section = section.get("init_args", section)
        groups = {name: section}  # and options of a model or an augmentation
        groups |= {f"{name}.{key}": each for key, each in section.items() if isinstance(each, dict)}
        for key, group in groups.items():
            if mistake.option in group:
                found[f"{key}.{mistake.option}"] = group[mistake.option]
    same = [key for key, value in found.items() if _plain(value) == _plain(mistake.value)]
    return next(iter([*same, *found]), mistake.option)


def _plain(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on to the first cause."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _find(pattern: str, message: str) -> str:
    """The first group of a match, or an empty string."""
    match = re.search(pattern, message, re.MULTILINE)
    return match[1] if match else ""


def _options(class_path: str) -> list[str]:
    """The arguments of a class and of its bases; none if there is no such class."""
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)  # what was refused is not imported
    bases = found.__mro__[:-1] if inspect.isclass(found) else ()
    return list({name: None for base in bases for name in inspect.signature(base).parameters})
