"""Weights in files: this library's safetensors, its training checkpoints, and published files.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvim.errors import UserError
from fastvim.models import (
    FastVim,
    FeatureMaps,
    MaskedAutoencoder,
    checkpoint_filter_fn,
    create_model,
    from_published,
    to_published,
)
from fastvim.models.heads.cascade import build_detector
from fastvim.models.heads.upernet import UPerNet
from fastvim.models.options import find_options, is_ours, model_of
from fastvim.models.published import is_channel, is_published, square_side, transpose_position

_logger = logging.getLogger(__name__)

METADATA_KEY = "fastvim"
_PREFIXES = ("_orig_mod.", "module.", "backbone.", "model.")
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
_ARRAY = np.empty(0).__reduce__()[0]  # numpy's function that makes an array of a pickle
_PICKLED = (".ckpt", ".pth", ".pt")
_HEAD = ("head.weight", "head.bias")
_MAP_NORMS = "norms."  # of a dense model's feature maps
_FIRST_BLOCK = re.compile(r"(.*\.)layers\.0\.mixer\.")


class _History:
    """Stands in for mmengine's record of a loss, which is read and left aside."""


# What stands beside the weights: the original Vim's arguments, mmengine's losses. Plain values.
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
        state: tensors, as named in the file but for prefixes.
        weights: which of the file's weights these are, "EMA" or "raw" ("only" if it has one kind).
        metadata: what this library wrote beside them; empty for a published file.
    """

    path: Path
    state: dict[str, Tensor]
    weights: str
    metadata: dict[str, Any] = field(default_factory=dict)


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
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            return Checkpoint(path, load_file(path), metadata.get("weights", "only"), metadata)
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is damaged: {_first_line(error)}") from error
    content = _torch_load(path)
    state, weights = _select(content, ema)
    if not state:
        raise UserError(f"{path} holds no weights: expected a state dict")
    state, left_out = _backbone_alone(state)
    if left_out:
        parts = ", ".join(left_out)
        _logger.warning("%s: the backbone's weights alone are taken, not %s", path, parts)
    return Checkpoint(path, state, weights, content.get(METADATA_KEY, {}))


def _torch_load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds more than plain values: {_first_line(error)}"
        ) from error
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged or no checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected a state dict")
    return content


def _select(content: Mapping[str, Any], ema: bool) -> tuple[dict[str, Tensor], str]:
    """The averaged or the raw weights among all that a file may call them."""
    averaged, raw = None, content
    if "averaging_state" in content:  # of this library's training
        averaged, raw = content["state_dict"], content["current_model_state"]
    elif not all(isinstance(content.get(key, {}), dict) for key in ("state_dict", "model")):
        raw = {}
    elif "state_dict" in content:  # published by FastVim
        state = content["state_dict"]
        inside = {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}
        averaged = content.get("state_dict_ema") or inside
        raw = {k: v for k, v in state.items() if not k.startswith("ema.")}
    elif "model" in content:  # original Vim
        averaged, raw = content.get("model_ema"), content["model"]
    if ema and averaged:
        return _strip(averaged), "EMA"
    return _strip(raw), "raw" if averaged else "only"


def _strip(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without prefixes that every name shares, such as `backbone.`."""
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _backbone_alone(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A published backbone without what stands beside it, such as heads, and names of that."""
    prefixes = {match[1] for name in state if (match := _FIRST_BLOCK.match(name))}
    if len(prefixes) != 1:
        return state, []
    prefix = prefixes.pop()
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    beside = {name.partition(".")[0] for name in state if not name.startswith(prefix)}
    return inside, sorted(beside)


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, ema: bool = True, new_head: bool = False
) -> Checkpoint:
    """Load a file into a model; nothing may be missing and nothing left over.

    A position embedding of another grid is resized; published names are translated.

    Args:
        model: any model; those of this library take published files too, and a FastVim or Vim
            takes the encoder of a masked autoencoder's file.
        path: see `read`.
        ema: take the averaged weights where the file has them.
        new_head: keep the model's own head where the file has none (a masked autoencoder's) or
            one of another size, to train for other classes.

    Raises:
        UserError: the weights are another architecture's; says which names and shapes.
    """
    checkpoint = read(path, ema=ema)
    load_state(model, checkpoint, new_head=new_head)
    return checkpoint


def load_state(model: nn.Module, checkpoint: Checkpoint, *, new_head: bool = False) -> None:
    """`load_weights` from a file that is already read."""
    state = checkpoint.state
    if isinstance(model, FastVim | MaskedAutoencoder):
        state = checkpoint_filter_fn(state, model)
    own = model.state_dict()
    if new_head:
        for name in _HEAD:
            if name in own and (name not in state or state[name].shape != own[name].shape):
                state = {**state, name: own[name]}
    problems = _differences(own, state)
    if problems:
        raise UserError(f"{checkpoint.path} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state)


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    return [
        f"{what} {_some(names)}"
        for what, names in (
            ("missing", [name for name in own if name not in state]),
            ("unexpected", [name for name in state if name not in own]),
            ("other shapes", shapes),
        )
        if names
    ]


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def save(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Write weights and what is needed to use them as one `.safetensors` file.

    The file appears complete or not at all.

    Args:
        path: where to.
        state: weights under our names.
        metadata: JSON values: `model` (timm name), `model_args`, and for predictions
            `class_names`, `mean`, `std`, `img_size`, `crop_pct`, `interpolation`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, part, {"format": "pt", METADATA_KEY: json.dumps(metadata)})
    part.replace(path)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    ema: bool = True,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Translate a published file to ours (`.safetensors`), or ours to a published one (`.ckpt`).

    Args:
        source: see `read`.
        target: file to write; `.ckpt`, `.pth` and `.pt` mean published names.
        ema: take the averaged weights where the file has them.
        model: timm name to write into our file; None finds the one of these sizes.
        model_args: options that leave no trace in published weights (`scan_path`, `pooling`,
            `alternate`, `pool_scale`; of channel models `token_order` and `pooled_axes`; of dense
            models `out_indices`, by default spread evenly over the blocks), and `img_size` where it
            was not 224.

    Returns:
        The metadata of our file: which weights they are, the model, its options as found.

    Raises:
        UserError: an unreadable source, or a target of another suffix.
    """
    target = Path(target)
    if target.suffix not in (".safetensors", *_PICKLED):
        raise UserError(f"{target}: expected a name in .safetensors (ours) or .ckpt (published)")
    state, metadata = understand(read(source, ema=ema), model_args)
    metadata["model"] = model or metadata["model"]
    for head in {"segmentation", "detection"} & metadata.keys():
        if target.suffix in _PICKLED:
            raise UserError(f"{source} holds a {head} model: it has no published names")
    if target.suffix == ".safetensors":
        save(target, state, metadata)
        return metadata
    if metadata["model_args"].get("scan_path") == "column":
        with torch.device("meta"):
            meta = create_model(metadata["model"], **metadata["model_args"])
        assert isinstance(meta, FastVim)
        grid = meta.grid_size
        state = {**state, "pos_embed": transpose_position(state["pos_embed"], grid)}
    target.parent.mkdir(parents=True, exist_ok=True)
    published = {f"backbone.{name}": value for name, value in to_published(state).items()}
    part = target.with_name(target.name + ".part")
    torch.save({"state_dict": published}, part)
    part.replace(target)
    return metadata


def understand(
    checkpoint: Checkpoint, model_args: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under our names, and the metadata that `save` would write beside them.

    Args:
        checkpoint: of one of our models, in our names or published ones.
        model_args: what the weights cannot tell (see `convert`); it wins over what they tell.

    Raises:
        UserError: other weights than those, or options that contradict them.
    """
    state, metadata, given = checkpoint.state, checkpoint.metadata, dict(model_args or {})
    indices = given.pop("out_indices", None)
    if "model" in metadata:
        options = {**metadata["model_args"], **given}
        features = {} if indices is None else _features(state, indices)
        found = {"weights": checkpoint.weights, "model_args": options, **features}
        return state, {**metadata, **found}
    published = is_published(state)
    if published:
        state = from_published(state)
    features = _features(state, indices)
    options = {**find_options(state, given.get("img_size")), **given}
    model = model_of(options, is_channel(state))
    with torch.device("meta"):
        create_model(model, **options)  # tells of an option that it does not take
    if published and options.get("scan_path") == "column":
        side = square_side(state["pos_embed"].shape[1])
        assert side is not None
        state["pos_embed"] = transpose_position(state["pos_embed"], (side, side))
    return state, {
        "model": model,
        "model_args": options,
        "weights": checkpoint.weights,
        **features,
    }


def _features(state: Mapping[str, Tensor], given: Sequence[int] | None) -> dict[str, Any]:
    """`features` of the metadata: which maps a dense model takes; empty for another model."""
    count = len({name.split(".")[1] for name in state if name.startswith(_MAP_NORMS)})
    if given is not None and len(given) != count:
        raise UserError(f"out_indices {list(given)}: the weights are for {count} maps")
    if not count:
        return {}
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    evenly = [(i + 1) * depth // count - 1 for i in range(count)]
    return {"features": {"out_indices": list(given or evenly), "source": "mixer"}}


def load_model(
    name: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    ema: bool = True,
    **model_args: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with a file's weights, built as the file says, and the file's metadata.

    A file of the segmentation task gives the whole `UPerNet`, one of the detection task the whole
    `CascadeMaskRCNN`, one of a published segmentor's or detector's backbone `FeatureMaps`.

    Args:
        name: timm name; None for the one that the file names.
        path: weights; None for the initial ones.
        ema: take the averaged weights where the file has them.
        **model_args: options of the model, over those of the file.

    Raises:
        UserError: neither a name nor a file, an unknown model or option, weights that do not fit.
    """
    if path is None:
        if name is None:
            raise UserError("expected the name of a model, or a checkpoint that holds one")
        return create_model(name, **model_args), {"model": name, "model_args": model_args}
    checkpoint = read(path, ema=ema)
    state, written = checkpoint.state, checkpoint.metadata.get("model")
    if name is not None and written not in (None, name):
        raise UserError(f"{path} holds weights of {written}, not of {name}")
    if "model" in checkpoint.metadata or is_published(state) or is_ours(state):
        ours, metadata = understand(checkpoint, model_args)
    elif name is not None:
        metadata = {"model": name, "model_args": model_args}
    else:
        raise UserError(f"{path} does not say which model it is of: expected its name as well")
    model = create_model(name or metadata["model"], **metadata["model_args"])
    if head := metadata.get("segmentation"):
        model = _segmenter(model, head)
    elif head := metadata.get("detection"):
        assert isinstance(model, FastVim)
        model = build_detector(model, **head)
    elif features := metadata.get("features"):
        assert isinstance(model, FastVim)
        model = FeatureMaps(model, **features)
        named = {n if n.startswith(_MAP_NORMS) else f"backbone.{n}": t for n, t in ours.items()}
        checkpoint = replace(checkpoint, state=named)
    load_state(model, checkpoint)
    return model, metadata


def _segmenter(backbone: nn.Module, head: Mapping[str, Any]) -> UPerNet:
    """UPerNet as the metadata of a file tell of its head."""
    assert isinstance(backbone, FastVim)
    maps = FeatureMaps(backbone, head["out_indices"], head["source"])
    sizes = {name: head[name] for name in ("num_classes", "channels", "aux_channels")}
    return UPerNet(maps, **sizes)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
