"""Recognise who wrote a file, and find the weights in it: one function per format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

# The averaged weights, None or empty where there are none, and the raw ones.
Found = tuple[Mapping[str, Any] | None, Mapping[str, Any]]

_PREFIXES = ("_orig_mod.", "module.", "backbone.", "model.")
_FIRST_BLOCK = re.compile(r"(.*\.)layers\.0\.mixer\.")


def _fastvim_training(content: Mapping[str, Any]) -> Found:
    """`last.ckpt` of this library: validated weights lie in `state_dict`."""
    return content["state_dict"], content["current_model_state"]


def _state_dict(content: Mapping[str, Any]) -> Found:
    """Lightning's and mmengine's files; FastVim's hold the averaged weights once or twice."""
    state = content["state_dict"]
    inside = {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}
    raw = {k: v for k, v in state.items() if not k.startswith("ema.")}
    return content.get("state_dict_ema") or inside, raw


def _original_vim(content: Mapping[str, Any]) -> Found:
    """The files of the original Vim release."""
    return content.get("model_ema"), content["model"]


# By the key that marks the format; the first that a file holds decides.
_FORMATS: dict[str, Callable[[Mapping[str, Any]], Found]] = {
    "averaging_state": _fastvim_training,
    "state_dict": _state_dict,
    "model": _original_vim,
}


def select_weights(content: Mapping[str, Any], ema: bool) -> tuple[dict[str, Tensor], str]:
    """The averaged or the raw weights of a file, and which of them they are.

    Args:
        content: what the file holds; without the mark of a format it is the state dict itself.
        ema: take the averaged weights where there are any.

    Returns:
        The tensors, none if the content is not what its format promises, without prefixes that all
        names share; "EMA", "raw", or "only" for a file of one kind of weights.
    """
    averaged, raw = None, content
    if not all(isinstance(content.get(key, {}), dict) for key in ("state_dict", "model")):
        raw = {}
    elif mark := next((key for key in _FORMATS if key in content), None):
        averaged, raw = _FORMATS[mark](content)
    if ema and averaged:
        return _without_prefixes(averaged), "EMA"
    return _without_prefixes(raw), "raw" if averaged else "only"


def _without_prefixes(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, without prefixes that every name shares, such as `backbone.`."""
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def backbone_alone(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone of a whole published model, and the names of the parts that are left out."""
    prefixes = {match[1] for name in state if (match := _FIRST_BLOCK.match(name))}
    if len(prefixes) != 1:
        return state, []
    prefix = prefixes.pop()
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    beside = {name.partition(".")[0] for name in state if not name.startswith(prefix)}
    return inside, sorted(beside)
