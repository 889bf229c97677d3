"""Launches: one is kept for each kind of input, and not without end."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastvim.ops.triton import launch
from fastvim.ops.triton.launch import Launches


def test_a_launch_is_planned_once_for_a_kind_of_input():
    launches, planned = Launches(), []

    def get(*tensors, options=None):
        def plan():
            planned.append(tensors)
            return len(planned)

        return launches.get(tensors, options, plan)

    x = torch.zeros(8, 8)
    assert get(x) == get(torch.ones(8, 8)) == 1
    others = [x.half(), torch.zeros(8, 16), x.mT.contiguous().mT, x.flatten()[1:]]
    assert [get(other) for other in others] == [2, 3, 4, 5]
    assert get(x, options="mean") == 6
    assert get(x, None) == 7
    assert get(x) == 1


def test_launches_are_given_up_where_sizes_never_repeat(monkeypatch):
    monkeypatch.setattr(launch, "MOST_KINDS", 3)
    launches = Launches()
    for size in range(1, 10):
        assert launches.get((torch.zeros(size),), None, lambda size=size: size) == size
    assert len(launches._known) <= 3
