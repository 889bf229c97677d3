"""Weights and results that are not finite are no answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvim.data.arrays import read_array
from fastvim.data.remote import UnreadableFileError
from fastvim.errors import UserError
from fastvim.models import create_model
from fastvim.weights import METADATA_KEY, save
from fastvim_cli import main
from fastvim_cli.images import NotFiniteError, require_finite

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}


def weights_with(value: float, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A classifier's checkpoint with one odd weight."""
    name, options = "fastvim_tiny_patch16_224", {**ARGS, "num_classes": 2}
    state = create_model(name, **options).state_dict()
    state["head.weight"] = state["head.weight"].to(dtype)
    state["head.weight"][0, 0] = value
    told = {"model": name, "model_args": options, "class_names": ["a", "b"], "img_size": 32}
    told |= {"mean": [0.5], "std": [0.5], "crop_pct": 1.0, "interpolation": "bicubic"}
    state = {f"model.{key}": weight for key, weight in state.items()}
    torch.save({"state_dict": state, METADATA_KEY: told}, folder / "odd.ckpt")
    return folder / "odd.ckpt"


def one_line(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), torch.float32), (float("inf"), torch.float16), (1e300, torch.float64)],
)
def test_predict_and_convert(tmp_path, capsys, value, dtype):
    checkpoint = weights_with(value, tmp_path, dtype)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    error = one_line(capsys, "predict", "--checkpoint", checkpoint, tmp_path / "a.png")
    assert "1 of 32 values of head.weight are not finite" in error
    if dtype != torch.float64:
        error = one_line(capsys, "convert", checkpoint, tmp_path / "out.safetensors")
        assert "head.weight are not finite" in error
        assert not list(tmp_path.glob("out*"))


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    with pytest.raises(UserError, match=r"a\.safetensors: 1 of 2 values of w are not finite"):
        save(tmp_path / "a.safetensors", {"w": torch.tensor([1.0, float("inf")])}, {})
    assert not list(tmp_path.iterdir())


def test_large_stored_values(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 4, 4), 1e300))
    with pytest.raises(UnreadableFileError, match=r"a\.npy: .*not finite in float32"):
        read_array(str(tmp_path / "a.npy"))


def test_results():
    require_finite(torch.zeros(3))
    with pytest.raises(NotFiniteError, match="not finite"):
        require_finite(torch.tensor([0.0, float("nan")]))
