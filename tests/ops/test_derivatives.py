"""Derivatives beyond the first one in reverse mode, against differences in float64."""

from __future__ import annotations

import pytest
import torch
from inputs import call_of, cases, engine_of, on_device, outputs_of
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fastvim.ops import dispatch, use_engine
from fastvim.ops.cpu import conv_pool, expand_gate, norm, selective_scan
from fastvim.ops.dispatch import OPS

STEP = 1e-6
# The kernels compute in float32; the measure is the largest value.
TOLERANCE = 2e-5


def value_of(function, tensors) -> torch.Tensor:
    """One number that depends on every output and is not linear in any."""
    return sum(out.square().sum() for out in outputs_of(function(*tensors)))


def directions(tensors) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in tensors]


def gradients(function, tensors, create_graph: bool = False) -> list[torch.Tensor]:
    leaves = [t if t.requires_grad else t.detach().clone().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(value_of(function, leaves), leaves, create_graph=create_graph))


def moved(tensors, by: float) -> list[torch.Tensor]:
    return [t.cpu().double() + by * d for t, d in zip(tensors, directions(tensors), strict=True)]


def assert_close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    scale = max(float(exact.abs().max()), 1e-6)
    assert float((actual.double() - exact).abs().max()) < TOLERANCE * scale


@pytest.fixture
def served(monkeypatch):
    """Which kernels of the CPU engine ran."""
    names = []

    def watched(name, run):
        return lambda *arguments: (names.append(name), run(*arguments))[1]

    for module in (conv_pool, expand_gate, norm, selective_scan):
        for attribute in ("_op", "_backward_op"):
            op = getattr(module, attribute)
            monkeypatch.setattr(op, "run", watched(attribute, op.run))
    return names


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", ["jvp", "dual"])
def test_forward_mode(op, way):
    function, inputs = cases()[op]
    tensors = list(inputs.values())
    up, down = (value_of(function, moved(tensors, step)) for step in (STEP, -STEP))
    tangents = tuple(d.float() for d in directions(tensors))
    if way == "jvp":
        _, found = torch.func.jvp(lambda *t: value_of(function, t), tuple(tensors), tangents)
    else:
        with forward_ad.dual_level():
            pairs = zip(tensors, tangents, strict=True)
            out = value_of(function, [forward_ad.make_dual(t, d) for t, d in pairs])
            found = forward_ad.unpack_dual(out).tangent
    assert_close(found, (up - down) / (2 * STEP))


def assert_second_derivatives(function, exact_function, tensors) -> None:
    """The product of the Hessian and a direction."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    first = gradients(function, leaves, create_graph=True)
    weighted = sum((g * d.to(g)).sum() for g, d in zip(first, directions(tensors), strict=True))
    second = torch.autograd.grad(weighted, leaves)
    up, down = (gradients(exact_function, moved(tensors, step)) for step in (STEP, -STEP))
    for found, above, below in zip(second, up, down, strict=True):
        assert_close(found.cpu(), (above - below) / (2 * STEP))


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives(op):
    function, inputs = cases()[op]
    assert_second_derivatives(function, function, list(inputs.values()))


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_of_triton(op):
    pytest.importorskip("triton")
    engine = engine_of(op)
    _, inputs = on_device(op)
    exact, _ = cases(torch.float64)[op]

    def kernel(*tensors):
        out = engine(*call_of(op, list(tensors)))
        return out[0] if op == "add_norm" else out

    assert_second_derivatives(kernel, exact, list(inputs.values()))


@pytest.mark.parametrize("op", OPS)
def test_transforms_of_torch_func(op, served):
    function, inputs = cases()[op]
    tensors = tuple(inputs.values())
    expected = gradients(function, tensors)
    assert "_backward_op" in served  # the first derivative is the kernel's
    served.clear()
    every = tuple(range(len(tensors)))
    found = torch.func.grad(lambda *t: value_of(function, t), argnums=every)(*tensors)
    for actual, exact in zip(found, expected, strict=True):
        assert_close(actual, exact.double())
    twice = torch.func.vmap(torch.func.grad(lambda x: value_of(function, (x, *tensors[1:]))))(
        torch.stack([tensors[0], tensors[0]])
    )
    assert_close(twice[1], expected[0].double())
    assert served == []  # the definitions alone


@pytest.mark.parametrize("op", OPS)
def test_a_vectorised_jacobian(op):
    function, inputs = cases()[op]
    first, *others = inputs.values()

    def few(x):
        return outputs_of(function(x, *others))[0].flatten()[:3]

    plain, vectorised = (
        torch.autograd.functional.jacobian(few, first, vectorize=way) for way in (False, True)
    )
    assert_close(vectorised, plain.double())


@pytest.mark.parametrize("op", OPS)
def test_a_trace_records_the_op(op):
    """A tracer that sees tensors with data records the op, not what its kernel allocates."""
    function, inputs = cases()[op]
    graph = make_fx(function)(*inputs.values())
    assert f"fastvim.{op}_cpu.default" in {str(node.target) for node in graph.graph.nodes}
    for actual, exact in zip(
        outputs_of(graph(*inputs.values())), outputs_of(function(*inputs.values())), strict=True
    ):
        torch.testing.assert_close(actual, exact)


def test_gpus_of_amd_have_the_definitions(monkeypatch):
    monkeypatch.setattr(dispatch, "_installed", lambda package: True)
    assert dispatch.engine_name("selective_scan", "cuda") == "triton"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for op in OPS:
        assert dispatch.engine_name(op, "cuda") == dispatch.REFERENCE
        assert not dispatch._candidates(
            dispatch.ENGINES[op], None, "cuda", torch.float32, masked=False
        )
    with use_engine("reference"):
        assert dispatch.engine_name("conv_pool", "cuda") == dispatch.REFERENCE
