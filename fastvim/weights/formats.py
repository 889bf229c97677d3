"""Recognise who wrote a file, and find the weights in it: one function per format."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastvim.weights.config_text import tell as tell_config


class Found(NamedTuple):
    """The copies of the weights in a file, under its own names.

    Attributes:
        averaged: those averaged over training; empty where there are none.
        raw: those of the optimiser.
        published_averaged: whether the published number of such a file belongs to the averaged.
    """

    averaged: Mapping[Any, Any]
    raw: Mapping[Any, Any]
    published_averaged: bool = True


_PREFIXES = ("_orig_mod.", "module.", "backbone.", "model.")
_FIRST_BLOCK = re.compile(r"(.*\.)layers\.0\.mixer\.")
_AVERAGING = "module."  # of the names that mmengine's hook of averages saves


def _fastvim_training(content: Mapping[str, Any]) -> Found:
    """`last.ckpt` of this library: validated weights lie in `state_dict`."""
    return Found(_dict(content, "state_dict"), _dict(content, "current_model_state"))


def _averaging_hook(content: Mapping[str, Any]) -> Found:
    """mmengine's files with its hook of averages, which swaps the two copies when it saves.

    The raw weights are named `module.NAME`; a count of steps lies beside them.
    """
    raw = {
        name.removeprefix(_AVERAGING): value
        for name, value in _dict(content, "ema_state_dict").items()
        if str(name).startswith(_AVERAGING)
    }
    return Found(_dict(content, "state_dict"), raw)


def _state_dict(content: Mapping[str, Any]) -> Found:
    """Lightning's and mmengine's files; FastVim's hold the averaged weights once or twice."""
    state = {str(name): value for name, value in _dict(content, "state_dict").items()}
    inside = {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}
    raw = {k: v for k, v in state.items() if not k.startswith("ema.")}
    return Found(_dict(content, "state_dict_ema") or inside, raw)


def _original_vim(content: Mapping[str, Any]) -> Found:
    """The files of the original Vim release, whose best one is chosen by the score of `model`."""
    return Found(_dict(content, "model_ema"), _dict(content, "model"), published_averaged=False)


def _dict(content: Mapping[str, Any], key: str) -> dict[Any, Any]:
    """A dict of the file; empty where there is none."""
    value = content.get(key)
    return value if isinstance(value, dict) else {}


# By the key that marks the format; the first that a file holds decides.
_FORMATS: dict[str, Callable[[Mapping[str, Any]], Found]] = {
    "averaging_state": _fastvim_training,
    "ema_state_dict": _averaging_hook,
    "state_dict": _state_dict,
    "model": _original_vim,
}


class Selected(NamedTuple):
    """The copy of a file's weights that was taken.

    Attributes:
        state: the tensors, without prefixes that all names share; empty if the content is not what
            its format promises.
        weights: "EMA", "raw", or "only" for a file of one kind of weights.
    """

    state: dict[str, Tensor]
    weights: str


def select_weights(content: Mapping[str, Any], ema: bool | None = None) -> Selected:
    """The averaged or the raw weights of a file.

    Args:
        content: what the file holds; without the mark of a format it is the state dict itself.
        ema: take the averaged weights, or those of the optimiser, where the file has both; None:
            those that the published number of such a file belongs to.
    """
    mark = next((key for key in _FORMATS if key in content), None)
    found = Found({}, content) if mark is None else _FORMATS[mark](content)
    if not found.averaged:
        return Selected(_without_prefixes(found.raw), "only")
    if found.published_averaged if ema is None else ema:
        return Selected(_without_prefixes(found.averaged), "EMA")
    return Selected(_without_prefixes(found.raw), "raw")


def _without_prefixes(state: Mapping[Any, Any]) -> dict[str, Tensor]:
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


def inner_backbone(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone of a whole published model, and the names of the parts that are left out."""
    prefixes = {match[1] for name in state if (match := _FIRST_BLOCK.match(name))}
    if len(prefixes) != 1:
        return dict(state), []
    prefix = prefixes.pop()
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    beside = {name.partition(".")[0] for name in state if not name.startswith(prefix)}
    return inside, sorted(beside)


def tell(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a published file says of its model; see `Checkpoint.told`."""
    told = tell_config(content)
    if isinstance(content.get("licence"), str):  # of a file that `convert` wrote
        told["licence"] = content["licence"]
    arguments = content.get("args")
    if isinstance(arguments, argparse.Namespace):  # of the original Vim's training
        size = getattr(arguments, "input_size", None)
        if isinstance(size, int) and "img_size" not in told:
            told["img_size"] = size
    return told
