"""What a file's weights are of: our names for them, the model, its options and its head.

The shapes of the weights tell sizes. The rest comes from the caller, the file's own configuration
or the table of published files, in this order; what none of them tells is assumed, and said.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastvim.errors import UserError
from fastvim.models.factory import create_model, is_ours
from fastvim.weights import dense_names, names
from fastvim.weights.build import check_described
from fastvim.weights.dense_metadata import OPTIONS, Source, change, describe
from fastvim.weights.files import Checkpoint
from fastvim.weights.options import find_options, match
from fastvim.weights.options import is_ours as has_our_names
from fastvim.weights.table import Entry, of_file

_logger = logging.getLogger(__name__)

# Options that leave no trace in weights, and what is assumed where nothing tells them.
_POOLED = {"pooling": "mean", "pool_scale": 1.0, "scan_path": "row", "alternate": True}
_MASKED = {"mask_ratio": 0.75, "norm_pix_loss": True}
_CHANNELS = {"token_order": "channel_first", "pooled_axes": 1}
# What metadata say of a whole model and not of its backbone.
_OF_HEADS = (
    *("class_names", "category_ids", "reduce_zero_label", "base_size", "eval_size", "antialias"),
    *("published", "number", "source"),
)
UNTOLD = {**_POOLED, **_MASKED, **_CHANNELS}


def resolve(
    checkpoint: Checkpoint,
    model_args: Mapping[str, Any] | None = None,
    *,
    model: str | None = None,
    entry: Entry | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under our names, and the metadata that `save` would write beside them.

    Args:
        checkpoint: of one of our models, in our names or published ones.
        model_args: what the weights cannot tell (see `convert`); it wins over what they tell.
        model: timm name of the model; None for the one that the file or the table names, or the
            one of these sizes.
        entry: of the table, whose file this is; None finds it by the file's name.

    Raises:
        UserError: other weights than those, or options that contradict them.
    """
    given = dict(model_args or {})
    if "model" in checkpoint.metadata:
        return _ours(checkpoint, given, model)
    state = checkpoint.state
    kind = dense_names.head_of(state)
    known = _find_entry(checkpoint, kind, entry)
    of_head = {name: given.pop(name) for name in _head_options(kind) if name in given}
    told = _told_options(checkpoint, known, model)
    wanted = {**told, **given}
    state = _our_names(checkpoint, kind, wanted)
    backbone = dense_names.backbone_state(state) if kind else state
    sizes = _sizes(backbone, given.get("img_size"), told.get("img_size"))
    options = {**sizes, **wanted, "img_size": sizes["img_size"]}
    if model is None:
        model = match(options, names.is_channel(backbone)) if known is None else known.backbone
    with torch.device("meta"):
        create_model(model, **options)  # raises for an option that the model does not take
    source = Source(of_head, checkpoint.told, known, options["img_size"], count_blocks(backbone))
    found, assumed = describe(kind, state, source)
    if known is None:
        assumed = {**_untold(backbone, options, wanted), **assumed}
    if entry is None:
        _say(checkpoint, known, told, assumed)
    if known is not None:
        found = {**_published_images(known, options), **found}
        whole = {"published": known.name} if kind == next(iter(known.head), None) else {}
        found |= {"licence": known.licence, **whole}
    if "licence" in checkpoint.told:
        found["licence"] = checkpoint.told["licence"]
    return state, {"model": model, "model_args": options, "weights": checkpoint.weights, **found}


def take_backbone(checkpoint: Checkpoint) -> Checkpoint:
    """The backbone of a whole segmentor or detector alone, and the norms of its maps.

    Published names stay published ones. Other models' checkpoints are returned as they are.
    """
    state, metadata = checkpoint.state, dict(checkpoint.metadata)
    if dense_names.published_head(state):
        inside = dense_names.published_backbone(state)
    elif head := dense_names.own_head(state):
        inside = dense_names.backbone_state(state)
        described = metadata.pop(head, None)
        if described is not None:
            blocks = described.get("out_indices", [count_blocks(inside) - 1])
            source = described.get("source", "mixer")
            metadata["features"] = {"out_indices": blocks, "source": source}
        metadata = {name: value for name, value in metadata.items() if name not in _OF_HEADS}
    else:
        return checkpoint
    rest = sorted({name.partition(".")[0] for name in state} - {"backbone", "maps"})
    _logger.warning(
        "%s: the backbone's weights alone are taken, not %s", checkpoint.path, ", ".join(rest)
    )
    return replace(checkpoint, state=inside, metadata=metadata)


def is_known(checkpoint: Checkpoint) -> bool:
    """Whether these are weights of one of our models, so that `resolve` takes them."""
    state = checkpoint.state
    kinds = (dense_names.head_of, names.is_published, has_our_names)
    return "model" in checkpoint.metadata or any(kind(state) for kind in kinds)


def _ours(
    checkpoint: Checkpoint, given: dict[str, Any], model: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of a file of this library, whose metadata say everything."""
    state, metadata = checkpoint.state, checkpoint.metadata
    if is_ours(metadata["model"]):
        check_described(checkpoint)
    elif model is None:
        raise UserError(
            f"{checkpoint.path} holds weights of {metadata['model']}, no model of this library: "
            "expected its name as well (--model NAME --checkpoint FILE)"
        )
    found: dict[str, Any] = {"weights": checkpoint.weights, "model": model or metadata["model"]}
    kind = next((kind for kind in OPTIONS if kind in metadata), None)
    of_head = {name: given.pop(name) for name in _head_options(kind) if name in given}
    if of_head:
        backbone = dense_names.backbone_state(state) if kind else state
        source = Source(of_head, {}, None, 0, count_blocks(backbone))
        found |= change(kind, metadata, source) if kind else describe(None, state, source)[0]
    return state, {**metadata, **found, "model_args": {**metadata.get("model_args", {}), **given}}


def count_blocks(state: Mapping[str, Tensor]) -> int:
    """Blocks of a backbone under our names; 0 for another model."""
    inside = names.encoder_state(state) if names.is_masked(state) else state
    blocks = [int(name.split(".")[1]) for name in inside if name.startswith("blocks.")]
    return 1 + max(blocks, default=-1)


def _head_options(kind: str | None) -> tuple[str, ...]:
    return ("out_indices", *OPTIONS.get(kind or "", ()))


def _find_entry(checkpoint: Checkpoint, kind: str | None, entry: Entry | None) -> Entry | None:
    """The table's entry of a file, unless the file is of another kind of model."""
    known = entry or of_file(checkpoint.path.name)
    problem = None if known is None else _contradiction(known, checkpoint.state, kind)
    if known is None or problem is None:
        return known
    if entry is not None:
        raise UserError(f"{checkpoint.path} is not the file of {known.name}: {problem}")
    _logger.warning(
        "%s has the name of %s but is not its file: %s", checkpoint.path, known.name, problem
    )
    return None


def _contradiction(entry: Entry, state: Mapping[str, Tensor], kind: str | None) -> str | None:
    """Why weights are not those of an entry, whatever their sizes; None if they may be."""
    expected = next(iter(entry.head), None)
    # The backbone of a dense model may stand alone.
    if kind != expected and (kind is not None or not names.has_map_norms(state)):
        return f"it holds {kind or 'no'} head"
    tokens = "cls_token" in state or "encoder.cls_token" in state
    pairs = (
        ("a masked autoencoder", names.is_masked(state), entry.backbone.startswith("mae_")),
        ("a channel model", names.is_channel(state), "channelvim" in entry.backbone),
        ("a model with a class token", tokens, _has_class_token(entry)),
    )
    for what, found, wanted in pairs:
        if found != wanted:
            return f"it is {'' if found else 'not '}{what}"
    return None


def _has_class_token(entry: Entry) -> bool:
    return bool(entry.model_args.get("class_token", _family(entry.backbone) == "vim"))


def untold_options(entry: Entry) -> dict[str, Any]:
    """The options of an entry that leave no trace in its weights."""
    return {name: value for name, value in entry.model_args.items() if name in UNTOLD}


def _told_options(checkpoint: Checkpoint, entry: Entry | None, model: str | None) -> dict[str, Any]:
    """Options that leave no trace in the weights, as names, the file or the table tell them."""
    told: dict[str, Any] = {}
    if entry is not None:
        told = untold_options(entry)
    told |= checkpoint.told.get("model_args", {})
    published = None if entry is None else entry.backbone
    family = _family(model) or checkpoint.told.get("family") or _family(published)
    if family == "vim":
        told["pooling"] = "none"
    elif family is not None and told.get("pooling") in (None, "none"):
        told["pooling"] = "mean"
    if told.get("pooling") == "none":
        told = {name: told[name] for name in told if name not in ("pool_scale", "alternate")}
    if "img_size" in checkpoint.told:
        told["img_size"] = checkpoint.told["img_size"]
    return told


def _published_images(entry: Entry, options: Mapping[str, Any]) -> dict[str, Any]:
    """How evaluation prepares images, by the table; the weights tell sizes and channels."""
    found = {n: list(v) if isinstance(v, tuple) else v for n, v in entry.images.items()}
    if len(found.get("mean", ())) != options["in_chans"]:
        found = {name: value for name, value in found.items() if name not in ("mean", "std")}
    of_sizes = ("img_size", "in_chans", "base_size", "eval_size")
    return {name: value for name, value in found.items() if name not in of_sizes}


def _family(name: str | None) -> str | None:
    """The family of a model's name, "fastvim" or "vim"; None for a name of neither."""
    if name is None or "vim" not in name:
        return None
    return "fastvim" if "fast" in name else "vim"


def _our_names(
    checkpoint: Checkpoint, kind: str | None, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    state = checkpoint.state
    whole = dense_names.published_head(state) is not None
    if not whole and not names.is_published(state):
        return state
    prefix = "backbone." if whole else ""
    position = state.get(f"{prefix}pos_embed")
    column_grid = None
    if options.get("scan_path") == "column" and position is not None:
        column_grid = _grid(position.shape[1], options.get("img_size"))
    translate = dense_names.from_published if whole else names.from_published
    return translate(state, column_grid)


def _grid(cells: int, img_size: Any) -> tuple[int, int] | None:
    """Rows and columns of a grid of cells, square but for an image that is not."""
    if isinstance(img_size, list | tuple) and len(img_size) == 2:
        height, width = img_size
        rows = math.isqrt(cells * height // width)
        return (rows, cells // rows) if rows and cells % rows == 0 else None
    side = names.square_side(cells)
    return None if side is None else (side, side)


def _sizes(state: Mapping[str, Tensor], given: Any, told: Any) -> dict[str, Any]:
    """The options that shapes tell; `img_size` is the caller's, or the file's where it fits."""
    if given is None and told is not None:
        with suppress(UserError):
            return find_options(state, told)
    return find_options(state, given)


def _untold(
    state: Mapping[str, Tensor], options: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Options that nothing tells, and what is assumed."""
    masked, channels = names.is_masked(state), names.is_channel(state)
    assumed: dict[str, Any] = dict(_MASKED) if masked else {}
    if options.get("patch_stride") not in (None, options["patch_size"]):
        assumed["img_size"] = options["img_size"]  # patches that overlap
    if not options["class_token"]:
        pooled = dict(_POOLED)
        if options["pooling"] == "none":
            pooled = {"scan_path": "row"}
        elif masked:
            pooled = {name: _POOLED[name] for name in ("pooling", "alternate")}
        assumed |= {**pooled, **(_CHANNELS if channels else {})}
    return {name: value for name, value in assumed.items() if name not in wanted}


def _say(
    checkpoint: Checkpoint,
    known: Entry | None,
    told: Mapping[str, Any],
    assumed: Mapping[str, Any],
) -> None:
    """One line: what the file's name tells, what nothing tells, and how to say otherwise."""
    parts = []
    if known is not None:
        options = [f"{name}={value!r}" for name, value in told.items() if name != "img_size"]
        parts.append(f"taken as published as {known.name}: {', '.join(options)}".rstrip(": "))
    if assumed:
        values = [f"{name}={value!r}" for name, value in assumed.items()]
        if "pooling" in assumed:
            values.insert(0, "a FastVim (a Vim has pooling='none')")
        parts.append(
            f"nothing tells, so assumed: {', '.join(values)} "
            "(--model-arg OPTION=VALUE or a keyword of load_model says otherwise)"
        )
    if "chosen" in checkpoint.told:
        parts.append(_copy(checkpoint.told["chosen"]))
    if parts:
        _logger.warning("%s: %s", checkpoint.path, "; ".join(parts))


def _copy(chosen: str) -> str:
    """Which copy of the weights is taken without being asked for, and how to ask for the other."""
    if chosen == "EMA":
        return "the averaged weights are taken (--raw or ema=False takes the others)"
    return (
        "the weights that were not averaged are taken, since the published number is of them "
        "(--ema or ema=True takes the others)"
    )
