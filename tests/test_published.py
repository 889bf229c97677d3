"""Outputs and gradients of the published models, reproduced from their inputs and weights.

`--golden DIR` takes any folder of such files; `tests/golden` holds a few. `--device cuda` computes
them with the engines of a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvim.models import FastChannelVim, FastVim, FeatureMaps, MaskedAutoencoder
from fastvim.weights import from_published, to_published


def build(cfg: dict) -> torch.nn.Module:
    """The model that a golden configuration describes."""
    if cfg["model"] == "mae":
        vim = cfg["encoder"] == "vim"
        return MaskedAutoencoder(
            img_size=tuple(cfg["img_size"]),
            pooling="none" if vim else "mean",
            class_token=vim,
            **{k: v for k, v in cfg.items() if k not in ("model", "encoder", "img_size")},
        )
    if cfg["model"].startswith("channel"):
        vim = cfg["model"] == "channel_vim"
        return FastChannelVim(
            img_size=tuple(cfg["img_size"]),
            patch_size=cfg["patch_size"],
            in_chans=cfg["channels"],
            token_order=cfg["token_order"],
            pooling="none" if vim else cfg.get("pooling", "mean"),
            class_token=vim,
            global_pool="token" if vim else "avg",
            **{name: cfg[name] for name in ("num_classes", "embed_dim", "depth", "norm")},
        )
    vim = cfg["model"] == "vim"
    with_class = cfg.get("cls_token") is not None
    backbone = FastVim(
        img_size=tuple(cfg["img_size"]),
        patch_size=cfg["patch_size"],
        patch_stride=cfg.get("patch_stride"),
        num_classes=cfg["num_classes"],
        embed_dim=cfg["embed_dim"],
        depth=cfg["depth"],
        pooling="none" if vim else cfg.get("pooling", "mean"),
        scan_path=cfg.get("scan_path", "row"),
        alternate=cfg.get("alternate", True),
        class_token=with_class,
        global_pool="token" if with_class else cfg.get("global_pool", "avg"),
        norm=cfg["norm"],
        norm_after_ssm=cfg.get("norm_after_ssm", True),
        init_layer_scale=cfg.get("init_layer_scale"),
        pool_scale=cfg.get("pool_scale", 1.0),
    )
    return FeatureMaps(backbone, cfg["out_indices"]) if "out_indices" in cfg else backbone


@pytest.fixture
def case(golden_file: Path, request):
    """Configuration, arrays, and the model with the published weights in it."""
    arrays = dict(np.load(golden_file))
    cfg = json.loads(str(arrays["cfg"]))
    model = build(cfg)
    backbone = getattr(model, "backbone", model)
    published = tensors(arrays, "state/")
    column_grid = backbone.grid_size if cfg.get("scan_path") == "column" else None
    state = from_published(published, column_grid)
    back = to_published(state, column_grid)
    assert back.keys() == published.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, published[name]), f"{name} changes in the round trip"
    if backbone is not model:
        state = {n if n.startswith("norms.") else f"backbone.{n}": t for n, t in state.items()}
    model.load_state_dict(state, strict=True)
    return cfg, arrays, model.eval().to(request.config.getoption("device"))


def tensors(arrays: dict, prefix: str) -> dict[str, torch.Tensor]:
    return {
        k[len(prefix) :]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)
    }


def noise_of(arrays: dict, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(arrays["in/noise"]).to(like.device)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def test_outputs(case):
    cfg, arrays, model = case
    image = torch.from_numpy(arrays["in/image"]).to(next(model.parameters()).device)
    expected = tensors(arrays, "out/")
    with torch.no_grad():
        if cfg["model"] == "mae":
            output = model(image, noise_of(arrays, image))
            # The place of each cell in the shuffled order, whose first cells are kept.
            shuffled = expected.pop("ids_restore").argsort(dim=1)
            assert torch.equal(output.ids_keep.cpu(), shuffled[:, : output.ids_keep.shape[1]])
            actual = {
                "latent": output.latent,
                "mask": output.mask,
                "pred": output.prediction,
                "loss": output.loss,
            }
        elif "out_indices" in cfg:
            actual = {f"map{i}": x for i, x in enumerate(model(image))}
        else:
            tokens = model.forward_features(image)
            actual = {
                "features": model.forward_head(tokens, pre_logits=True),
                "logits": model.forward_head(tokens),
            }
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value.cpu(), expected[name], atol=1e-4, rtol=0)


def test_gradients(case):
    cfg, arrays, model = case
    expected = tensors(arrays, "grad/")
    if not expected:
        pytest.skip("the case holds no gradients")
    image = torch.from_numpy(arrays["in/image"]).to(next(model.parameters()).device)
    if cfg["model"] == "mae":
        model(image, noise_of(arrays, image)).loss.backward()
    else:
        model(image).square().mean().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    actual = to_published({n: p.grad.cpu() for n, p in trained.items()})
    assert actual.keys() == expected.keys()
    errors = {name: relative(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-3, errors
