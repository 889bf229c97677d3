"""Read and write files of weights.

Files are read with `weights_only=True` alone: nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor

from fastvim.errors import UserError
from fastvim.storage import require_file, written
from fastvim.weights.archive import write_archive
from fastvim.weights.dense_names import published_head
from fastvim.weights.formats import inner_backbone, select_weights, tell
from fastvim.weights.metadata import check_metadata, parse
from fastvim.weights.unpickle import first_line, no_weights, read_pickled

_logger = logging.getLogger(__name__)

METADATA_KEY = "fastvim"
CHECKSUM_KEY = "fastvim_checksum"  # of our files of safetensors
PICKLED = (".ckpt", ".pth", ".pt")


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
            `stride`, `model_args`, `class_names`, `reduce_zero_label`, and what
            `config_text.tell` finds beside; `chosen`, which of two copies of the weights was taken
            without being asked for.
    """

    path: Path
    state: dict[str, Tensor]
    weights: str
    metadata: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


def read(path: str | os.PathLike[str], *, ema: bool | None = None) -> Checkpoint:
    """Read the weights of a file.

    Args:
        path: `.safetensors`, a training checkpoint of this library, a published FastVim file, or a
            file of the original Vim release. A published segmentor or detector is read whole; of
            one with other heads the backbone is taken, and a warning names the rest.
        ema: True for averaged weights, False for those of the optimiser, where the file has both;
            None for those that the published number of such a file belongs to: the averaged ones,
            but `model` of the original Vim's.

    Raises:
        UserError: no such file, or one that is damaged or holds no weights.
    """
    path = Path(os.path.expanduser(path))
    require_file(path)
    if not path.is_file():
        folder = ": it is a folder, expected a file" if path.is_dir() else ""
        raise UserError(f"no checkpoint at {path}{folder}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_pickled(path)
    selected = select_weights(content, ema)
    if not selected.state:
        raise UserError(f"{path} holds no weights: expected a state dict")
    state = selected.state
    metadata = check_metadata(path, content.get(METADATA_KEY, {}))
    if published_head(state) is None:
        state, left_out = inner_backbone(state)
        if left_out:
            parts = ", ".join(left_out)
            _logger.warning("%s: the backbone's weights alone are taken, not %s", path, parts)
    told = tell(content)
    if ema is None and selected.weights != "only":
        told["chosen"] = selected.weights
    return Checkpoint(path, state, selected.weights, metadata, told)


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        text, state = header.get(METADATA_KEY, "{}"), load_file(path)
        if header.get(CHECKSUM_KEY, checksum := _checksum(state, text)) != checksum:
            raise UserError(f"{path} is damaged: its checksum is not that of its content")
        metadata = parse(path, text)
        return Checkpoint(path, state, metadata.get("weights", "only"), metadata)
    except safetensors.SafetensorError as error:
        reason = first_line(error).removeprefix("Error while deserializing header: ")
        what = no_weights(path) or f"is damaged or not of safetensors: {reason}"
        raise UserError(f"{path} {what}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def check_finite(source: object, state: Mapping[str, Tensor]) -> None:
    """Raise UserError for a weight that is not finite.

    Args:
        source: the file, for the message.
        state: weights by name.
    """
    for name, weight in state.items():
        if not weight.is_floating_point() or weight.is_meta:
            continue  # a meta tensor has no values
        if not weight.isfinite().all():
            number = int((~weight.isfinite()).sum())
            raise UserError(
                f"{source}: {number} of {weight.numel()} values of {name} are not finite; expected "
                f"numbers that {str(weight.dtype).removeprefix('torch.')} can hold"
            )


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
    check_finite(path, state)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    text = json.dumps(metadata)
    header = {"format": "pt", METADATA_KEY: text, CHECKSUM_KEY: _checksum(tensors, text)}
    # `save_file` would put another file in the place of this one, for its owner alone.
    with written(path) as file:
        file.write(serialized(tensors, header))


def _checksum(state: Mapping[str, Tensor], metadata: str) -> str:
    """SHA-256 of our metadata and of name, type, shape and CRC-32 of every tensor."""
    listed = []
    for name, value in sorted(state.items()):
        content = value.reshape(-1).view(torch.uint8).numpy().data
        listed.append((name, str(value.dtype), tuple(value.shape), zlib.crc32(content)))
    return hashlib.sha256(json.dumps([metadata, listed]).encode()).hexdigest()


def save_pickled(path: Path, content: Mapping[str, Any]) -> None:
    """Write a dict of weights and plain values as torch does; complete or not at all."""
    check_finite(path, content["state_dict"])
    write_archive(path, dict(content))
