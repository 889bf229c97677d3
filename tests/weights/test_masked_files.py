"""Files of masked autoencoders: conversion, options found, and the encoder into a classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastvim import UserError
from fastvim.models import MaskedAutoencoder, create_model
from fastvim.weights import (
    Checkpoint,
    convert,
    find_options,
    load_model,
    load_weights,
    read,
    resolve,
    save,
    to_published,
)

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "decoder_embed_dim": 12,
    "decoder_depth": 3,
}
NAMES = ("mae_fastvim_tiny_patch16_224", "mae_vim_tiny_patch16_224")

every_model = pytest.mark.parametrize("name", NAMES)


def create(name: str, seed: int = 0, **options) -> nn.Module:
    """A small model, no two of whose trained tensors are alike."""
    torch.manual_seed(seed)
    model = create_model(name, **{**SMALL, **options}).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def classifier_of(name: str, **options) -> nn.Module:
    sizes = {key: SMALL[key] for key in ("img_size", "patch_size", "embed_dim", "depth")}
    return create_model(name.removeprefix("mae_"), **{**sizes, "num_classes": 5, **options}).eval()


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@every_model
def test_round_trip(name, tmp_path):
    source = create(name)
    paths = [tmp_path / n for n in ("a.ckpt", "b.safetensors", "c.ckpt")]
    published = to_published(source.state_dict())
    torch.save({"state_dict": {f"backbone.{n}": t for n, t in published.items()}}, paths[0])
    metadata = convert(paths[0], paths[1], model_args={"mirror": "exact"})
    assert metadata["model"] == name
    assert {**metadata["model_args"], **SMALL, "mirror": "exact"} == metadata["model_args"]
    assert_equal(read(paths[1]).state, source.state_dict())
    convert(paths[1], paths[2])
    assert_equal(read(paths[2]).state, published)
    for path in paths:
        model, _ = load_model(path=path)
        assert isinstance(model, MaskedAutoencoder)
        assert_equal(model.state_dict(), source.state_dict())


@every_model
@pytest.mark.parametrize("names", ["ours", "published"])
def test_the_encoder_of_a_file_goes_into_a_classifier(name, names, tmp_path):
    source = create(name)
    if names == "ours":
        path = tmp_path / "mae.safetensors"
        save(path, source.state_dict(), {"model": name, "model_args": SMALL})
    else:
        path = tmp_path / "mae.ckpt"
        torch.save({"state_dict": to_published(source.state_dict())}, path)
    model = classifier_of(name, pool_scale=0.25)
    head = {n: t.clone() for n, t in model.state_dict().items() if "head" in n}
    load_weights(model, path, new_head=True)
    assert_equal(model.state_dict(), {**source.encoder_state_dict(), **head})
    with pytest.raises(UserError, match=r"missing head\.weight, head\.bias"):
        load_weights(model, path)
    large = classifier_of(name, img_size=48)
    load_weights(large, path, new_head=True)
    assert large(torch.randn(1, 3, 48, 48)).shape == (1, 5)
    # A classifier's file does not make a masked autoencoder.
    save(tmp_path / "plain.safetensors", model.state_dict(), {})
    with pytest.raises(UserError, match="missing mask_token"):
        load_weights(create(name), tmp_path / "plain.safetensors")


@every_model
def test_a_golden_file_is_understood(name, tmp_path):
    golden = Path(__file__).parents[1] / "golden" / f"mae_{name.split('_')[1]}.npz"
    arrays = {k: torch.from_numpy(v) for k, v in np.load(golden).items() if k != "cfg"}
    torch.save({k[6:]: v for k, v in arrays.items() if k.startswith("state/")}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    model, metadata = load_model(path=tmp_path / "b.safetensors")
    assert metadata["model"] == name
    with torch.no_grad():
        output = model.eval()(arrays["in/image"], arrays["in/noise"])
    torch.testing.assert_close(output.prediction, arrays["out/pred"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["mae_fastvim_base_patch16_224", "mae_fastvim_huge_patch14_224", "mae_vim_large_patch16_224"],
)
def test_real_sizes_find_their_names(name):
    with torch.device("meta"):
        state = create_model(name).state_dict()
    _, metadata = resolve(Checkpoint(Path("weights.pth"), state, "only"))
    assert metadata["model"] == name
    assert metadata["model_args"]["img_size"] == 224
    assert metadata["model_args"]["decoder_embed_dim"] == 512


def test_patches_of_a_masked_autoencoder_do_not_overlap():
    # As many positions as strides of 8 make of 224 pixels: a classifier's patches would overlap.
    state = create(NAMES[1], patch_size=16, img_size=27 * 16).state_dict()
    assert find_options(state)["img_size"] == 27 * 16
    assert "patch_stride" not in find_options(state)
    with pytest.raises(UserError, match=r"img_size=224.*16 pixels"):
        find_options(state, 224)


def test_options_of_another_model(tmp_path):
    torch.save(to_published(create(NAMES[0]).state_dict()), tmp_path / "mae.pth")
    with pytest.raises(UserError, match="no option 'scan_path'"):
        convert(tmp_path / "mae.pth", tmp_path / "a.ckpt", model_args={"scan_path": "column"})
    assert not (tmp_path / "a.ckpt").exists()
    state = create(NAMES[0]).state_dict()
    for missing, message in (
        ("decoder_embed.weight", "masked autoencoder: decoder_embed.weight missing"),
        ("encoder.pos_embed", "pos_embed missing"),
    ):
        with pytest.raises(UserError, match=message):
            find_options({n: t for n, t in state.items() if n != missing})
