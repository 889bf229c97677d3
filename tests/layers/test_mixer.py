"""The mixer's initial values, and the stochastic depth of its blocks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastvim.layers import AddNorm, Mixer
from fastvim.models import FastVim
from fastvim.ops import Traversal

DIM, DEPTH = 64, 9


@pytest.fixture(scope="module")
def mixer() -> Mixer:
    torch.manual_seed(0)
    return Mixer(DIM, depth=DEPTH)


def assert_uniform(tensor: torch.Tensor, bound: float) -> None:
    """Spread over all of (-bound, bound), in each direction its own draw."""
    assert tensor.abs().max() <= bound
    assert tensor.abs().max() > 0.9 * bound
    assert abs(float(tensor.mean())) < 0.2 * bound
    torch.testing.assert_close(float(tensor.std()), bound / math.sqrt(3), rtol=0.15, atol=0.0)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("in_proj.weight", DIM**-0.5),
        ("conv_weight", 4**-0.5),
        ("conv_bias", 4**-0.5),
        ("x_proj", (2 * DIM) ** -0.5),
        ("dt_proj", (DIM / 16) ** -0.5),
        ("out_proj.weight", (2 * DIM) ** -0.5 / math.sqrt(DEPTH)),
    ],
)
def test_uniform_initial_values(mixer, name, bound):
    tensor = mixer.get_parameter(name).detach()
    assert_uniform(tensor, bound)
    if "." not in name:
        assert tensor.shape[0] == 2
        assert not torch.equal(tensor[0], tensor[1])


def test_initial_steps():
    """Forward ones lie between a thousandth and a tenth; backward ones are ln 2, as published."""
    torch.manual_seed(0)
    steps, backward = F.softplus(Mixer(16, expand=256).dt_bias.detach())
    assert 0.001 * (1 - 1e-4) < steps.min() < 0.00101
    assert 0.099 < steps.max() < 0.1 * (1 + 1e-4)
    # Uniform in the logarithm: half of them below a hundredth.
    assert 0.48 < float((steps < 0.01).float().mean()) < 0.52
    torch.testing.assert_close(backward, torch.full_like(backward, math.log(2)))


def test_initial_rates_skips_and_scales(mixer):
    expected = torch.arange(1, 17).float().log().expand(2, 2 * DIM, 16)
    torch.testing.assert_close(mixer.A_log.detach(), expected)
    assert (mixer.D == 1).all()
    assert (mixer.norm.weight == 1).all()
    assert (mixer.norm.bias == 0).all()
    assert mixer.norm.eps == 1e-5
    assert mixer.gamma is None
    assert (Mixer(32, init_layer_scale=0.1).gamma == 0.1).all()
    assert Mixer(32, norm_after_ssm=False).norm is None


@pytest.mark.parametrize(("dim", "rank"), [(16, 1), (20, 2), (192, 12), (200, 13)])
def test_shapes(dim, rank):
    mixer = Mixer(dim)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    inner = 2 * dim
    assert shapes == {
        "in_proj.weight": (2 * inner, dim),
        "conv_weight": (2, inner, 4),
        "conv_bias": (2, inner),
        "x_proj": (2, rank + 32, inner),
        "dt_proj": (2, inner, rank),
        "dt_bias": (2, inner),
        "A_log": (2, inner, 16),
        "D": (2, inner),
        "norm.weight": (inner,),
        "norm.bias": (inner,),
        "out_proj.weight": (dim, inner),
    }


def test_sizes_can_be_chosen():
    mixer = Mixer(16, d_state=3, d_conv=2, expand=3, dt_rank=5)
    assert mixer.A_log.shape == (2, 48, 3)
    assert mixer.conv_weight.shape == (2, 48, 2)
    assert mixer.x_proj.shape == (2, 5 + 6, 48)
    segments = Traversal("h w", "w").over({"h": 3, "w": 2})
    assert mixer(torch.randn(2, 6, 16), segments).shape == (2, 6, 16)


def test_layer_scale_multiplies_the_output():
    torch.manual_seed(0)
    plain, scaled = Mixer(16), Mixer(16, init_layer_scale=0.25)
    scaled.load_state_dict(plain.state_dict(), strict=False)
    segments, u = Traversal("h w", "w").over({"h": 3, "w": 2}), torch.randn(2, 6, 16)
    torch.testing.assert_close(scaled(u, segments), 0.25 * plain(u, segments))


@pytest.mark.parametrize("depth", [1, 2, 4, 24])
def test_drop_path_rates(depth):
    """The first two are 0; the last norm drops the last block's output at the full rate."""
    rate = 0.3
    model = FastVim(img_size=32, embed_dim=16, depth=depth, drop_path_rate=rate)
    norms = [*(block.norm for block in model.blocks), model.norm]
    rates = [getattr(norm.drop_path, "drop_prob", 0.0) for norm in norms]
    expected = [[0.0, *torch.linspace(0, rate, depth).tolist()][i] for i in range(depth)]
    assert rates == pytest.approx([*expected, rate])
    assert rates[:2] == [0.0, 0.0] or depth == 1


def test_dropped_samples_keep_their_residual():
    norm = AddNorm(8, drop_path=0.5).train()
    torch.manual_seed(0)
    hidden, residual = torch.ones(64, 3, 8), torch.zeros(64, 3, 8)
    total = norm.add(hidden, residual)[1][:, 0, 0]
    assert set(total.tolist()) == {0.0, 2.0}  # dropped, or kept and scaled
    assert torch.equal(norm.eval().add(hidden, residual)[1], hidden)


def test_no_decay_vectors_are_the_ones_stored_per_direction():
    mixer = Mixer(16)
    stacked = {n for n, p in mixer.named_parameters() if p.ndim == 2 and p.shape[0] == 2}
    assert set(Mixer.vectors) == stacked
