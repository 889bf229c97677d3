"""Published classifiers, channel models and autoencoders, as their training scripts wrote them."""

from __future__ import annotations

import argparse
import shutil

import pytest
import torch
from torch import Tensor
from whole_files import WHOLE, arrays, close

from fastvim.models import create_model
from fastvim.weights import convert, load_model


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def logits_of(path, name: str, **options) -> Tensor:
    model, _ = load_model(path=path, **options)
    return model.eval()(arrays(name)["tensor"])


@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        ("classifier.ckpt", {}, "logits_ema"),
        ("classifier.ckpt", {"ema": True}, "logits_ema"),
        ("classifier.ckpt", {"ema": False}, "logits_raw"),
        ("channels.ckpt", {}, "logits_raw"),
        ("finetuned.ckpt", {"pool_scale": 0.25}, "logits_raw"),
    ],
)
def test_logits(file, options, expected, tmp_path):
    name = file.partition(".")[0]
    close(logits_of(WHOLE / file, name, **options), arrays(name)[expected], 1e-5)
    ema, model_args = options.pop("ema", None), options
    convert(WHOLE / file, tmp_path / "ours.safetensors", ema=ema, model_args=model_args)
    close(logits_of(tmp_path / "ours.safetensors", name), arrays(name)[expected], 1e-5)


@pytest.mark.parametrize("converted", [False, True])
def test_a_masked_autoencoder(converted, tmp_path):
    golden, path = arrays("mae"), WHOLE / "mae.ckpt"
    if converted:
        path = tmp_path / "ours.safetensors"
        convert(WHOLE / "mae.ckpt", path)
    model, _ = load_model(path=path)
    found = model.eval()(golden["tensor"], noise=golden["noise"])
    close(found.loss, golden["loss"][0], 1e-5)
    close(found.prediction, golden["pred"])
    assert torch.equal(found.mask, golden["mask"])


def test_what_no_file_tells_is_assumed_and_said(caplog):
    load_model(path=WHOLE / "finetuned.ckpt")
    (record,) = caplog.records
    for words in ("finetuned.ckpt", "a FastVim", "pool_scale=1.0", "'mean'", "--model-arg"):
        assert words in record.message
    caplog.clear()
    load_model(path=WHOLE / "finetuned.ckpt", pool_scale=0.25)
    assert "pool_scale" not in caplog.text
    caplog.clear()
    load_model(path=WHOLE / "classifier.ckpt")
    assert "the averaged weights are taken (--raw or ema=False" in caplog.text


def test_the_published_name_of_a_file_tells_its_options(tmp_path, caplog):
    path = tmp_path / "finetune_FastVim_base.ckpt"
    shutil.copy(WHOLE / "finetuned.ckpt", path)
    close(logits_of(path, "finetuned"), arrays("finetuned")["logits_raw"], 1e-5)
    (record,) = caplog.records
    assert "fastvim_base_patch16_224.mae_in1k_ft_in1k: pool_scale=0.25" in record.message
    _, metadata = load_model(path=path)
    assert metadata["published"] == "fastvim_base_patch16_224.mae_in1k_ft_in1k"
    assert metadata["licence"] == "CC-BY-NC-SA-4.0"


def test_pooling_by_the_published_name(tmp_path):
    path = tmp_path / "FastChannelVim_small_maxpool.ckpt"
    shutil.copy(WHOLE / "channels.ckpt", path)
    found = logits_of(path, "channels")
    assert torch.equal(found, logits_of(WHOLE / "channels.ckpt", "channels", pooling="max"))
    assert not torch.allclose(found, arrays("channels")["logits_raw"], atol=1e-3)


@pytest.mark.parametrize("name", ["FastVim_small.ckpt", "FastMaskVim_base.ckpt"])
def test_another_models_name_tells_nothing(name, tmp_path, caplog):
    shutil.copy(WHOLE / "channels.ckpt", tmp_path / name)
    close(logits_of(tmp_path / name, "channels"), arrays("channels")["logits_raw"], 1e-5)
    assert "but is not its file: it is" in caplog.text


def test_the_size_of_the_original_vims_images(tmp_path):
    """Its arguments tell it, where the position embedding cannot: patches that overlap."""
    options = {"img_size": 40, "patch_size": 16, "patch_stride": 8, "embed_dim": 16, "depth": 1}
    source = create_model("vim_tiny_patch16_224", num_classes=3, **options)
    torch.save(
        {"model": source.state_dict(), "args": argparse.Namespace(input_size=40, lr=1e-3)},
        tmp_path / "vim.pth",
    )
    model, metadata = load_model(path=tmp_path / "vim.pth")
    assert metadata["model_args"]["img_size"] == 40
    image = torch.randn(1, 3, 40, 40)
    assert torch.equal(model.eval()(image), source.eval()(image))
