"""Initial values: what the published models hold before training, tensor by tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastvim.models import FeatureMaps, create_model
from fastvim.models.heads.cascade import build_detector
from fastvim.models.heads.upernet import UPerNet
from fastvim.weights import dense_names, to_published

FILE = Path(__file__).parents[1] / "golden" / "training" / "initial.json"
PUBLISHED = json.loads(FILE.read_text())
MODELS = [name for name, entry in PUBLISHED.items() if "model" in entry and "parameters" in entry]
# A step from 0.001 to 0.1 as a bias before the softplus.
STEPS = tuple(math.log(math.expm1(step)) for step in (0.001, 0.1))

Shape = Sequence[int]


def inputs(shape: Shape, depth: int) -> float:
    """PyTorch's bound of a layer: one over the root of an output's inputs."""
    return math.prod(shape[1:]) ** -0.5


def xavier(shape: Shape, depth: int) -> float:
    return math.sqrt(6 / (shape[0] + math.prod(shape[1:])))


# The bound of each tensor that is uniform: published name, shape and depth of the backbone.
UNIFORM: tuple[tuple[str, Callable[[Shape, int], float]], ...] = (
    (r".*\.mixer\.(in_proj|x_proj|x_proj_b|dt_proj|dt_proj_b)\.weight", inputs),
    (r".*\.mixer\.out_proj\.weight", lambda shape, depth: inputs(shape, depth) / depth**0.5),
    (r".*\.mixer\.conv1d(_b)?\.(weight|bias)", lambda shape, depth: 0.5),  # of four taps
    (r"decoder_(embed|pred)\.weight", xavier),
    (r"roi_head\.bbox_head\.\d\.shared_fcs\.0\.weight", xavier),
    (r"roi_head\.mask_head\.\d\.(upsample|conv_logits)\.weight", inputs),
    (r"neck\.fpn\d\.[03]\.weight", inputs),
)
MASKED = (
    (r"patch_embed\.proj\.weight", xavier),
    (r"patch_embed\.proj\.bias", lambda shape, depth: (3 * 16 * 16) ** -0.5),
)
CHANNELS = ((r"patch_embed\.proj\.(weight|bias)", lambda shape, depth: 1 / 16),)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def compare(name: str, ours: Tensor, theirs: tuple[Shape, float, float, float, float]) -> None:
    """Shape and constants exactly, mean and deviation within four standard errors."""
    shape, mean, deviation, least, greatest = theirs
    assert list(ours.shape) == shape, name
    values = ours.double().flatten()
    if least == greatest:
        assert (values == least).all(), name
        return
    centred, count = values - values.mean(), len(values)
    spread = centred.square().mean().sqrt()
    kurtosis = centred.pow(4).mean() / spread.pow(4)
    # Both sides are drawn, so that a difference has twice the variance of one.
    assert abs(values.mean() - mean) <= 4 * spread * math.sqrt(2 / count), name
    assert abs(spread - deviation) <= 4 * spread * ((kurtosis - 1) / (2 * count)).sqrt(), name
    if name.endswith(("A_log", "A_b_log")):  # the same in every model
        rates = torch.arange(1.0, shape[-1] + 1).log().expand(shape)
        assert torch.equal(ours, rates), name


def compare_bounds(
    ours: dict[str, Tensor], theirs: dict, depth: int, rules: Sequence[tuple]
) -> set[str]:
    """Ours stay within the bounds that theirs fill; returns the names of those tensors."""
    bounded = set()
    for name, (shape, _, _, least, greatest) in theirs.items():
        if name.endswith("dt_proj.bias"):
            assert STEPS[0] - 1e-4 <= ours[name].min() <= ours[name].max() <= STEPS[1] + 1e-4
        for pattern, rule in rules:
            if re.fullmatch(pattern, name):
                bound = rule(shape, depth)
                assert 0.85 * bound < max(-least, greatest) <= bound * (1 + 1e-5), name
                assert 0.85 * bound < ours[name].abs().max() <= bound * (1 + 1e-6), name
                bounded.add(name)
    return bounded


@pytest.mark.parametrize("kind", MODELS)
def test_the_published_initial_values(kind: str) -> None:
    entry = PUBLISHED[kind]
    theirs, options = entry["parameters"], dict(entry["options"])
    if "channel" in kind:
        # Made without the number of channels, which was then that of colour images.
        options["in_chans"] = theirs["patch_embed.channel_embed.weight"][0][0]
    torch.manual_seed(0)
    ours = to_published(trained(create_model(entry["model"], **options)))
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        compare(name, ours[name], expected)
    own = MASKED if "mae" in kind else CHANNELS if "channel" in kind else ()
    bounded = compare_bounds(ours, theirs, options["depth"], [*UNIFORM, *own])
    assert len(bounded) >= 10 * options["depth"]
    backward = [name for name in ours if name.endswith(".dt_proj_b.bias")]
    assert len(backward) == options["depth"] + options.get("decoder_depth", 0)
    assert not any(ours[name].any() for name in backward)


@pytest.mark.parametrize("kind", ["segmentor", "detector"])
def test_the_published_initial_values_of_heads(kind: str) -> None:
    theirs, options = PUBLISHED[kind]["parameters"], PUBLISHED[kind]["options"]
    sizes = {"img_size": 64, "embed_dim": options["embed_dim"], "depth": options["depth"]}
    torch.manual_seed(0)
    backbone = create_model("fastvim_tiny_patch16_224", norm="layer", **sizes)
    classes, channels = options["num_classes"], options["channels"]
    model: nn.Module
    if kind == "segmentor":
        maps = FeatureMaps(backbone, range(4))
        model = UPerNet(maps, classes, channels, aux_channels=options["aux_channels"])
    else:
        heads = {"hidden_dim": options["hidden_dim"]}
        model = build_detector(backbone, classes, channels=channels, heads=heads)
    ours = dense_names.to_published(trained(model))
    heads = {name for name in ours if not name.startswith("backbone.")}
    assert heads | {name for name in ours if ".outnorm_" in name} == set(theirs)
    for name, expected in theirs.items():
        compare(name, ours[name], expected)
    bounded = compare_bounds(ours, theirs, options["depth"], UNIFORM)
    assert len(bounded) == (0 if kind == "segmentor" else 12)


def test_the_published_stochastic_depth() -> None:
    entry = PUBLISHED["drop_path"]
    model = create_model(entry["model"], **entry["options"])
    norms = [*(block.norm for block in model.blocks), model.norm]
    rates = [getattr(norm.drop_path, "drop_prob", 0.0) for norm in norms]
    assert rates == pytest.approx([*entry["before_block"], entry["before_last_norm"]])
