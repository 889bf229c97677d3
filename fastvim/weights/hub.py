"""A folder of weights that timm, transformers and the Hugging Face hub know how to load.

Beside `model.safetensors` lie `config.json`, in timm's form, and the model card, `README.md`. Both
libraries build a model by its timm name, so a program that loads the folder imports `fastvim`.
Segmentors, detectors and bare backbones of them have no name in timm: their folder has the card
alone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from timm.models import filter_pretrained_cfg
from torch import Tensor, nn

from fastvim.models import FastChannelVim, FastVim, MaskedAutoencoder
from fastvim.storage import written
from fastvim.weights.card import MARK, WEIGHTS, model_card
from fastvim.weights.files import save
from fastvim.weights.table import ENTRIES
from fastvim.weights.usage import class_names, image_settings

_logger = logging.getLogger(__name__)

CONFIG, CARD = "config.json", "README.md"
HEADS = ("segmentation", "detection", "features")  # of metadata, that timm knows nothing of
# Of another model's weights, or said anew.
_OLD = (
    *("architecture", "tag", "license", "description", "label_names", "label_descriptions"),
    *("label_offset", "test_input_size", "test_crop_pct", "custom_load", "origin_url"),
)


def save_folder(
    folder: Path,
    state: Mapping[str, Tensor],
    metadata: dict[str, Any],
    model: nn.Module,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Write weights, timm's configuration and the model card: all three, or nothing.

    A `config.json` or `README.md` of another origin is left as it is, and a warning names it.

    Args:
        folder: is made if need be.
        state: weights under our names.
        metadata: of `fastvim.weights.save`; `metrics`, lines of text, are for the card.
        model: that the metadata describe. Its weights are not looked at.
        recipe: configuration of the run, for the card.
    """
    config = timm_config(model, metadata)
    texts = {CARD: model_card(model, metadata, config, recipe or {})}
    if config is not None:
        texts[CONFIG] = json.dumps(config, indent=2) + "\n"
    with ExitStack() as stack:
        for name, text in texts.items():
            if _is_foreign(folder / name):
                _logger.warning("%s is not of fastvim: left as it is", folder / name)
                continue
            file = stack.enter_context(written(folder / name))
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())  # a full disk is found before the weights are there
        save(folder / WEIGHTS, state, metadata)


def timm_config(model: nn.Module, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """What `config.json` says of a model; None for one that timm cannot build.

    Args:
        model: as timm has created it.
        metadata: of its weights.
    """
    if any(head in metadata for head in HEADS):
        return None
    name = metadata["model"]
    entry = ENTRIES.get(name)  # a name with a tag means its options
    options = {**({} if entry is None else entry.model_args), **metadata.get("model_args", {})}
    options.pop("num_classes", None)  # transformers takes it from `config` itself
    classes = -1 if isinstance(model, MaskedAutoencoder) else int(getattr(model, "num_classes", 0))
    images = _images(model, metadata)
    if isinstance(model, FastVim) and images["input_size"][0] == 1 and classes > 0:
        options["takes_rgb"] = True  # transformers' pipeline makes every image RGB
    inherited = filter_pretrained_cfg(getattr(model, "pretrained_cfg", {}), remove_source=True)
    pool = getattr(model, "global_pool", None)
    config = {
        "architecture": name.partition(".")[0],
        "num_classes": classes,
        "num_features": getattr(model, "num_features", None),
        "global_pool": pool if isinstance(pool, str) else None,  # else a module
        "label_names": class_names(model, metadata) if classes > 0 else None,
        "model_args": options,
        "pretrained_cfg": {
            **{key: value for key, value in inherited.items() if key not in _OLD},
            **images,
            "num_classes": classes,
            **({"license": metadata["licence"].lower()} if "licence" in metadata else {}),
        },
    }
    return {key: value for key, value in config.items() if value is not None}


def _images(model: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """How images are prepared, in timm's words: mean and deviation are of values from 0 to 1."""
    told = image_settings(model, metadata)
    size, white = told["img_size"], 1.0
    if isinstance(model, FastChannelVim) and "mean" in metadata:
        white = 255.0  # ours are of values as stored
    return {
        "input_size": [told["in_chans"], *((size, size) if isinstance(size, int) else size)],
        "mean": [value / white for value in told["mean"]],
        "std": [value / white for value in told["std"]],
        "crop_pct": told["crop_pct"],
        "interpolation": told["interpolation"],
        "crop_mode": "center",
    }


def _is_foreign(path: Path) -> bool:
    """Whether a file lies there that this module did not write."""
    if not path.exists():
        return False
    try:
        text = path.read_text("utf-8")
        if path.name == CARD:
            return MARK not in text
        return "pretrained_cfg" not in json.loads(text)
    except (OSError, ValueError, TypeError):
        return True
