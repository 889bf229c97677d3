"""Kernels compiled before their first launch: which ones, and that nothing else changes."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from inputs import DEVICE, normal, scan_inputs

from fastvim.cudagraph import compile_ahead, compile_for
from fastvim.ops.triton.ahead import left_out_by
from fastvim.ops.triton.norm import add_norm_triton
from fastvim.ops.triton.selective_scan import selective_scan_triton

WIDTH = 16


def scan() -> list[torch.Tensor]:
    leaves = [t.float().to(DEVICE).requires_grad_() for t in scan_inputs(1, 6, WIDTH)]
    selective_scan_triton(*leaves).sum().backward()
    return [leaf.grad for leaf in leaves]


def test_every_kernel_of_both_passes_is_noted_once(forget_launches):
    requests = left_out_by(lambda: (scan(), scan()))
    names = [request.kernel.fn.__name__ for request in requests]
    assert {"_select_kernel", "_scan_kernel", "scan_backward_kernel"} < {*names}
    assert len(names) <= 10
    for request in requests:
        assert len(request.arguments) == len(request.kernel.arg_names)
        assert not any(isinstance(each, torch.Tensor) for each in request.arguments)
        assert request.options["num_warps"] >= 1


def test_launches_compute_afterwards_as_before(forget_launches):
    expected = scan()
    forget_launches()
    assert left_out_by(scan)
    assert all(map(torch.equal, scan(), expected))


def test_a_call_that_fails_without_its_kernels_is_no_error(forget_launches):
    x, weight = (t.float().to(DEVICE) for t in (normal(2, 7, WIDTH), normal(WIDTH)))

    def call() -> None:
        add_norm_triton(x, x, weight, weight)
        raise ValueError("indices out of range")

    assert [request.kernel.fn.__name__ for request in left_out_by(call)] == ["_add_norm_kernel"]
    assert left_out_by(lambda: None) == []


def test_anomalies_are_not_looked_for(forget_launches):

    def call() -> None:
        assert not torch.is_anomaly_enabled()
        scan()

    with torch.autograd.set_detect_anomaly(True):
        assert left_out_by(call)


def test_a_call_without_kernels_compiles_nothing():
    calls: list[int] = []
    compile_ahead(lambda: calls.append(1))
    assert calls == [1]


class Layer(torch.nn.Module):
    """A kernel of ours, with random numbers and buffers around it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = torch.nn.BatchNorm1d(WIDTH)
        self.weight = torch.nn.Parameter(torch.ones(WIDTH))
        self.unused = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.nn.functional.dropout(self.before(x.mT).mT)
        return {"normed": add_norm_triton(x, x, self.weight, self.weight)[1]}


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_as_it_is(training, forget_launches, monkeypatch):
    noted = []
    parallel = importlib.import_module("fastvim.ops.triton.parallel")
    monkeypatch.setattr(parallel, "compile_all", noted.extend)
    model = Layer().to(DEVICE).train(training)
    images = normal(2, 7, WIDTH).float().to(DEVICE)
    buffers = [buffer.clone() for buffer in model.buffers()]
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, [0] * (DEVICE == "cuda"))]
    with torch.set_grad_enabled(training):
        compile_for(model, images)
    backward = {"_add_norm_backward_kernel", "_sum_kernel"} if training else set()
    assert {request.kernel.fn.__name__ for request in noted} == {"_add_norm_kernel", *backward}
    after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, [0] * (DEVICE == "cuda"))]
    assert all(map(torch.equal, after, states))
    assert all(map(torch.equal, model.buffers(), buffers))
    assert all(parameter.grad is None for parameter in model.parameters())
    noted.clear()
    model.before.register_forward_hook(lambda *_: None)
    compile_for(model, images)
    assert noted == []


@pytest.mark.gpu
def test_kernels_compiled_ahead_compute_the_same(tmp_path, forget_launches, monkeypatch, caplog):
    expected = scan()
    forget_launches()
    requests = left_out_by(scan)
    for request in requests:
        request.kernel.device_caches.clear()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_ahead(scan)
    line, end = caplog.messages
    assert end.startswith("compiled ")
    assert line.startswith("compiling ")
    assert line.endswith(f" kernels for {torch.cuda.get_device_name()}, once")
    for request in requests:
        kept = [*request.kernel.device_caches[torch.cuda.current_device()][0].values()]
        assert kept
        assert all(kernel.module is not None for kernel in kept)  # loaded
    assert all(map(torch.equal, scan(), expected))


WITHOUT_A_GPU = """
import contextlib, logging, sys, time, torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

triton.runtime.driver.set_active(Driver())
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.get_device_name = lambda device: "stub"
from fastvim.cudagraph import compile_ahead, compile_for
from fastvim.ops.triton import norm

def call():
    x, weight = torch.ones(2, 7, 64, requires_grad=True), torch.ones(64)
    normed = norm.add_norm_triton(x, x.detach(), weight, weight)[1]
    normed.sum().backward()

compile_ahead(call)
found = {}
for kernel in (norm._add_norm_kernel, norm._add_norm_backward_kernel):
    found |= {kernel.fn.__name__: [*kernel.device_caches[0][0].values()]}
for name, kernels in found.items():
    assert [kernel.metadata.target.arch for kernel in kernels] == [90], name
"""


@pytest.mark.slow
def test_kernels_are_compiled_for_a_gpu_that_is_elsewhere(tmp_path):
    """The loading fails there, which is no error. The second process finds them on the disk."""
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    said = []
    for _ in range(2):
        words = [sys.executable, "-W", "ignore", "-c", WITHOUT_A_GPU]
        done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stderr.strip())
    assert said[1] == ""
    begun, ended = said[0].splitlines()
    assert begun == "compiling 3 kernels for stub, once"
    assert re.fullmatch(r"compiled 3 kernels in \d+ s", ended)
