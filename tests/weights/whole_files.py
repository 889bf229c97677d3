"""The golden files of whole published models, and leaner or other forms of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvim.weights.unpickle import read_pickled

WHOLE = Path(__file__).parents[1] / "golden" / "whole"
FILES = (
    "segmentor.pth",
    "detector.pth",
    "classifier.ckpt",
    "channels.ckpt",
    "mae.ckpt",
    "finetuned.ckpt",
)


def arrays(name: str) -> dict[str, Tensor]:
    """The arrays of a golden file, e.g. of "segmentor"."""
    with np.load(WHOLE / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "cfg"}


def content(name: str) -> dict[str, Any]:
    """What a published file holds, but for what training leaves beside its weights."""
    found = read_pickled(WHOLE / name)
    return {key: found[key] for key in ("meta", "state_dict") if key in found}


def rewritten(name: str, path: Path, change: Any, *, zipped: bool = True) -> Path:
    """A published file with `change` applied to what it holds, saved elsewhere."""
    torch.save(change(content(name)), path, _use_new_zipfile_serialization=zipped)
    return path


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
