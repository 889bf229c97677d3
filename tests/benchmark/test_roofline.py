"""The roofline's arithmetic, and that its two measurements measure."""

from __future__ import annotations

import pytest
import torch
from tiny_models import OURS, VIM

from fastvim.benchmark import roofline, timing
from fastvim.benchmark.cases import channels_of, create
from fastvim.benchmark.roofline import Blocks, copy_rate, product_seconds

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_groups(monkeypatch):
    monkeypatch.setattr(timing, "GROUP_SECONDS", {"cuda": 1e-3, "cpu": 1e-3})


def test_sizes_of_a_model():
    assert Blocks.of(create(OURS, (32, 32)), 3, (48, 32)) == Blocks(2, 3 * 6 * 4, 16, 32)
    assert Blocks.of(create(VIM, (32, 32)), 3, (48, 32)) == Blocks(2, 3 * (6 * 4 + 1), 16, 32)


def test_sizes_of_a_channel_model():
    model = create("fastchannelvim_small_patch16_224", (32, 32))
    assert channels_of(model) == 8
    assert Blocks.of(model, 3, (48, 32)) == Blocks(24, 3 * 8 * 3 * 2, 384, 768)
    assert channels_of(create(OURS, (32, 32))) == 3


def test_bytes_as_defined():
    assert Blocks(24, 1, 192, 384).bytes_moved(2) == 12 * 192 + (2 + 6) * 384
    assert Blocks(24, 10, 192, 384).bytes_moved(4) == 10 * (16 * 192 + (4 + 12) * 384)


def test_the_published_anchor():
    """FastVim-T, 224 pixels, batch 128 on an H100: products of 37 µs a layer, 2.96 TB/s."""
    blocks = Blocks(24, 128 * 196, 192, 384)
    assert 128 / blocks.seconds(37e-6, 2.96e12, 2) == pytest.approx(64_871, rel=0.01)


def test_copy_rate_counts_reading_and_writing(monkeypatch):
    monkeypatch.setattr(
        roofline, "measure", lambda call, device: call() is None or timing.Timing(0.5, 0.5, 0.5)
    )
    assert copy_rate(CPU, 1000) == 4000


def test_products(monkeypatch):
    shapes = []

    def timed(call, device):
        call()
        return timing.Timing(1.0, 1.0, 1.0)

    def times(x, weight, out):
        shapes.append((tuple(x.shape), tuple(weight.mT.shape), tuple(out.shape), x.dtype))

    monkeypatch.setattr(roofline, "measure", timed)
    monkeypatch.setattr(roofline, "_times", times)
    assert product_seconds(Blocks(2, 7, 16, 32), torch.bfloat16, CPU) == 2.0
    assert shapes == [
        ((7, 16), (16, 64), (7, 64), torch.bfloat16),
        ((7, 32), (32, 16), (7, 16), torch.bfloat16),
    ]


def test_more_work_takes_longer(device):
    device = torch.device(device)
    small, large = (
        product_seconds(Blocks(1, tokens, 256, 512), torch.float32, device) for tokens in (64, 4096)
    )
    assert 0 < small < large
    assert copy_rate(device, 2**22) > 1e7
