"""Entries of the table in small sizes, and files of random weights in their published layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastvim.weights import convert, save
from fastvim.weights.build import build_model
from fastvim.weights.table import ENTRIES, Entry

SMALL = {"img_size": 32, "embed_dim": 16, "depth": 2}


def use_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder; published files are those in `weights` there."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("FASTVIM_WEIGHTS", str(root / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(root / "cache"))


def publish(
    monkeypatch: pytest.MonkeyPatch, name: str, model_args: dict[str, Any], **changes: Any
) -> nn.Module:
    """Give an entry other sizes and write its file, of random weights, into `weights`.

    Args:
        name: of the entry.
        model_args: options of the backbone, over those of the entry.
        **changes: other attributes of the entry.

    Returns:
        The model, in evaluation mode.
    """
    entry = ENTRIES[name]
    entry = replace(entry, model_args={**entry.model_args, **model_args}, **changes)
    monkeypatch.setitem(ENTRIES, name, entry)
    torch.manual_seed(0)
    model = build_model(metadata_of(entry)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)  # no initial value hides a mistake
    write(entry, model)
    return model


def write(entry: Entry, model: nn.Module) -> None:
    """Write a model's weights as the published file of an entry."""
    save(Path("ours.safetensors"), model.state_dict(), metadata_of(entry))
    convert("ours.safetensors", Path("weights", entry.file))


def metadata_of(entry: Entry) -> dict[str, Any]:
    return {"model": entry.backbone, "model_args": dict(entry.model_args), **entry.head}
