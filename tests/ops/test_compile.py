"""torch.compile (without a graph break) and torch.export of the ops and of whole models."""

from __future__ import annotations

import shutil

import pytest
import torch
from inputs import ENGINES, cases, normal, run_with_gradients

from fastvim.layers import Mixer
from fastvim.models import create_model
from fastvim.ops import Traversal, use_engine
from fastvim.ops.cpu import conv_pool, selective_scan
from fastvim.ops.dispatch import OPS

MODELS = ["fastvim_tiny_patch16_224", "vim_tiny_patch16_224"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(name, img_size=48, embed_dim=32, depth=2, num_classes=5)


def outputs_and_gradients(call, module, x):
    module.zero_grad()
    out = call(x)
    out.backward(normal(*out.shape, seed=99).float())
    return [out.detach(), *(p.grad.clone() for p in module.parameters())]


def assert_same(compiled, plain):
    for actual, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("op", cases())
def test_ops_compile_whole(op, engine):
    function, inputs = cases()[op]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(
        run_with_gradients(compiled, inputs.values(), torch.float32, engine),
        run_with_gradients(function, inputs.values(), torch.float32, engine),
    )


@pytest.mark.parametrize("name", MODELS)
def test_models_compile_whole(name):
    model, x = small(name), normal(2, 3, 48, 40).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(outputs_and_gradients(compiled, model, x), outputs_and_gradients(model, model, x))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_runs_a_mixer():
    mixer, x = Mixer(16), normal(2, 12, 16).float()
    segments = Traversal("w h", "h").over({"h": 4, "w": 3})
    compiled = torch.compile(lambda u: mixer(u, segments), fullgraph=True)
    plain = outputs_and_gradients(lambda u: mixer(u, segments), mixer, x)
    assert_same(outputs_and_gradients(compiled, mixer, x), plain)


@pytest.mark.parametrize("op", ["conv_pool", "selective_scan"])
def test_a_compiled_op_follows_the_choice_of_engine(op, monkeypatch):
    function, inputs = cases()[op]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    launched = []
    for module in (conv_pool, selective_scan):
        run = module.run
        monkeypatch.setattr(module, "run", lambda *a, run=run: (launched.append(1), run(*a)))
    for engine in (*ENGINES, *ENGINES):
        launched.clear()
        with use_engine(engine):
            out = compiled(*inputs.values())
            torch.testing.assert_close(out, function(*inputs.values()))
        assert len(launched) == (2 if engine == "numba" else 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_export(name, engine):
    model, x = small(name).eval(), normal(2, 3, 48, 48).float()
    with use_engine(engine), torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))
    called = {str(node.target) for node in program.graph.nodes}
    kernels = {target for target in called if target.startswith("fastvim.")}
    own = {f"fastvim.{op}_cpu.default" for op in OPS}
    assert kernels == (own if engine == "numba" else set())
