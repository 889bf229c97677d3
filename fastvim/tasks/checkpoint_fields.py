"""What the entries of a training checkpoint are: it may come from a stranger."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvim.errors import UserError
from fastvim.weights import METADATA_KEY
from fastvim.weights.metadata import check_metadata

_VERSION = "pytorch-lightning_version"
_COUNTS = ("batch_size", "processes", "accumulated", "seed")
_REQUIRED = ("state_dict", "loops", _VERSION)


def check_fields(path: Path, content: Mapping[str, Any]) -> None:
    """Compare the entries of a training checkpoint with what this library and Lightning write.

    Args:
        path: of the file, for the message.
        content: as read.

    Raises:
        UserError: the first entry that is missing or of another kind.
    """
    if missing := [name for name in _REQUIRED if name not in content]:
        raise UserError(f"{path} is no training checkpoint: it has no {missing[0]}")
    kinds = {
        "state_dict": ("weights by name", _named(content["state_dict"], Tensor)),
        "loops": (
            "mappings by name, fit_loop among them",
            _named(content["loops"], dict) and "fit_loop" in content["loops"],
        ),
        _VERSION: ("a version", re.match(r"\d+\.\d+", str(content[_VERSION]))),
        "callbacks": ("mappings", isinstance(content.get("callbacks", {}), dict)),
        "hyper_parameters": ("options by name", _options(content.get("hyper_parameters", {}))),
        "batches": ("whole numbers", _batches(content.get("batches"))),
        "lr_schedulers": ("mappings", _listed(content.get("lr_schedulers", []))),
        "optimizer_states": (
            "mappings with param_groups",
            _listed(content.get("optimizer_states", []), "param_groups"),
        ),
    }
    for name, (expected, right) in kinds.items():
        if not right:
            raise UserError(f"{path}: its {name} is {_shown(content[name])}: expected {expected}")
    check_metadata(path, content.get(METADATA_KEY, {}))


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, dict | list | Tensor) else repr(value)


def _named(value: Any, kind: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(each, kind) for name, each in value.items()
    )


def _listed(value: Any, key: str | None = None) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and (key is None or _listed(each.get(key))) for each in value
    )


def _options(value: Any) -> bool:
    return _named(value, object) and isinstance(value.get("model_args"), dict | None)


def _batches(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(
        type(value.get(name)) is int and 0 <= value[name] < 1 << 63 for name in _COUNTS
    )
