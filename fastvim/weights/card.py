"""The model card of a folder of weights: Markdown, with the fields that the hub reads on top."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml
from torch import nn

from fastvim.models import FastChannelVim, MaskedAutoencoder
from fastvim.models.factory import is_ours
from fastvim.weights.table import ENTRIES

WEIGHTS = "model.safetensors"
MARK = "# Written by fastvim, which writes it anew as long as this line is here."
SHOWN = 50  # classes named in the card


class _Task(NamedTuple):
    """What models of a kind are.

    Attributes:
        tag: the hub's name of the task.
        command: that uses them; "" for none.
        what: in words.
    """

    tag: str
    command: str
    what: str


_FEATURES = "image-feature-extraction"
_TASKS = {
    "segmentation": _Task("image-segmentation", "segment", "a segmentor, UPerNet over"),
    "detection": _Task("object-detection", "detect", "a detector, Cascade Mask R-CNN over"),
    "features": _Task(_FEATURES, "", "the backbone of a segmentor or detector,"),
    "masked": _Task(_FEATURES, "reconstruct", "a masked autoencoder,"),
    "classes": _Task("image-classification", "predict", "a classifier of images,"),
    "backbone": _Task(_FEATURES, "", "a backbone without a head,"),
}
_HUB_DATA = {"imagenet": "imagenet-1k"}  # data of published weights that the hub has

HOME = "https://github.com/fastvim/fastvim"
_OURS = """```python
import fastvim

model, metadata = fastvim.load_model(path="FOLDER/model.safetensors")
```
"""
_NEEDED = "timm and transformers know the model once fastvim is imported.\n"
_TIMM = """```python
import {needed}timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or hf-hub:OWNER/NAME
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
"""
_PIPELINE = """```python
import {needed}transformers

classify = transformers.pipeline("image-classification", model="FOLDER")  # or OWNER/NAME
print(classify("photo.jpg"))
```
"""
_GREY = """The pipeline makes every image RGB, and the model makes RGB images grey. A grey picture
gives the same as `fastvim predict`; of a coloured one the grey values are not rounded to 8 bits.
"""
_RANGE = """The model was trained with a `value_range`, which the pipeline does not know. It gives
the same as `fastvim predict` for pictures of 8 bits alone, and only if the range ends beyond 255.
"""
_CHANNELS = """An image is a tensor of its channels; `model(images, channels=[2, 0])` names them.
The mean and deviation above are of values from 0 to 1, those of the metadata of values as stored.
"""


def model_card(
    model: nn.Module,
    metadata: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    recipe: Mapping[str, Any],
) -> str:
    """The text of `README.md`.

    Args:
        model: that the metadata describe.
        metadata: of the weights.
        config: what `config.json` says; None without one.
        recipe: configuration of the run; empty without one.
    """
    kind = _kind(model, metadata)
    title = metadata.get("published") or metadata["model"]
    parts = [
        _front_matter(kind, metadata, recipe, config is not None),
        f"# {title}\n",
        _about(kind, model, metadata, config, recipe),
        _metrics(metadata),
        _classes(metadata.get("class_names") or []),
        _loading(kind, model, metadata, config),
        _licence(metadata),
    ]
    if recipe:
        parts.append(f"## Recipe\n\n```yaml\n{_yaml(_without_places(recipe))}```\n")
    return "\n".join(part for part in parts if part)


def _kind(model: nn.Module, metadata: Mapping[str, Any]) -> str:
    if head := next((head for head in _TASKS if head in metadata), None):
        return head
    if isinstance(model, MaskedAutoencoder):
        return "masked"
    return "classes" if getattr(model, "num_classes", 0) > 0 else "backbone"


def _front_matter(
    kind: str, metadata: Mapping[str, Any], recipe: Mapping[str, Any], by_timm: bool
) -> str:
    tag = _TASKS[kind].tag
    fields: dict[str, Any] = {
        "library_name": "timm" if by_timm else "fastvim",
        "pipeline_tag": tag,
        "tags": [tag, *(["timm"] if by_timm else []), "fastvim", "mamba", "state-space-model"],
    }
    if licence := metadata.get("licence"):
        known = re.fullmatch(r"[A-Za-z0-9.+-]+", licence)  # as SPDX names them
        fields |= {"license": licence.lower()} if known else {"license": "other"}
        fields |= {} if known else {"license_name": licence}
    entry = ENTRIES.get(metadata.get("published", ""))
    dataset = str(recipe.get("data", {}).get("init_args", {}).get("dataset") or "")
    if entry is not None and entry.data in _HUB_DATA:
        fields["datasets"] = [_HUB_DATA[entry.data]]
    elif dataset.startswith(("hfds/", "hfids/")):
        fields["datasets"] = [dataset.partition("/")[2]]
    return f"---\n{MARK}\n{_yaml(fields)}---\n"


def _about(
    kind: str,
    model: nn.Module,
    metadata: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    recipe: Mapping[str, Any],
) -> str:
    options = {**metadata.get("model_args", {}), **metadata.get(kind, {})}
    count = sum(weight.numel() for weight in model.parameters())
    facts = {
        "model": f"{_TASKS[kind].what} `{metadata['model']}`",
        "options": ", ".join(f"`{name}={value!r}`" for name, value in options.items()),
        "parameters": f"{count:,}",
        "weights": {"EMA": "averaged over the training"}.get(metadata.get("weights", ""), ""),
    }
    if config is not None:
        images = config["pretrained_cfg"]
        channels, height, width = images["input_size"]
        facts["images"] = f"{channels} channels, {height} x {width} pixels"
        facts["preparation"] = ", ".join(
            f"{name} {_short(images[name])}"
            for name in ("crop_pct", "interpolation", "mean", "std")
        )
    if data := recipe.get("data"):
        where = _without_places(data).get("init_args", {}).get("root", "")
        facts["data"] = f"`{where}`, read by `{data.get('class_path')}`"
    lines = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _metrics(metadata: Mapping[str, Any]) -> str:
    lines = list(metadata.get("metrics", ()))
    if number := metadata.get("number"):
        lines += [f"published {metric}: {value} %" for metric, value in number.items()]
    return "\n".join(["## Metrics\n", *(f"- {line}" for line in lines), ""]) if lines else ""


def _classes(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f"\n\nand {len(names) - SHOWN:,} more, in `{WEIGHTS}`" if len(names) > SHOWN else ""
    shown = "\n".join(json.dumps(name, ensure_ascii=False) for name in names[:SHOWN])
    return (
        f"## Classes\n\n{len(names):,}, in the order of the outputs:\n\n```\n{shown}\n```{more}\n"
    )


def _loading(
    kind: str,
    model: nn.Module,
    metadata: Mapping[str, Any],
    config: Mapping[str, Any] | None,
) -> str:
    parts = [f"## How to load it\n\nWith [fastvim]({HOME}):\n\n{_OURS}"]
    if _TASKS[kind].command:
        parts.append(f"or `fastvim {_TASKS[kind].command} --model {WEIGHTS} IMAGES`.\n")
    if config is not None:
        own = is_ours(config["architecture"])
        needed = "fastvim, " if own else ""
        parts += [_NEEDED] if own else []
        parts.append(f"With timm:\n\n{_TIMM.format(needed=needed)}")
        if kind == "classes" and not isinstance(model, FastChannelVim):
            parts.append(f"With transformers:\n\n{_PIPELINE.format(needed=needed)}")
            if "takes_rgb" in config["model_args"]:
                parts.append(_GREY)
            if metadata.get("value_range"):
                parts.append(_RANGE)
        elif isinstance(model, FastChannelVim):
            parts.append(_CHANNELS)
    return "\n".join(parts)


def _licence(metadata: Mapping[str, Any]) -> str:
    known = metadata.get("licence")
    text = known or "None is stated. Choose one before you publish these weights."
    source = metadata.get("started_from")
    if source and known:
        text = f"{known}, that of the weights that the training started from: `{source}`."
    elif known and (entry := ENTRIES.get(metadata.get("published", ""))):
        text = f"{known}. Published at {entry.url}"
    return f"## Licence\n\n{text}\n"


def _without_places(value: Any) -> Any:
    """A configuration without what is not set, and of files and folders their names alone."""
    if isinstance(value, Mapping):
        kept = {name: _without_places(part) for name, part in value.items()}
        return {name: part for name, part in kept.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_without_places(part) for part in value]
    if isinstance(value, bool | int | float | None):
        return value
    return PurePath(str(value)).name if PurePath(str(value)).is_absolute() else str(value)


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False)
    return text


def _short(value: Any) -> str:
    numbers = value if isinstance(value, list) else [value]
    return ", ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in numbers)


def _cell(text: str) -> str:
    """A text as a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())
