"""What timm's own tests ask of every model that it has, asked of every registered one.

timm's wheel has no tests, so these are of the same contract, on models with few and narrow blocks.
`test_timm.py` and its neighbours ask for more, once a family.
"""

from __future__ import annotations

import pytest
import timm
import torch
from families import CHANNEL_FAMILIES, IMAGE_FAMILIES, MASKED_FAMILIES
from timm.data import resolve_data_config
from timm.models import FeatureInfo, create_feature_extractor, get_graph_node_names
from torch import Tensor, nn

NAMES = [
    name
    for families in (IMAGE_FAMILIES, CHANNEL_FAMILIES, MASKED_FAMILIES)
    for names in families.values()
    for name in names
]
CLASSIFIERS = [name for name in NAMES if not name.startswith("mae_")]
SIDE, BATCH = 64, 1

every_model = pytest.mark.parametrize("name", NAMES)
once_a_family = pytest.mark.parametrize(
    "name", [*IMAGE_FAMILIES, *CHANNEL_FAMILIES, *MASKED_FAMILIES]
)
classifiers = pytest.mark.parametrize("name", CLASSIFIERS)


def create(name: str, **options) -> nn.Module:
    """As timm's tests create it, with the default classes and channels, but small."""
    small = {"embed_dim": 16, "depth": 2}
    if name.startswith("mae_"):
        small["decoder_embed_dim"] = 16
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **{**small, **options}).eval()


def inputs(model: nn.Module, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.randn(BATCH, model.default_cfg["input_size"][0], height, width)


def run(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)  # for an autoencoder's mask
    out = model(x)
    assert out.shape[0] == BATCH
    return getattr(out, "prediction", out)


@every_model
def test_forward_and_backward(name):
    """At the default size and at one that is not square; a gradient for each parameter."""
    model = create(name)
    with torch.inference_mode():
        for size in (model.default_cfg["input_size"][1:], (SIDE, 2 * SIDE)):
            assert run(model, inputs(model, *size)).isfinite().all()
    model.train()
    out = run(model, inputs(model))
    out.mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, key
    assert out.isfinite().all()
    if name in CLASSIFIERS:
        assert out.shape == (BATCH, model.num_classes)


@every_model
def test_default_cfg(name):
    model = create(name)
    cfg, state = model.default_cfg, model.state_dict()
    assert set(resolve_data_config(model=model)) >= {"input_size", "mean", "std", "crop_pct"}
    assert model.num_classes == cfg["num_classes"]
    if cfg["num_classes"]:
        assert state[f"{cfg['classifier']}.weight"].shape[0] == cfg["num_classes"]
        assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    first_conv = cfg["first_conv"]
    for conv in [first_conv] if isinstance(first_conv, str) else first_conv:
        assert state[f"{conv}.weight"].shape[1] == cfg["input_size"][0]
    assert "license" in cfg or not cfg.get("url")
    assert len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0]


@every_model
def test_without_a_classifier(name):
    model = create(name)
    x = inputs(model)
    features = model.forward_features(x)
    assert features.shape[-1] == model.num_features
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (BATCH, model.head_hidden_size)
    if name in CLASSIFIERS:
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert isinstance(model.get_classifier(), nn.Identity)
        assert torch.equal(model(x), before)
        assert create(name, num_classes=0)(x).shape == before.shape
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape
    assert create(name, num_classes=0).num_classes == 0


@classifiers
def test_other_classes_and_channels(name):
    model = create(name, num_classes=7, in_chans=5, global_pool="max")
    assert model(torch.randn(BATCH, 5, SIDE, SIDE)).shape == (BATCH, 7)


@every_model
def test_feature_maps(name):
    model = create(name, features_only=True)
    x = inputs(model)
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 3
    assert model.feature_info.out_indices == (0, 1, 2, 3)
    for count, reduction, level in zip(channels, reductions, model(x), strict=True):
        assert level.shape == (BATCH, count, SIDE // reduction, SIDE // reduction)
        assert level.isfinite().all()


@every_model
def test_intermediates(name):
    model = create(name)
    x = inputs(model)
    info = FeatureInfo(list(model.feature_info), range(len(model.feature_info)))
    output, maps = model.forward_intermediates(x, output_fmt="NCHW")
    assert torch.equal(output, model.forward_features(x))
    for count, reduction, level in zip(info.channels(), info.reduction(), maps, strict=True):
        assert level.shape[:2] == (BATCH, count)
        assert abs(level.shape[2] - SIDE / reduction) <= 1
    model.set_grad_checkpointing()
    again, _ = model.forward_intermediates(x.requires_grad_())
    again.sum().backward()
    assert x.grad.any()


@once_a_family
def test_graphs_of_fx(name):
    for training in (False, True):
        model = create(name).train(training)
        x = inputs(model)
        expected = model_output(model, x)
        last = get_graph_node_names(model)[0 if training else 1][-1]
        graph = create_feature_extractor(model, [last])
        torch.manual_seed(1)
        (actual,) = graph.train(training)(x).values()
        assert torch.equal(actual, expected)
        if training:
            actual.mean().backward()
            unused = [n for n, p in graph.named_parameters() if p.requires_grad and p.grad is None]
            assert not unused


def model_output(model: nn.Module, x: Tensor) -> Tensor:
    """The last tensor that a model computes: logits, or an autoencoder's loss."""
    torch.manual_seed(1)
    out = model(x)
    return getattr(out, "loss", out)


@pytest.mark.parametrize("name", [*IMAGE_FAMILIES, *CHANNEL_FAMILIES])
def test_traced_by_jit(name):
    """For this size of images. Autoencoders are not: a traced mask is a constant."""
    model, x = create(name, in_chans=3), torch.randn(BATCH, 3, SIDE // 2, SIDE // 2)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        for image in (x, torch.randn_like(x)):
            torch.testing.assert_close(traced(image), model(image))
