"""The kept lists of a module's tensors are those of a walk, whatever changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastvim.tasks.tensors import TensorsOf


def module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)))


def replaced(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(torch.zeros(3, 2))


def removed(net: nn.Sequential) -> None:
    del net[1][1]


def nothing_left(net: nn.Sequential) -> None:
    del net[1], net[0]


def added_deep_inside(net: nn.Sequential) -> None:
    net[1][0].more = nn.Linear(1, 1)


def shared(net: nn.Sequential) -> None:
    net[1][1].bias = net[0].bias


def set_past_the_module(net: nn.Sequential) -> None:  # as fully_shard does
    net[1][1]._parameters["weight"] = nn.Parameter(torch.ones(3, 3))


def a_buffer(net: nn.Sequential) -> None:
    net[1][0].running_mean = torch.ones(3)


@pytest.mark.parametrize(
    "change",
    [replaced, removed, nothing_left, added_deep_inside, shared, set_past_the_module, a_buffer],
)
def test_a_change_is_seen(change: Callable[[nn.Sequential], None]):
    net = module()
    tensors = TensorsOf(net)
    for step in (lambda _: None, lambda _: None, change):
        step(net)
        for ours, walked in zip(tensors.find(), (net.parameters(), net.buffers()), strict=True):
            assert list(map(id, ours)) == list(map(id, walked))


def test_without_a_change_there_is_no_walk(monkeypatch):
    net = module()
    tensors = TensorsOf(net)
    first = tensors.find()
    monkeypatch.setattr(nn.Module, "modules", None)
    net.requires_grad_(False)  # the same objects
    again = tensors.find()
    assert again[0] is first[0]
    assert again[1] is first[1]
