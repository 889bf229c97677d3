"""Small files in the layouts of the published ones, and the table's entries in small.

Run as a program it is the command line over the small entries: an address of a server of these
files, then the words of a command.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from fastvim.weights import convert, save
from fastvim.weights.build import build_model
from fastvim.weights.table import ENTRIES, Entry
from fastvim_cli import main

GOLDEN = Path(__file__).parent / "golden" / "whole"
PUBLISHED = dict(ENTRIES)  # as released
SCENES = ["wall", "sky", "tree", "road", "door"]
OBJECTS = ["cat", "cup", "key"]
_WIDTH = {"embed_dim": 16, "depth": 2}


def small(entry: Entry, address: str) -> Entry:
    """The entry with another address and other sizes; the hub's addresses stay."""
    sizes: dict[str, Any] = {**_WIDTH, "num_classes": 5}
    head = dict(entry.head)
    if "segmentation" in head:
        sizes = {**_WIDTH, "depth": 24}
        head["segmentation"] = {
            **head["segmentation"],
            "num_classes": 5,
            "channels": 12,
            "aux_channels": 8,
        }
    elif "detection" in head:
        sizes = _WIDTH
        heads = {**head["detection"]["heads"], "hidden_dim": 16}
        head["detection"] = {**head["detection"], "num_classes": 3, "channels": 8, "heads": heads}
    elif entry.backbone.startswith("mae_"):
        sizes = {**_WIDTH, "decoder_embed_dim": 16, "decoder_depth": 1}
    url = entry.url.replace("https://github.com", address)
    options = {**entry.model_args, **sizes}
    return replace(entry, url=url, model_args=options, head=head, sha256=None)


def path_of(entry: Entry) -> str:
    """Where a server has the file."""
    return urlsplit(entry.url).path


def weights(entry: Entry, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a small entry under our names, each moved away from its initial value."""
    torch.manual_seed(seed)
    model = build_model(_metadata(entry))
    state = {
        name: value + 0.01 * torch.rand_like(value) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    for name in state:
        if ".bbox_pred." in name:  # the background's, which no published file has
            state[name][:4] = 0
        if ".mask_fcn_logits." in name:
            state[name][:1] = 0
    return state


def write(entry: Entry) -> bytes:
    """The published file of a small entry. Its other copy is of the seed 1, or half of it."""
    state, other = (_published(entry, weights(entry, seed)) for seed in (0, 1))
    with _mmengine():
        if entry.url.startswith("https://huggingface.co"):
            return _bytes(_original_vim(state, other))
        if entry.averaged:
            return _bytes(_with_averages(state, other))
        if is_bare(entry):
            return _bytes(state["state_dict"])
        if "detection" in entry.head and entry.backbone.startswith("fastvim_small"):
            return _bytes(state, _use_new_zipfile_serialization=False)  # as its publishing tool
        content = _golden(entry)
        if "meta" in content:
            state["meta"] = {**content["meta"], **state["meta"]}
        return _bytes({**content, **state})


def published_state(entry: Entry, seed: int = 0) -> dict[str, Tensor]:
    """`weights` under published names."""
    state = _published(entry, weights(entry, seed))["state_dict"]
    return {name.removeprefix("backbone."): tensor for name, tensor in state.items()}


def is_bare(entry: Entry) -> bool:
    """Whether the file is a state dict alone, which tells no names of classes."""
    return "segmentation" in entry.head and "base" in entry.backbone


def _metadata(entry: Entry) -> dict[str, Any]:
    known: dict[str, Any] = {"segmentation": SCENES, "detection": OBJECTS}
    names = {"class_names": known[next(iter(entry.head))]} if entry.head else {}
    options = {"model": entry.backbone, "model_args": dict(entry.model_args)}
    return {**options, **entry.head, **entry.images, **names}


def _published(entry: Entry, state: dict[str, Tensor]) -> dict[str, Any]:
    """What converting back writes: published names, and what the file tells of its model."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.safetensors", Path(folder) / "theirs.pth"
        save(ours, state, _metadata(entry))
        convert(ours, theirs)
        content: dict[str, Any] = torch.load(theirs, weights_only=True)
    return content


def _golden(entry: Entry) -> dict[str, Any]:
    """What a published training script leaves beside the weights."""
    kinds = {"segmentation": "segmentor.pth", "detection": "detector.pth"}
    names = [kinds[head] for head in entry.head]
    if entry.backbone.startswith("mae_"):
        names.append("mae.ckpt")
    elif entry.data == "jumpcp":
        names.append("channels.ckpt")
    elif not names:
        names.append("classifier.ckpt" if entry.averaged else "finetuned.ckpt")
    content: dict[str, Any] = torch.load(GOLDEN / names[0], weights_only=False)
    return content


def _with_averages(state: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Averaged weights lie inside the raw ones' state dict, and once more beside it."""
    averaged = {n.removeprefix("backbone."): t for n, t in state["state_dict"].items()}
    inside = {f"ema.module.{name}": tensor for name, tensor in averaged.items()}
    content = torch.load(GOLDEN / "classifier.ckpt", weights_only=False)
    weights = {"state_dict": {**other["state_dict"], **inside}, "state_dict_ema": averaged}
    return {**content, **weights}


def _original_vim(state: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    raw, averaged = (
        {n.removeprefix("backbone."): t for n, t in each["state_dict"].items()}
        for each in (state, other)
    )
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in raw.values()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "model": raw,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [5e-4], "metric": None, "t_in_epochs": True},
        "epoch": 299,
        "model_ema": averaged,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "args": argparse.Namespace(batch_size=128, model="vim", lr=5e-4, distributed=True),
    }


def _bytes(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


@contextmanager
def _mmengine() -> Iterator[None]:
    """mmengine's record of losses, as its pickles need it; with it they hold a real `getattr`."""

    class HistoryBuffer:
        def mean(self) -> None: ...

        min = max = current = mean

    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    modules = {name: types.ModuleType(name) for name in names}
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = names[-1], "HistoryBuffer"
    for name in ("mean", "min", "max", "current"):
        method = types.FunctionType(HistoryBuffer.mean.__code__, {}, name)
        method.__module__, method.__qualname__ = names[-1], f"HistoryBuffer.{name}"
        setattr(HistoryBuffer, name, method)
    modules[names[-1]].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    sys.modules |= modules
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


if __name__ == "__main__":
    for entry in PUBLISHED.values():
        ENTRIES[entry.name] = small(entry, sys.argv[1])
    sys.exit(main(sys.argv[2:]))
