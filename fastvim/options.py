"""Ranges of options: the one way to check a value, and to say what was expected."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from fastvim.errors import OptionError, nearest


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`.

    Args:
        low: the lowest.
        high: the highest.
        above: without `low` itself.
        below: without `high` itself.
        whole: whole numbers alone.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        if isinstance(value, Integral) and not -MOST_WHOLE <= value <= MOST_WHOLE:  # type: ignore[operator]
            return False
        number: float = value  # type: ignore[assignment]
        if not math.isfinite(number) or not self.low <= number <= self.high:
            return False
        return not ((self.above and number == self.low) or (self.below and number == self.high))

    def __str__(self) -> str:
        least = f"more than {self.low}" if self.above else f"at least {self.low}"
        most = f"less than {self.high}" if self.below else f"at most {self.high}"
        if self.high < math.inf:
            text = (
                f"{least} and {most}" if self.above or self.below else f"{self.low} to {self.high}"
            )
        elif self.low > -math.inf:
            text = least if self.above else f"{self.low} or more"
        else:
            text = "any number"
        return text


MOST_WHOLE = (1 << 63) - 1  # of 64 bits
COUNT = Range(1, whole=True)
# Far beyond any model, and so small that the number of a tensor's values fits into 64 bits.
SIZE = Range(1, 1 << 16, whole=True)
SMALL_SIZE = Range(1, 1 << 10, whole=True)
SIDE = Range(1, 1 << 13, whole=True)  # of a prepared image, in pixels
WORKERS = Range(0, 1 << 10, whole=True)
NODES = Range(1, 1 << 16, whole=True)
CLASSES = Range(0, 1 << 24, whole=True)
COUNT_OR_0 = Range(0, whole=True)
SEED = Range(0, 2**32 - 1, whole=True)  # what numpy takes
FINITE = Range()
WHOLE = Range(whole=True)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
SHARE = Range(0, 1)
SHARE_BELOW_1 = Range(0, 1, below=True)
SHARE_ABOVE_0 = Range(0, 1, above=True)


def fits(value: object, hint: Any) -> bool:
    """Whether a plain value, as of JSON or YAML, is one of a type.

    Args:
        value: None, a boolean, a number, a text, or a list or dict of such.
        hint: type of an option: those types, `Literal`, sequences, mappings and unions of them. A
            list stands for any sequence, a whole number for a float.
    """
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if kind is typing.Literal:
        return isinstance(value, str) and value in inner
    if kind in (tuple, list, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if kind is tuple and inner and inner[-1] is not ...:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(each, inner[0]) for each in value)
    if kind in (dict, Mapping):
        return isinstance(value, dict) and all(fits(each, inner[1]) for each in value.values())
    if kind is types.NoneType:
        return value is None
    return hint is Any or type(value) is kind or (kind is float and type(value) is int)


def describe_type(hint: Any) -> str:
    """A type in words, for a message."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(describe_type, inner))
    if typing.get_origin(hint) in (tuple, list, Sequence):
        return "a list"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return {**names, types.NoneType: "null"}.get(hint, str(hint))


def check(allowed: Range, **values: object) -> None:
    """Compare options, given by their names, with a range.

    Args:
        allowed: for each number of them.
        values: numbers, or several in a sequence or mapping.

    Raises:
        OptionError: at the first option with a number outside.
    """
    for option, value in values.items():
        several = list(value.values()) if isinstance(value, Mapping) else value
        for number in several if isinstance(several, list | tuple) else [several]:
            if number not in allowed:
                raise OptionError(option, value, f"{_kind(number, allowed)}{allowed}")


def _kind(number: object, allowed: Range) -> str:
    """What a range would not tell of numbers of another kind."""
    if isinstance(number, float) and allowed.whole:
        return "whole numbers, "
    if isinstance(number, int) and abs(number) > MOST_WHOLE:
        return "numbers of 64 bits, "
    return "finite numbers, " if isinstance(number, float) and not math.isfinite(number) else ""


def check_given(allowed: Range, **values: object) -> None:
    """As `check`, for options that None stands for the absence of."""
    check(allowed, **{option: value for option, value in values.items() if value is not None})


def check_pair(allowed: Range, **values: Sequence[float] | None) -> None:
    """Compare options that are the ends of a range, the lower one first.

    Raises:
        OptionError: at the first one that is none.
    """
    for option, pair in values.items():
        low, high = pair if pair is not None and len(pair) == 2 else (math.nan, math.nan)
        if low not in allowed or high not in allowed or low > high:
            raise OptionError(option, pair, f"two numbers, {allowed}, the lower one first")


def check_choice(choices: Collection[str], **values: object) -> None:
    """Compare options with the texts that they may be.

    Raises:
        OptionError: at the first one that is none of them.
    """
    for option, value in values.items():
        if value not in choices:
            expected = f"one of {', '.join(map(repr, choices))}"
            raise OptionError(option, value, expected + nearest(str(value), choices))


def per_channel(
    name: str, values: Sequence[float], in_chans: int, allowed: Range
) -> tuple[float, ...]:
    """One value for each channel, from as many or from one for all.

    Args:
        name: of the option.
        values: of the option.
        in_chans: number of channels.
        allowed: of each value.

    Raises:
        OptionError: another number of values, or one outside of what is allowed.
    """
    check(allowed, **{name: values})
    if len(values) not in (1, in_chans):
        raise OptionError(name, values, f"1 value or {in_chans}, one a channel")
    return tuple(values) * (in_chans if len(values) == 1 else 1)
