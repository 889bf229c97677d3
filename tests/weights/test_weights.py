"""Weights in files: published ones, the original Vim's, and ours. Broken: `test_bad_files.py`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import safetensors
import torch
from torch import Tensor, nn

from fastvim import UserError
from fastvim.errors import MachineError
from fastvim.models import create_model
from fastvim.weights import (
    convert,
    load_model,
    load_weights,
    read,
    save,
    to_published,
)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}
FASTVIM, VIM = "fastvim_tiny_patch16_224", "vim_tiny_patch16_224"
CHANNELS, CHANNEL_VIM = "fastchannelvim_small_patch16_224", "channelvim_small_patch16_224"
WITHOUT_TRACE = {"scan_path", "token_order"}
VARIANTS = {
    "fastvim": (FASTVIM, {}),
    "column": (FASTVIM, {"scan_path": "column"}),
    # The initial layer scale leaves no trace once it is learned: it reads as 1.
    "layer norm and scale": (FASTVIM, {"norm": "layer", "init_layer_scale": 1.0}),
    "vim": (VIM, {}),
    "original vim": (VIM, {"norm_after_ssm": False}),
    "channels": (CHANNELS, {"in_chans": 5}),
    "channels, spatial first": (CHANNELS, {"in_chans": 3, "token_order": "spatial_first"}),
    "channel vim": (CHANNEL_VIM, {"in_chans": 3}),
    "plain vim": (VIM, {"class_token": False, "global_pool": "avg", "d_state": 8, "expand": 3}),
}


def create(name: str = FASTVIM, seed: int = 0, **options) -> nn.Module:
    """A small model, no two of whose tensors are alike."""
    torch.manual_seed(seed)
    model = create_model(name, **{**SMALL, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def published(model: nn.Module) -> dict[str, Tensor]:
    """The weights as published: by their names, positions of the column variant transposed."""
    state = to_published(model.state_dict())
    if model.scan_path == "column":
        grid = state["pos_embed"].unflatten(1, model.grid_size)
        state["pos_embed"] = grid.transpose(1, 2).flatten(1, 2).contiguous()
    return state


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lightning(tmp_path_factory) -> tuple[Path, nn.Module, nn.Module]:
    """A published file with its raw and its averaged weights, and models that hold them."""
    raw, averaged = create(seed=1), create(seed=2)
    content = {
        "epoch": 299,
        "global_step": 375_300,
        "pytorch-lightning_version": "2.0.2",
        "state_dict": {
            **prefixed(published(raw), "backbone."),
            **prefixed(published(averaged), "ema.module."),
        },
        "state_dict_ema": prefixed(published(averaged), "backbone."),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
    }
    path = tmp_path_factory.mktemp("published") / "fastvim.ckpt"
    torch.save(content, path)
    return path, raw, averaged


# Reading.


@pytest.mark.parametrize(("ema", "weights"), [(True, "EMA"), (False, "raw")])
@pytest.mark.parametrize("where", ["beside the others", "among the others", "in both places"])
def test_averaged_or_raw_weights(lightning, tmp_path, ema, weights, where):
    path, raw, averaged = lightning
    content = torch.load(path, weights_only=True)
    if where == "among the others":
        del content["state_dict_ema"]
    elif where == "beside the others":
        plain = content["state_dict"].items()
        content["state_dict"] = {k: v for k, v in plain if not k.startswith("ema.")}
    path = tmp_path / "published.ckpt"
    torch.save(content, path)
    checkpoint = read(path, ema=ema)
    assert checkpoint.weights == weights
    assert_equal(checkpoint.state, published(averaged if ema else raw))
    model = create(seed=3)
    assert load_weights(model, path, ema=ema).weights == weights
    assert_equal(model.state_dict(), (averaged if ema else raw).state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"state_dict": prefixed(state, "backbone.")},
        lambda state: {"state_dict": prefixed(state, "module.backbone.")},
        lambda state: {"state_dict": prefixed(state, "backbone._orig_mod.")},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"model": prefixed(state, "module."), "args": argparse.Namespace(lr=0.1)},
    ],
)
@pytest.mark.parametrize("names", [published, nn.Module.state_dict])
def test_wrappings_and_prefixes(tmp_path, wrap, names):
    source = create(seed=1)
    torch.save(wrap(names(source)), tmp_path / "weights.pth")
    model = create(seed=2)
    checkpoint = load_weights(model, tmp_path / "weights.pth")
    assert checkpoint.weights == "only"
    assert_equal(model.state_dict(), source.state_dict())


def test_the_original_vim_release(tmp_path, image, caplog):
    """Weights, averaged ones and arguments in one file; no norm after the scan.

    The published number is of the weights that are not averaged.
    """
    raw, averaged = (create(VIM, seed, norm_after_ssm=False) for seed in (1, 2))
    content = {
        "model": published(raw),
        "model_ema": published(averaged),
        "epoch": 300,
        "args": argparse.Namespace(model="vim_tiny", lr=1e-3, output_dir="out", device="cuda"),
    }
    torch.save(content, tmp_path / "vim.pth")
    assert_equal(read(tmp_path / "vim.pth", ema=False).state, published(raw))
    model, metadata = load_model(path=tmp_path / "vim.pth", img_size=32)
    assert metadata["weights"] == "raw"
    assert "ema=True" in caplog.text
    with torch.no_grad():
        assert torch.equal(model.eval()(image), raw(image))
    model, metadata = load_model(path=tmp_path / "vim.pth", img_size=32, ema=True)
    assert metadata["weights"] == "EMA"
    assert metadata["model"].startswith("vim_")
    assert metadata["model_args"]["norm_after_ssm"] is False
    with torch.no_grad():
        assert torch.equal(model.eval()(image), averaged(image))


def test_a_checkpoint_of_our_training(tmp_path):
    """`state_dict` holds the averaged weights, `current_model_state` those of the optimiser."""
    raw, averaged = create(seed=1), create(seed=2)
    content = {
        "averaging_state": {"n_averaged": torch.tensor(3)},
        "state_dict": prefixed(averaged.state_dict(), "model."),
        "current_model_state": prefixed(raw.state_dict(), "model."),
        "fastvim": {"model": FASTVIM, "model_args": SMALL, "class_names": ["a", "b"]},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert_equal(read(tmp_path / "last.ckpt", ema=False).state, raw.state_dict())
    model, metadata = load_model(path=tmp_path / "last.ckpt")
    assert_equal(model.state_dict(), averaged.state_dict())
    assert metadata["class_names"] == ["a", "b"]


# Conversion.


def test_published_names_and_shapes():
    """Names and shapes as in the published files (FastVim release v0)."""
    model = create(VIM, init_layer_scale=0.1, norm="layer", norm_after_ssm=True)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in to_published(model.state_dict()).items()
    }
    mixer = {
        "in_proj.weight": (64, 16),
        **{f"conv1d{d}.weight": (32, 1, 4) for d in ("", "_b")},
        **{f"conv1d{d}.bias": (32,) for d in ("", "_b")},
        **{f"x_proj{d}.weight": (33, 32) for d in ("", "_b")},
        **{f"dt_proj{d}.weight": (32, 1) for d in ("", "_b")},
        **{f"dt_proj{d}.bias": (32,) for d in ("", "_b")},
        **dict.fromkeys(("A_log", "A_b_log"), (32, 16)),
        **dict.fromkeys(("D", "D_b", "layernorm.weight", "layernorm.bias"), (32,)),
        "out_proj.weight": (16, 32),
        "gamma": (16,),
    }
    blocks = {f"mixer.{n}": s for n, s in mixer.items()}
    blocks |= {"norm.weight": (16,), "norm.bias": (16,)}
    assert shapes == {
        "patch_embed.proj.weight": (16, 3, 8, 8),
        "patch_embed.proj.bias": (16,),
        "pos_embed": (1, 17, 16),
        "cls_token": (1, 1, 16),
        **{f"layers.{i}.{n}": s for i in range(2) for n, s in blocks.items()},
        "norm_f.weight": (16,),
        "norm_f.bias": (16,),
        "head.weight": (5, 16),
        "head.bias": (5,),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, tmp_path, image):
    """ours → published → ours and published → ours → published are the identity, bit for bit."""
    name, options = VARIANTS[variant]
    source = create(name, **options)
    hidden = {"pooling": "none"} if name == VIM else {}
    hidden |= {option: options[option] for option in WITHOUT_TRACE if option in options}
    paths = [tmp_path / n for n in ("a.pth", "b.safetensors", "c.ckpt", "d.safetensors")]
    torch.save(published(source), paths[0])
    metadata = convert(paths[0], paths[1], model_args={**hidden, "img_size": 32})
    assert metadata["weights"] == "only"
    assert metadata["model"] == name
    assert {**metadata["model_args"], **SMALL, **options} == metadata["model_args"]
    assert_equal(read(paths[1]).state, source.state_dict())
    convert(paths[1], paths[2])
    assert_equal(read(paths[2]).state, published(source))
    convert(paths[2], paths[3], model_args={**hidden, "img_size": 32})
    assert_equal(read(paths[3]).state, source.state_dict())
    model, _ = load_model(path=paths[1])
    with torch.no_grad():
        assert torch.equal(model.eval()(image), source(image))


def test_conversion_says_which_weights_it_took(lightning, tmp_path):
    path, raw, averaged = lightning
    for ema, weights, model in ((True, "EMA", averaged), (False, "raw", raw)):
        target = tmp_path / f"{weights}.safetensors"
        assert convert(path, target, ema=ema, model=VIM)["weights"] == weights
        checkpoint = read(target)
        assert checkpoint.weights == checkpoint.metadata["weights"] == weights
        assert checkpoint.metadata["model"] == VIM  # as the caller said
        assert_equal(checkpoint.state, model.state_dict())


def test_conversion_makes_the_folder(lightning, tmp_path):
    path, _, averaged = lightning
    convert(path, tmp_path / "new" / "ours.safetensors")
    convert(path, tmp_path / "newer" / "theirs.ckpt")
    assert_equal(read(tmp_path / "newer" / "theirs.ckpt").state, published(averaged))


def test_conversion_needs_a_known_suffix(lightning, tmp_path):
    with pytest.raises(UserError, match=r"out\.onnx.*\.safetensors.*\.ckpt"):
        convert(lightning[0], tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("img_size", [[32, 32], [16, 32], [16, 64]])
def test_our_file_may_hold_both_sides_of_its_image(tmp_path, img_size):
    source = create(scan_path="column", img_size=img_size)
    args = {**SMALL, "img_size": img_size, "scan_path": "column"}
    save(tmp_path / "a.safetensors", source.state_dict(), {"model": FASTVIM, "model_args": args})
    convert(tmp_path / "a.safetensors", tmp_path / "b.ckpt")
    assert_equal(read(tmp_path / "b.ckpt").state, published(source))
    model = create(seed=1, scan_path="column", img_size=img_size)
    load_weights(model, tmp_path / "b.ckpt")
    assert_equal(model.state_dict(), source.state_dict())


def test_the_caller_knows_better_than_the_file(tmp_path):
    metadata = {"model": FASTVIM, "model_args": {**SMALL, "pool_scale": 1.0}, "mean": [0.5]}
    save(tmp_path / "a.safetensors", create().state_dict(), metadata)
    args = {"pool_scale": 0.25, "alternate": False}
    found = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", model_args=args)
    assert found["model_args"] == {**SMALL, **args}
    assert read(tmp_path / "b.safetensors").metadata == {**found, "mean": [0.5]}
    model, _ = load_model(path=tmp_path / "b.safetensors", pool_scale=0.5)
    assert model.blocks[0].mixer.pool_scale == 0.5
    assert len(model.traversals) == 1


def test_half_precision_survives(tmp_path):
    source = create().to(torch.bfloat16)
    torch.save(published(source), tmp_path / "half.pth")
    model = create().to(torch.bfloat16)
    load_weights(model, tmp_path / "half.pth")
    assert_equal(model.state_dict(), source.state_dict())


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    """In `--checkpoint=~/x` the shell leaves it as it is, and so does a recipe."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model = create()
    save(tmp_path / "weights.safetensors", model.state_dict(), {})
    assert_equal(read("~/weights.safetensors").state, model.state_dict())


def test_saved_weights_are_for_all_who_may_read(tmp_path):
    """And what is synchronised with the disk is the file that becomes theirs."""
    path = tmp_path / "ours.safetensors"
    (tmp_path / "other").touch()
    save(path, {"a": torch.ones(2)}, {})
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "ours.safetensors"
    save(path, {"a": torch.ones(2, 3).T}, {"weights": "EMA", "class_names": ["é"]})
    before = path.read_bytes()

    def fail(descriptor):
        assert os.fstat(descriptor).st_size > 0  # the file is written, but not on the disk
        raise OSError("disk full")

    monkeypatch.setattr("fastvim.storage.os.fsync", fail)
    with pytest.raises(MachineError, match="disk full"):
        save(path, {"a": torch.zeros(3)}, {})
    assert path.read_bytes() == before
    checkpoint = read(path)
    assert torch.equal(checkpoint.state["a"], torch.ones(3, 2))
    assert checkpoint.metadata == {"weights": "EMA", "class_names": ["é"]}
    with safetensors.safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["fastvim"])["weights"] == "EMA"
