"""A function of tensors is called, or replayed, and always gives what it would give."""

from __future__ import annotations

import pytest
import torch

from fastvim.tasks.replayed import ALIKE, Replayed


def test_calls(device):
    called = []

    def grow(ones, twos):
        called.append(scale[0])
        torch._foreach_add_(ones, twos, alpha=scale[0])
        return ones[0] * 2

    scale = [1.0]
    update = Replayed(grow)
    ones = [torch.zeros(3, device=device), torch.zeros(2, 2, device=device)]
    twos = [torch.ones(3, device=device), torch.ones(2, 2, device=device)]
    expected = 0.0
    for step in range(3 * ALIKE):
        if step == 2 * ALIKE:
            scale[0] = 3.0
        expected += scale[0] * (step + 1)
        for each in twos:
            each.fill_(step + 1)
        assert update(ones, twos, settings=scale[0]).tolist() == [2 * expected] * 3
        assert ones[1].tolist() == [[expected] * 2] * 2
    if device == "cuda":  # one call of each scale is recorded, the next ones are replayed
        assert called == [1.0] * (ALIKE + 1) + [3.0] * ALIKE
    else:
        assert len(called) == 3 * ALIKE
    moved = [torch.zeros_like(each) for each in ones]
    update(moved, twos, settings=scale[0])
    assert moved[0].tolist() == [3.0 * 3 * ALIKE] * 3


@pytest.mark.gpu
def test_what_is_captured_already_is_called():
    called = []
    update = Replayed(lambda tensors: called.append(1) or tensors[0].add_(1))
    count = [torch.zeros(1, device="cuda")]
    for _ in range(ALIKE):
        update(count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(count)
    graph.replay()
    assert len(called) == ALIKE + 1
    assert count[0].item() == ALIKE + 1
