"""Weights in files: this library's safetensors, its training checkpoints, and published files.

Files are read with `weights_only=True` alone: nothing in them is executed.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvim.errors import UserError
from fastvim.models import (
    FastVim,
    checkpoint_filter_fn,
    create_model,
    from_published,
    to_published,
)
from fastvim.models.published import is_published, transpose_position

METADATA_KEY = "fastvim"
_PREFIXES = ("_orig_mod.", "module.", "backbone.", "model.")
_PICKLED = (".ckpt", ".pth", ".pt")
_HEAD = ("head.weight", "head.bias")


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
            file of the original Vim release.
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
    return Checkpoint(path, state, weights, content.get(METADATA_KEY, {}))


def _torch_load(path: Path) -> dict[str, Any]:
    try:
        # The original Vim release keeps its argparse.Namespace beside the weights: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds more than plain values: {_first_line(error)}"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged or no checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected a state dict")
    return content


def _select(content: Mapping[str, Any], ema: bool) -> tuple[dict[str, Tensor], str]:
    """The averaged or the raw weights among all that a file may call them."""
    averaged, raw = None, None
    if "averaging_state" in content:  # of this library's training
        averaged, raw = content["state_dict"], content["current_model_state"]
    elif "state_dict" in content:  # published by FastVim
        state = content["state_dict"]
        inside = {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}
        averaged = content.get("state_dict_ema") or inside or None
        raw = {k: v for k, v in state.items() if not k.startswith("ema.")}
    elif "model" in content and not isinstance(content["model"], Tensor):  # original Vim
        averaged, raw = content.get("model_ema"), content["model"]
    else:
        raw = content
    if ema and averaged:
        return _strip(averaged), "EMA"
    return _strip(raw), "raw" if averaged else "only"


def _strip(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without prefixes that every name shares, such as `backbone.`."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, ema: bool = True, new_head: bool = False
) -> Checkpoint:
    """Load a file into a model; nothing may be missing and nothing left over.

    A position embedding of another grid is resized; published names are translated.

    Args:
        model: any model; FastVim and Vim take published files too.
        path: see `read`.
        ema: take the averaged weights where the file has them.
        new_head: keep the model's own head where the file has none or one of another size, to
            train for other classes.

    Raises:
        UserError: the weights are another architecture's; says which names and shapes.
    """
    checkpoint = read(path, ema=ema)
    load_state(model, checkpoint, new_head=new_head)
    return checkpoint


def load_state(model: nn.Module, checkpoint: Checkpoint, *, new_head: bool = False) -> None:
    """`load_weights` from a file that is already read."""
    state = checkpoint.state
    if isinstance(model, FastVim):
        if is_published(state):
            state = swap_columns(from_published(state), {"scan_path": model.scan_path})
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


def find_options(state: Mapping[str, Tensor], img_size: int | None = None) -> dict[str, Any]:
    """The options of a FastVim or Vim model that its weights give away, under our names.

    `pooling`, `alternate`, `scan_path` and `pool_scale` leave no trace; weights with a class token
    are taken for Vim's, others for FastVim's.

    Args:
        state: weights under our names.
        img_size: side in pixels that the position embedding was made for. None: 224 where that
            gives whole strides to a model with a class token (Vim's overlapping patches), else a
            patch per cell.

    Raises:
        UserError: not weights of FastVim or Vim, or a position embedding of no square grid.
    """
    try:
        embed_dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        position, A_log = state["pos_embed"], state["blocks.0.mixer.A_log"]
    except (KeyError, ValueError) as error:
        raise UserError(f"not weights of a FastVim or Vim image model: {error} missing") from error
    class_token = "cls_token" in state
    cells = position.shape[1] - int(class_token)
    side = round(cells**0.5)
    if side**2 != cells:
        raise UserError(f"pos_embed {tuple(position.shape)}: not of a square grid")
    stride = patch
    if img_size is None:
        overlap = class_token and side > 1 and side * patch != 224
        img_size = 224 if overlap and (224 - patch) % (side - 1) == 0 else side * patch
    if img_size != side * patch:
        stride, rest = divmod(img_size - patch, max(1, side - 1))
        if rest:
            raise UserError(f"img_size={img_size} does not give the weights' {side} x {side} grid")
    norm_after_ssm = "blocks.0.mixer.norm.weight" in state
    head = state.get("head.weight")
    return {
        "embed_dim": embed_dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "img_size": img_size,
        "patch_size": patch,
        "patch_stride": stride,
        "in_chans": in_chans,
        "num_classes": 0 if head is None else head.shape[0],
        "class_token": class_token,
        "global_pool": "token" if class_token else "avg",
        "pooling": "none" if class_token else "mean",
        "norm": "layer" if "blocks.0.norm.bias" in state else "rms",
        "norm_after_ssm": norm_after_ssm,
        "init_layer_scale": 1.0 if "blocks.0.mixer.gamma" in state else None,
        "d_state": A_log.shape[2],
        "d_conv": state["blocks.0.mixer.conv_weight"].shape[2],
        "expand": A_log.shape[1] // embed_dim,
        "dt_rank": state["blocks.0.mixer.dt_proj"].shape[2],
    }


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
            `alternate`, `pool_scale`), and `img_size` where it was not 224.

    Returns:
        The metadata of our file: which weights they are, the model, its options as found.

    Raises:
        UserError: an unreadable source, or a target of another suffix.
    """
    target = Path(target)
    if target.suffix not in (".safetensors", *_PICKLED):
        raise UserError(f"{target}: expected a name in .safetensors (ours) or .ckpt (published)")
    checkpoint = read(source, ema=ema)
    state, metadata = understand(checkpoint, model_args)
    metadata["model"] = model or metadata["model"]
    if target.suffix == ".safetensors":
        save(target, state, metadata)
    else:
        published = to_published(swap_columns(state, metadata["model_args"]))
        torch.save({"state_dict": {f"backbone.{k}": v for k, v in published.items()}}, target)
    return metadata


def understand(
    checkpoint: Checkpoint, model_args: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under our names, and the metadata that `save` would write beside them.

    Args:
        checkpoint: of FastVim or Vim, in our names or published ones.
        model_args: what the weights cannot tell (see `convert`); it wins over what they tell.
    """
    state = checkpoint.state
    published = is_published(state)
    if published:
        state = from_published(state)
    known = {**checkpoint.metadata.get("model_args", {}), **(model_args or {})}
    options = {**find_options(state, known.get("img_size")), **known}
    metadata = {**checkpoint.metadata, "weights": checkpoint.weights, "model_args": options}
    metadata.setdefault("model", _model_of(options))
    return swap_columns(state, options) if published else state, metadata


def swap_columns(state: dict[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Between our position embedding and the published one, which the column variant transposes."""
    if options.get("scan_path") != "column":
        return state
    side = round(state["pos_embed"].shape[1] ** 0.5)
    return {**state, "pos_embed": transpose_position(state["pos_embed"], (side, side))}


def _model_of(options: Mapping[str, Any]) -> str:
    """The registered model with these sizes; else the family's smallest, for options to change."""
    family = "vim" if options["pooling"] == "none" else "fastvim"
    for name in timm.list_models(f"{family}_*"):
        with torch.device("meta"):
            model = create_model(name, num_classes=0)
        assert isinstance(model, FastVim)
        sizes = (model.embed_dim, len(model.blocks), model.patch_embed.patch_size)
        if sizes == (options["embed_dim"], options["depth"], options["patch_size"]):
            return name
    return f"{family}_tiny_patch16_224"


def load_model(
    name: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    ema: bool = True,
    **model_args: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with a file's weights, built as the file says, and the file's metadata.

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
    metadata = checkpoint.metadata
    if not metadata:
        if not is_published(checkpoint.state) and "blocks.0.mixer.A_log" not in checkpoint.state:
            metadata = {"model": name, "model_args": model_args}
        else:
            _, metadata = understand(checkpoint, model_args)
    model = create_model(name or metadata["model"], **{**metadata["model_args"], **model_args})
    load_state(model, checkpoint)
    return model, metadata


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
