"""Launches: one is kept for each kind of input, and every argument is given by name."""

from __future__ import annotations

import functools
import importlib
import pkgutil

import pytest
import torch

pytest.importorskip("triton")

from inputs import (
    DEVICE,
    conv_inputs,
    gate_inputs,
    normal,
    outputs_of,
    probe_backward,
    scan_inputs,
    to,
)

import fastvim.ops.triton
from fastvim.ops import Traversal
from fastvim.ops.triton import launch, selective_scan_kernels
from fastvim.ops.triton.conv_pool import conv_pool_triton
from fastvim.ops.triton.expand_gate import expand_gate_triton
from fastvim.ops.triton.launch import H100_MULTIPROCESSORS, Launch, Launches, multiprocessors
from fastvim.ops.triton.masked import conv_pool_masked, expand_gate_masked
from fastvim.ops.triton.norm import add_norm_triton
from fastvim.ops.triton.selective_scan import selective_scan_triton

WIDTH = 16
IDS_KEEP = [[0, 1, 5, 6, 10, 11], [2, 3, 4, 5, 7, 8]]  # of 4 x 3 cells


def run(function, inputs) -> list[torch.Tensor]:
    """Outputs and gradients."""
    leaves = [t.to(DEVICE).requires_grad_() for t in to(inputs, torch.float32)]
    outputs = outputs_of(function(*leaves))
    probe_backward(outputs)
    return [*outputs, *(leaf.grad for leaf in leaves)]


def conv_pool(path: str, pool: str, **grid: int) -> list[torch.Tensor]:
    segments = Traversal(path, pool).over(grid)
    inputs = conv_inputs(2, segments.num_tokens, WIDTH)
    return run(lambda *t: conv_pool_triton(*t, segments), inputs)


def expand_gate() -> list[torch.Tensor]:
    segments = Traversal("h w", "w").over({"h": 3, "w": 5})
    inputs = gate_inputs(2, 15, 3, WIDTH)
    return run(lambda skip, z, y, *norm: expand_gate_triton(skip, z, y, segments, *norm), inputs)


def masked() -> list[torch.Tensor]:
    ids_keep = torch.tensor(IDS_KEEP, device=DEVICE)
    segments = Traversal("w h", "h").over({"h": 4, "w": 3}, ids_keep)
    results = run(lambda *t: conv_pool_masked(*t, segments), conv_inputs(2, 6, WIDTH))
    inputs = gate_inputs(2, 6, 3, WIDTH)
    gate = run(lambda skip, z, y, *norm: expand_gate_masked(skip, z, y, segments, *norm), inputs)
    return [*results, *gate]


CASES = {
    "norm": lambda: run(
        add_norm_triton, [normal(2, 7, WIDTH), normal(2, 7, WIDTH), normal(WIDTH), normal(WIDTH)]
    ),
    "rows": lambda: conv_pool("h w", "w", h=3, w=5),
    "channels": lambda: conv_pool("h w c", "w", h=2, w=3, c=3),
    "cells": lambda: conv_pool("h w c", "w", h=2, w=3, c=2),
    "gate": expand_gate,
    "scan": lambda: run(selective_scan_triton, scan_inputs(1, 6, WIDTH)),
    "masked": masked,
}

# A kernel, the case that launches it, and two of its arguments that can be exchanged without
# reading or writing outside of their memory.
SWAPS = {
    "norm._add_norm_kernel": ("norm", "normed", "total"),
    "norm._add_norm_backward_kernel": ("norm", "total", "dnormed"),
    "sums._sum_kernel": ("norm", "parts", "out"),
    "conv_pool_kernels.runs_kernel": ("rows", "bias", "D"),
    "conv_pool_kernels.channels_kernel": ("channels", "bias", "D"),
    "conv_pool_kernels.cells_kernel": ("cells", "bias", "D"),
    "conv_pool_backward._runs_backward_kernel": ("rows", "bias", "D"),
    "expand_gate_kernels.expand_gate_kernel": ("gate", "skip", "z"),
    "expand_gate_kernels.expand_gate_backward_kernel": ("gate", "skip", "z"),
    "selective_scan_kernels._select_kernel": ("scan", "delta", "BC"),
    "selective_scan_kernels._scan_kernel": ("scan", "u", "delta"),
    "selective_scan_kernels.carry_kernel": ("scan", "G", "chunks"),
    "selective_scan_backward_kernels.flow_back_kernel": ("scan", "delta", "dy"),
    "selective_scan_backward_kernels.scan_backward_kernel": ("scan", "u", "delta"),
    "selective_scan_backward_kernels.select_backward_kernel": ("scan", "scan_du", "draw"),
    "selective_scan_backward_kernels.weights_backward_kernel": ("scan", "u", "draw"),
    "masked._take_kernel": ("masked", "rows", "n"),
    "masked._spread_kernel": ("masked", "y", "out"),
    "masked._sum_segments_kernel": ("masked", "B", "n"),
}


@functools.cache
def results_of(case: str) -> list[torch.Tensor]:
    return CASES[case]()


def name_of(kernel) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


@pytest.fixture
def small_chunks(monkeypatch, forget_launches):
    """6 steps of a scan are cut into chunks, and outputs that no kernel writes are NaN."""
    monkeypatch.setattr(selective_scan_kernels, "LONG", 4)
    monkeypatch.setattr(selective_scan_kernels, "SHORTEST", 2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_every_kernel_is_among_those_below():
    found = set()
    for info in pkgutil.iter_modules(fastvim.ops.triton.__path__):
        module = importlib.import_module(f"fastvim.ops.triton.{info.name}")
        names = [name for name in vars(module) if name.endswith("_kernel")]
        found |= {name_of(getattr(module, name)) for name in names}
    assert found == set(SWAPS)


@pytest.mark.parametrize("kernel", SWAPS)
def test_two_arguments_exchanged_give_other_results(
    kernel, small_chunks, forget_launches, monkeypatch
):
    case, first, second = SWAPS[kernel]
    expected = results_of(case)
    assert all(t.isfinite().all() for t in expected)
    forget_launches()  # those that were just made have their arguments in order

    def exchange(arguments):
        arguments[first], arguments[second] = arguments[second], arguments[first]

    def call(self, original=Launch.__call__, **tensors):
        if name_of(self.kernel) == kernel:
            exchange(tensors if first in tensors else self.meta)
        original(self, **tensors)

    monkeypatch.setattr(Launch, "__call__", call)
    actual = CASES[case]()
    assert not all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_names_that_are_not_the_kernels_fail_at_the_first_launch(small_chunks, monkeypatch):
    """Every kernel, with each of its arguments missing and with one that it does not have."""
    seen = set()

    def call(self, original=Launch.__call__, **tensors):
        kernel, meta = self.kernel, dict(self.meta)
        first = name_of(kernel) not in seen
        for name in [*tensors, *meta] if first else ():
            rest = {key: value for key, value in tensors.items() if key != name}
            self.meta = {key: value for key, value in meta.items() if key != name}
            with pytest.raises(TypeError, match=rf"{kernel.fn.__name__}: missing \['{name}'\]"):
                original(self, **rest)
            with pytest.raises(TypeError, match=rf"missing \['{name}'\], unknown \['other'\]"):
                original(self, other=None, **rest)
            self.meta = meta
        if first:
            with pytest.raises(TypeError, match=r"missing \[\], unknown \['other'\]"):
                original(self, other=None, **tensors)
            with pytest.raises(TypeError, match=r"given twice \['\w+'\]"):
                original(self, **tensors, **dict([*meta.items()][:1]))
        seen.add(name_of(kernel))
        original(self, **tensors)

    monkeypatch.setattr(Launch, "__call__", call)
    for case in CASES.values():
        case()
    assert seen == set(SWAPS)


def test_programs_follow_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = type("Properties", (), {"multi_processor_count": 17})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    multiprocessors.cache_clear()
    assert multiprocessors(torch.device("cuda", 5)) == 17
    assert multiprocessors(torch.device("cpu")) == H100_MULTIPROCESSORS
    multiprocessors.cache_clear()


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


def test_launches_are_forgotten_where_sizes_never_repeat(monkeypatch):
    monkeypatch.setattr(launch, "MAX_KINDS", 3)
    launches = Launches()
    for size in range(1, 10):
        assert launches.get((torch.zeros(size),), None, lambda size=size: size) == size
    assert len(launches._known) <= 3
