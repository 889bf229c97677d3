"""Tensors that are not kept for a backward pass: what is saved, and the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import conv_inputs, normal
from torch import nn

from fastvim.ops import Traversal, add_norm, conv_pool, expand_gate
from fastvim.ops.recompute import linear, recipe_of

SEGMENTS = Traversal("h w", "w").over({"h": 3, "w": 5})


def leaves(*tensors):
    return [tensor.float().requires_grad_() for tensor in tensors]


def gated(inputs, z, change=lambda skip: skip):
    pooled, skip = conv_pool(*inputs, SEGMENTS)
    return expand_gate(change(skip), z, pooled, SEGMENTS)


def test_a_gate_saves_no_skip():
    inputs = leaves(*conv_inputs(2, 15, 72))
    z, saved = torch.randn(2, 15, 72), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated(inputs, z, lambda skip: skip.mul_(2))  # kept: it is not the op's any more
        kept, saved[:] = list(saved), []
        gated(inputs, z)
    known = {tensor.data_ptr() for tensor in (*inputs, z)}
    large = lambda tensors: sum(  # noqa: E731
        t.shape == (2, 15, 72) and t.data_ptr() not in known for t in tensors
    )
    assert (large(kept), large(saved)) == (1, 0)


@pytest.mark.parametrize("change", [lambda x: x.clone(), lambda x: x.mul_(2).div_(2)])
def test_gradients_of_a_skip_made_again(change):
    inputs, z = leaves(*conv_inputs(2, 15, 72)), torch.randn(2, 15, 72)
    again = torch.autograd.grad(gated(inputs, z).square().sum(), inputs)
    kept = torch.autograd.grad(gated(inputs, z, change).square().sum(), inputs)
    for a, b in zip(again, kept, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_a_skip_made_again_in_their_turn():
    inputs, z = leaves(*conv_inputs(2, 15, 8)), torch.randn(2, 15, 8)
    found = []
    for change in (lambda x: x, lambda x: x.clone()):
        first = torch.autograd.grad(
            gated(inputs, z, change).square().sum(), inputs, create_graph=True
        )
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_a_linear_layer_after_a_norm():
    hidden, residual, scale = leaves(normal(2, 5, 8), normal(2, 5, 8, seed=1), normal(8, seed=2))
    weight = nn.Parameter(normal(12, 8, seed=3).float())
    inputs, found = (hidden, residual, scale, weight), []
    for call in (linear, F.linear):
        normed, total = add_norm(hidden, residual, scale)
        assert recipe_of(normed) is not None
        assert recipe_of(total) is None
        out = call(normed, weight).square().sum() + total.sum()
        first = torch.autograd.grad(out, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        found.append((out, *first, *second))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_nothing_is_noted_without_gradients():
    with torch.no_grad():
        normed, _ = add_norm(torch.randn(2, 5, 8), None, torch.ones(8))
    assert recipe_of(normed) is None
