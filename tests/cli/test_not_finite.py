"""Weights and results that are not finite are no answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastvim.data.arrays import read_array
from fastvim.data.remote import UnreadableFileError
from fastvim.errors import NotFiniteError, UserError, require_finite
from fastvim.models import FeatureMaps, create_model
from fastvim.models.heads.cascade import build_detector
from fastvim.models.heads.upernet import UPerNet
from fastvim.weights import METADATA_KEY, save
from fastvim_cli import main

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


def network(command: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Weights of a small model for a command, and what a file tells of it."""
    torch.manual_seed(0)
    size = {"img_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    options: dict[str, object] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
    if command == "reconstruct":
        name = "mae_fastvim_tiny_patch16_224"
        options |= {"decoder_embed_dim": 12}
        state = create_model(name, **options).state_dict()
        return state, {"model": name, "model_args": options, **size}
    name, options = "fastvim_tiny_patch16_224", {**options, "norm": "layer"}
    told = {"model": name, "model_args": options, "class_names": ["a", "b"], **size}
    backbone = create_model(name, **options)
    if command == "segment":
        head = {"num_classes": 2, "out_indices": [0, 1], "source": "mixer", "channels": 12}
        head |= {"aux_channels": 8, "window": 32, "stride": 24}
        model = UPerNet(FeatureMaps(backbone, [0, 1]), num_classes=2, channels=12, aux_channels=8)
        return model.state_dict(), {**told, "segmentation": head, "base_size": [32, 32]}
    heads = {"hidden_dim": 16, "samples": 16, "score_thresh": 0.0, "detections": 5}
    head = {"num_classes": 2, "channels": 16, "pad_to": 0, "proposals": 50, "heads": heads}
    model = build_detector(backbone, **head)
    return model.state_dict(), {**told, "detection": head, "category_ids": [3, 7]}


@pytest.mark.parametrize(
    ("command", "weight"),
    [
        ("segment", "maps.norms.1.weight"),
        ("detect", "rpn.head.conv.1.0.weight"),
        ("detect", "heads.stages.2.box_head.2.1.bias"),
        ("reconstruct", "decoder_blocks.1.norm.weight"),
    ],
)
def test_commands_on_images(tmp_path, capsys, command, weight):
    """Weights that are NaN are named; results that overflow name the image and draw nothing."""
    Image.new("RGB", (32, 32), (200, 90, 10)).save(tmp_path / "a.png")
    state, told = network(command)
    words = [] if command != "reconstruct" else ["--checkpoint"]
    words += [tmp_path / "odd.safetensors", tmp_path / "a.png", "--out", tmp_path / "out"]
    metadata = {METADATA_KEY: json.dumps(told)}
    for value, message in (
        (float("nan"), f"values of {weight} are not finite"),
        (3e38, f"skipped {tmp_path / 'a.png'}: the model's result is not finite"),
    ):
        odd = {name: each.clone().contiguous() for name, each in state.items()}
        odd[weight].fill_(value)
        save_file(odd, tmp_path / "odd.safetensors", metadata=metadata)
        assert main([command, *map(str, words)]) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("out/*"))


def test_fit_and_then_test_of_a_spoilt_checkpoint(tmp_path, image_folder, capsys):
    args = {**ARGS, "depth": 2}
    model = {"model": "fastvim_tiny_patch16_224", "model_args": args, "lr": 1e-3, "lr_batch": 8}
    model |= {"warmup_epochs": 0, "mixup": 0.0, "cutmix": 0.0}
    data = {"root": str(image_folder), "img_size": 32, "num_workers": 0, "batch_size": 8}
    trainer = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(tmp_path / "run")}
    sections = {
        "model": {"class_path": "fastvim.tasks.Classification", "init_args": model},
        "data": {"class_path": "fastvim.data.images.ImageData", "init_args": data},
        "trainer": {**trainer, "limit_train_batches": 1, "enable_progress_bar": False},
    }
    recipe, odd = tmp_path / "recipe.yaml", tmp_path / "odd.ckpt"
    recipe.write_text(json.dumps(sections))
    assert main(["fit", "--config", str(recipe)]) == 0
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=False)
    content["state_dict"]["model.head.weight"][0, 0] = float("nan")
    torch.save(content, odd)
    capsys.readouterr()
    for command in ("test", "validate", "fit"):
        error = one_line(capsys, command, "--config", recipe, "--ckpt_path", odd)
        assert "values of model.head.weight are not finite" in error
