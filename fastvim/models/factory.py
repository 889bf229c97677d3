"""Models by their timm names, with clear errors."""

from __future__ import annotations

import inspect
import re
from typing import Any

import timm
from torch import nn

from fastvim.errors import UserError, nearest
from fastvim.models.channel import FastChannelVim
from fastvim.models.masked import MaskedAutoencoder
from fastvim.models.vision import FastVim


def create_model(name: str, **model_args: Any) -> nn.Module:
    """`timm.create_model`, with one clear line for a mistyped name or option.

    Raises:
        UserError: no such model, or an option that it does not take; with the nearest valid names.
    """
    if not timm.is_model(name):
        raise UserError(f"no model {name!r}{nearest(name, timm.list_models())}")
    try:
        return timm.create_model(name, **model_args)
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        raise UserError(f"{name}: no weights of that tag; expected the name alone") from error
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        hint = nearest(unknown[1], _options_of(name))
        raise UserError(f"the model {name} has no option {unknown[1]!r}{hint}") from error


def _options_of(name: str) -> list[str]:
    """What the constructor of one of our models takes; nothing for others."""
    if not timm.model_entrypoint(name).__module__.startswith("fastvim."):
        return []
    if name.startswith("mae_"):
        return list(inspect.signature(MaskedAutoencoder).parameters)
    options = list(inspect.signature(FastVim).parameters)
    if "channelvim" in name:
        options += inspect.signature(FastChannelVim).parameters
    return [option for option in options if option != "options"]
