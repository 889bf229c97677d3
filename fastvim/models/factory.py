"""Models by their timm names, with clear errors."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

import timm
import torch
from torch import nn

from fastvim.errors import OptionError, UserError, nearest
from fastvim.models.channel import FastChannelVim
from fastvim.models.masked import MaskedAutoencoder
from fastvim.models.vision import FastVim
from fastvim.options import describe_type, fits

_NUMBERS = (int, float, int | None, float | None)
_UNKNOWN = re.compile(r"(?:unexpected keyword|multiple values for(?: keyword)?) argument '(\w+)'")


def create_model(name: str, /, **model_args: Any) -> nn.Module:
    """`timm.create_model`, with one clear line for a mistyped name or option.

    Raises:
        UserError: no such model, an option that it does not take, with the nearest valid names, or
            a value of another type; a model that does not fit into this machine's memory.
    """
    if not timm.is_model(name):
        raise UserError(f"no model {name!r}{nearest(name, timm.list_models())}")
    for option in ("checkpoint_path", "cache_dir"):  # timm's own, which it does not look at
        if not isinstance(value := model_args.get(option), str | os.PathLike | None):
            raise OptionError(option, value, "a path")
    if is_ours(name):
        _check_memory(name, check_options(name, model_args))
    try:
        return timm.create_model(name, **model_args)
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        raise UserError(f"{name}: no weights of that tag; expected the name alone") from error
    except TypeError as error:
        unknown = _UNKNOWN.search(str(error))
        if unknown is None:
            raise
        raise UserError(_no_option(name, unknown[1])) from error


def is_ours(name: str) -> bool:
    """Whether a registered model is one of this library's."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("fastvim.")


def check_options(
    name: str, model_args: Mapping[str, Any], *, others: bool = True
) -> dict[str, Any]:
    """Compare options of one of our models with the types that its constructor has.

    Args:
        name: of the model.
        model_args: its options.
        others: further ones are timm's own, such as `pretrained` and `features_only`; False
            refuses them.

    Returns:
        The constructor's options among them.

    Raises:
        UserError: an option of another type, or one that the constructor does not have.
    """
    hints, own = _options_of(name), {}
    for option, value in model_args.items():
        if option in hints:
            # Of a number the constructor says the range.
            number = hints[option] in _NUMBERS and not isinstance(value, list | tuple | dict)
            if not number and not fits(value, hints[option]):
                raise OptionError(option, value, describe_type(hints[option]))
            own[option] = value
        elif not others:
            raise UserError(_no_option(name, option))
    return own


def _no_option(name: str, option: str) -> str:
    known = _options_of(name) if is_ours(name) else ()
    return f"the model {name} has no option {option!r}{nearest(option, known)}"


@cache
def _options_of(name: str) -> dict[str, Any]:
    """What the constructor of one of our models takes, and of which types."""
    kinds: tuple[type[nn.Module], ...] = (FastVim,)
    if name.startswith("mae_"):
        kinds = (MaskedAutoencoder,)
    elif "channelvim" in name:
        kinds = (FastVim, FastChannelVim)
    hints: dict[str, Any] = {}
    for kind in kinds:
        hints |= typing.get_type_hints(kind.__init__)
    return {option: hint for option, hint in hints.items() if option not in ("options", "return")}


def _check_memory(name: str, options: Mapping[str, Any]) -> None:
    """Raise UserError for a model whose weights alone are more than this machine's memory."""
    if not options or torch.get_default_device().type != "cpu":
        return
    with torch.device("meta"):
        weights = timm.create_model(name, **options).parameters()
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise UserError(
            f"{name} with {given} has {needed / 2**30:,.0f} GiB of weights, and this machine "
            f"{memory / 2**30:,.0f} GiB of memory"
        )
