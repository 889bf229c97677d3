"""FastChannelVim and ChannelVim: walks over channels, named channels, sampling of channels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastvim import UserError, use_engine
from fastvim.models import FastChannelVim, sample_channels

GOLDEN = Path(__file__).parents[1] / "golden"
OPTIONS = {"img_size": 24, "patch_size": 8, "in_chans": 5, "embed_dim": 16, "num_classes": 4}


def build(**options) -> FastChannelVim:
    torch.manual_seed(0)
    model = FastChannelVim(**{**OPTIONS, "depth": 3, **options}).eval()
    torch.nn.init.normal_(model.patch_embed.channel_embed.weight, std=0.5)
    return model


def image(channels: int = 5, height: int = 24, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, height, width, generator=generator)


def direct_two_axes(model: FastChannelVim, x: torch.Tensor) -> torch.Tensor:
    """The variant that pools two axes, token by token in float64: no traversal, no op, no kernel.

    Layer mod 3 walks (row, column, channel), (column, row, channel), (row, column, channel), and
    has a step for each row, each column, each channel.
    """
    model = model.double()
    patches, patch = x.double(), model.patch_embed.patch_size
    down, across, chans = x.shape[2] // patch, x.shape[3] // patch, x.shape[1]
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    tokens = {}
    for h in range(down):
        for w in range(across):
            for c in range(chans):
                cut = patches[:, c, h * patch : (h + 1) * patch, w * patch : (w + 1) * patch]
                vector = torch.einsum("bij,dij->bd", cut, weight[:, 0]) + bias
                vector = vector + model.patch_embed.channel_embed.weight[c]
                tokens[h, w, c] = vector + model.pos_embed[0, h * across + w]
    for i, block in enumerate(model.blocks):
        by_column = i % 3 == 1
        path = sorted(tokens, key=lambda t: (t[1], t[0], t[2]) if by_column else t)
        segment = {0: lambda t: t[0], 1: lambda t: t[1], 2: lambda t: t[2]}[i % 3]
        mixed = direct_mixer(block, {t: tokens[t] for t in path}, segment)
        tokens = {t: tokens[t] + mixed[t] for t in tokens}
    last = torch.stack([rms(tokens[t], model.norm.weight) for t in sorted(tokens)], dim=1)
    return model.head(last.mean(1))


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def direct_mixer(block, tokens: dict, segment) -> dict:
    """One layer over tokens in path order, each (B, d)."""
    mixer, path = block.mixer, list(tokens)
    both = [mixer.in_proj(rms(tokens[t], block.norm.weight)) for t in path]
    inner = both[0].shape[1] // 2
    xs, zs = [b[:, :inner] for b in both], [b[:, inner:] for b in both]
    outputs = dict.fromkeys(path, 0.0)
    for direction, order in ((0, range(len(path))), (1, range(len(path) - 1, -1, -1))):
        order, convolved = list(order), {}
        for j, at in enumerate(order):
            total = mixer.conv_bias[direction].expand_as(xs[0])
            for back in range(min(4, j + 1)):
                total = total + mixer.conv_weight[direction, :, 3 - back] * xs[order[j - back]]
            convolved[path[at]] = torch.nn.functional.silu(total)
        members: dict = {}
        for t in convolved:
            members.setdefault(segment(t), []).append(t)
        rank, states = mixer.dt_rank, mixer.d_state
        state = torch.zeros(*xs[0].shape, states, dtype=torch.float64)
        read = {}
        for name in sorted(members, reverse=direction == 1):
            pooled = torch.stack([convolved[t] for t in members[name]]).mean(0)
            dt, b, c = (pooled @ mixer.x_proj[direction].T).split([rank, states, states], dim=1)
            raw = dt @ mixer.dt_proj[direction].T + mixer.dt_bias[direction]
            step = torch.nn.functional.softplus(raw)
            decay = torch.exp(-step[:, :, None] * mixer.A_log[direction].exp())
            state = decay * state + (step * pooled)[:, :, None] * b[:, None]
            read[name] = (state * c[:, None]).sum(-1)
        for t in path:
            outputs[t] = outputs[t] + (read[segment(t)] + mixer.D[direction] * convolved[t]) / 2
    gate = torch.nn.functional.silu
    return {
        t: mixer.out_proj(mixer.norm(outputs[t]) * gate(z)) for t, z in zip(path, zs, strict=True)
    }


@pytest.mark.parametrize("engine", ["reference", "numba"])
def test_two_pooled_axes_agree_with_a_direct_definition(engine):
    model, x = build(pooled_axes=2, depth=4), image(3, 24, 16)
    model.pos_embed.data = model.pos_embed.data[:, :6].contiguous()
    model.grid_size = (3, 2)
    with torch.no_grad(), use_engine(engine):
        actual = model(x)
        expected = direct_two_axes(model, x)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_order": "spatial_first"},
        {"pooling": "max"},
        {"pooled_axes": 2},
        {"pooling": "none"},
        {"pooling": "none", "class_token": True, "global_pool": "token"},
        {"scan_path": "column"},
        {"alternate": False},
    ],
    ids=str,
)
def test_channels_by_name(options):
    model, x = build(**options), image()
    with torch.no_grad():
        whole = model(x)
        assert torch.equal(model(x, channels=range(5)), whole)
        assert torch.equal(model(x[:, :3]), model(x[:, :3], channels=[0, 1, 2]))
        part = model(x[:, [2, 0, 4]], channels=[2, 0, 4])
        assert torch.equal(part, model(x[:, [2, 0, 4]], channels=torch.tensor([2, 0, 4])))
        # They are told apart, and not all were needed.
        assert not torch.allclose(part, model(x[:, [2, 0, 4]]))
        assert not torch.allclose(part, whole)
        for height, width in ((8, 40), (30, 9)):
            assert model(image(2, height, width), channels=[4, 1]).isfinite().all()


def test_channels_that_are_not_known():
    model = build()
    with pytest.raises(UserError, match="1 to 5 channels"):
        model(image(6))
    for channels in ([0, 0, 1], [0, 1, 5], [0, 1], [-1, 0, 1]):
        with pytest.raises(UserError, match="from 0 to 4"):
            model(image(3), channels=channels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_order": "rows"}, "token_order 'rows'"),
        ({"pooled_axes": 3}, "pooled_axes 3"),
        ({"pooled_axes": 2, "token_order": "spatial_first"}, "pooled_axes=2"),
        ({"pooled_axes": 2, "alternate": False}, "pooled_axes=2"),
        ({"patch_stride": 4}, "patch_stride=4"),
        (
            {"pooling": "none", "class_token": True, "token_order": "spatial_first"},
            "class_token=True",
        ),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


def test_sampled_channels_are_uniform_in_number_and_in_choice():
    generator = torch.Generator().manual_seed(0)
    draws = [sample_channels(4, generator) for _ in range(4000)]
    counts = torch.bincount(torch.tensor([len(d) for d in draws]), minlength=5)
    assert counts[0] == 0
    assert (counts[1:] - 1000).abs().max() < 120
    assert (torch.bincount(torch.cat(draws)) - 2500).abs().max() < 150  # (4 + 1) / 2 of 4
    assert all(torch.equal(d, d.unique()) for d in draws)
    unordered = [sample_channels(4, generator, ordered=False) for _ in range(100)]
    assert any(not torch.equal(d, d.sort().values) for d in unordered)


def test_channels_are_sampled_as_published():
    theirs = json.loads((GOLDEN / "training" / "cells.json").read_text())["channels_of_8"]
    generator, count = torch.Generator().manual_seed(0), 40_000
    draws = [sample_channels(8, generator) for _ in range(count)]
    sizes = torch.bincount(torch.tensor([len(d) for d in draws]), minlength=9)[1:]
    expected = torch.tensor([theirs["how_many"][str(k)] for k in range(1, 9)])
    drawn = torch.bincount(torch.cat(draws), minlength=8)
    for ours, published in ((sizes, expected), (drawn, torch.tensor(theirs["each_channel"]))):
        share = published / theirs["draws"]
        error = (share * (1 - share) * (1 / count + 1 / theirs["draws"])).sqrt()
        assert ((ours / count - share).abs() < 4 * error).all()
    assert theirs["ascending"] == theirs["draws"]
    assert all(torch.equal(d, d.unique()) for d in draws)


def test_sampled_channels_come_from_the_generator():
    one, two = (torch.Generator().manual_seed(5) for _ in range(2))
    for _ in range(20):
        assert torch.equal(sample_channels(8, one), sample_channels(8, two))
