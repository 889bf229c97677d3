"""How a model with weights is used: its images, and the names of its outputs."""

from __future__ import annotations

from typing import Any

from timm.data import ImageNetInfo, resolve_model_data_config
from torch import nn


def image_settings(model: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """How to prepare an image: as the weights' file says, else as timm's configuration does.

    Converted weights say nothing about images: the size is then that of the model's options.

    Args:
        model: whose configuration has the defaults.
        metadata: of the weights' file.

    Returns:
        The arguments of `fastvim.data.transforms.evaluation_transform`.
    """
    options = metadata.get("model_args", {})
    told = {name: options[name] for name in ("img_size", "in_chans") if name in options}
    told |= metadata
    config = resolve_model_data_config(model)
    channels, *size = config["input_size"]
    default = {
        "img_size": tuple(size),
        "in_chans": channels,
        "mean": config["mean"],
        "std": config["std"],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }
    settings = {key: told.get(key, value) for key, value in default.items()}
    for key in ("mean", "std"):  # a single value serves every channel
        values = tuple(settings[key])
        settings[key] = values * settings["in_chans"] if len(values) == 1 else values
    return settings


def class_names(model: nn.Module, metadata: dict[str, Any]) -> list[str]:
    """Names of a model's outputs: the file's, ImageNet's for 1000 of them, else their numbers.

    Args:
        model: a classifier.
        metadata: of the weights' file.
    """
    count = int(getattr(model, "num_classes", 0))
    names = metadata.get("class_names") or []
    if len(names) == count:
        return list(names)
    if count == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(count)]
    return [f"class {i}" for i in range(count)]
