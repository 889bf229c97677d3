"""Read and write files of weights.

Files are read with `weights_only=True` alone: nothing in them is executed.
"""

from __future__ import annotations

import argparse
import codecs
import json
import logging
import os
import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvim.errors import UserError
from fastvim.weights.formats import backbone_alone, select_weights

_logger = logging.getLogger(__name__)

METADATA_KEY = "fastvim"
PICKLED = (".ckpt", ".pth", ".pt")
# What unpickling damaged bytes has been seen to raise.
_DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
_ARRAY = np.empty(0).__reduce__()[0]  # numpy's function that rebuilds a pickled array


class _History:
    """Stands in for mmengine's record of a loss, which is read and not used."""


# What lies beside the weights: the original Vim's arguments, mmengine's losses. Plain values.
_PLAIN: list[Any] = [
    argparse.Namespace,
    (_History, "mmengine.logging.history_buffer.HistoryBuffer"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64")),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (codecs.encode, "_codecs.encode"),
]


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        path: the file.
        state: tensors under the file's names, without their common prefixes.
        weights: which of the file's weights these are, "EMA" or "raw" ("only" if it has one kind).
        metadata: what this library wrote beside them; empty for a published file.
        told: what a published file says of its model, as far as it says it: `family` ("fastvim" or
            "vim"), `head` ("segmentation" or "detection"), `out_indices`, `img_size`, `window`,
            `stride`, `class_names`, `reduce_zero_label`.
    """

    path: Path
    state: dict[str, Tensor]
    weights: str
    metadata: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


def read(path: str | os.PathLike[str], *, ema: bool = True) -> Checkpoint:
    """Read the weights of a file, the averaged ones where it has them.

    Args:
        path: `.safetensors`, a training checkpoint of this library, a published FastVim file, or a
            file of the original Vim release. Of a published segmentor or detector the backbone is
            taken; a warning names the rest.
        ema: False for the weights that are not averaged.

    Raises:
        UserError: no such file, or one that is damaged or holds no weights.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_pickled(path)
    state, weights = select_weights(content, ema)
    if not state:
        raise UserError(f"{path} holds no weights: expected a state dict")
    state, left_out = backbone_alone(state)
    if left_out:
        parts = ", ".join(left_out)
        _logger.warning("%s: the backbone's weights alone are taken, not %s", path, parts)
    return Checkpoint(path, state, weights, content.get(METADATA_KEY, {}))


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        return Checkpoint(path, load_file(path), metadata.get("weights", "only"), metadata)
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: {_first_line(error)}") from error


def _read_pickled(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds more than plain values: {_refused(error)}"
        ) from error
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged or no checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected a state dict")
    return content


def save(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Write weights and what is needed to use them as one `.safetensors` file.

    The file appears complete or not at all.

    Args:
        path: the file to write; its folder is made if need be.
        state: weights under our names.
        metadata: JSON values: `model` (timm name), `model_args`, and for predictions
            `class_names`, `mean`, `std`, `img_size`, `crop_pct`, `interpolation`.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with _complete_or_absent(Path(path)) as part:
        save_file(tensors, part, {"format": "pt", METADATA_KEY: json.dumps(metadata)})


def save_published(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write weights under published names as the published training script does."""
    with _complete_or_absent(path) as part:
        torch.save({"state_dict": {f"backbone.{n}": t for n, t in state.items()}}, part)


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """A name to write to, which is renamed to `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _refused(error: pickle.UnpicklingError) -> str:
    """What torch would not load, without its advice to execute the file."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)|(Trying to load .+)", str(error))
    return (found[1] or found[2]).partition(". ")[0].rstrip(".") if found else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
