"""Arguments out of range of the commands that argparse reads: one line each, before any work."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from fastvim.models import create_model
from fastvim.weights import save
from fastvim_cli import main

MAE = "mae_fastvim_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "decoder_embed_dim": 12}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("reconstruct a.png --seed -1", "--seed: -1: expected 0 to 4294967295"),
        (f"reconstruct a.png --seed {10**30}", f"--seed: {10**30}: expected 0 to 4294967295"),
        ("reconstruct a.png --mask-ratio half", "--mask-ratio: half: expected at least 0, below 1"),
        (f"reconstruct a.png --size {10**9}", f"--size: {10**9}: expected 1 to 65536"),
        ("segment a.png --scales 1e9", "--scales: 1e9: expected factors above 0, at most 100"),
        ("segment a.png --scales nan", "--scales: nan: expected factors above 0, at most 100"),
        (f"segment a.png --window {10**9}", f"--window: {10**9}: expected 1 to 65536"),
        (f"detect a.png --img-size {10**9}", f"--img-size: {10**9}: expected 1 to 65536"),
        ("convert a.ckpt b.safetensors --img-size -5", "--img-size: -5: expected 1 or more"),
        ("convert a.ckpt b.safetensors --pool-scale nan", "--pool-scale: nan: expected a number"),
        ("convert a.ckpt b.safetensors --pool-scale 0", "--pool-scale: 0: expected a number above"),
    ],
)
def test_out_of_range(capsys, words, message):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_device_that_computes_nothing_and_no_word_about_a_sound_image(tmp_path, capsys):
    weights, photo = tmp_path / "mae.safetensors", tmp_path / "a.png"
    torch.manual_seed(0)
    told = {"model": MAE, "model_args": ARGS, "img_size": 32, "crop_pct": 1.0}
    save(weights, create_model(MAE, **ARGS).state_dict(), told)
    Image.new("RGB", (32, 32), (10, 200, 90)).save(photo)
    words = ["reconstruct", "--checkpoint", str(weights), str(photo), "--out", str(tmp_path)]
    assert main([*words, "--device", "meta"]) == 2
    assert "--device meta: computes nothing" in capsys.readouterr().err
    assert main(words) == 0
    assert capsys.readouterr().err == ""
