"""The four ops against numpy in float64: the reference in every dtype, and the numba engine."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from inputs import (
    DTYPES,
    ENGINES,
    WALKS,
    cases,
    conv_inputs,
    error,
    gate_inputs,
    normal,
    outputs_of,
    probe_backward,
    run_with_gradients,
    scan_inputs,
    to,
)
from naive import add_norm as numpy_add_norm
from naive import conv_pool as numpy_conv_pool
from naive import convolve, scan, silu, walk
from naive import expand_gate as numpy_expand_gate
from naive import selective_scan as numpy_selective_scan

from fastvim.ops import (
    Traversal,
    add_norm,
    conv_pool,
    expand_gate,
    selective_scan,
    use_engine,
)

# Lengths 1, 7, 63, 196 and 197, as grids that are square, not square and thin.
GRIDS = [(1, 1), (1, 7), (7, 1), (7, 9), (14, 14), (4, 49), (197, 1)]
# Steps below, at, across and far above the chunk of 16 after which the scan's kernel restarts.
STEPS = [1, 7, 15, 16, 17, 32, 63, 196, 197]
OPS = list(cases())

each_op = pytest.mark.parametrize("op", OPS)
each_engine = pytest.mark.parametrize("engine", ENGINES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)


def as_numpy(tensors):
    return [None if t is None else t.double().numpy() for t in tensors]


def assert_close_to_numpy(actual: torch.Tensor, expected, dtype: torch.dtype) -> None:
    """Equal up to one rounding of the result, and sums in float32 or better."""
    expected = torch.from_numpy(expected)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    precision = max(torch.finfo(dtype).eps, 1e-13)
    bound = 4 * precision * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
    # Sums in float32, over up to 200 tokens and through the norm of a few channels.
    bound = bound if dtype != torch.float32 else 8 * bound
    assert error(actual.double(), expected) <= bound


@each_dtype
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_norm(kind, with_bias, with_residual, dtype):
    for length in (0, 1, 7, 197):
        inputs = to(
            [
                normal(2, length, 6, seed=1),
                normal(2, length, 6, seed=2) if with_residual else None,
                1 + normal(6, scale=0.2, seed=3),
                normal(6, seed=4) if with_bias else None,
            ],
            dtype,
        )
        normed, total = add_norm(*inputs, kind=kind)
        expected_norm, expected_total = numpy_add_norm(*as_numpy(inputs), kind)
        assert_close_to_numpy(normed, expected_norm, dtype)
        # The residual stream is float32 for any dtype of the blocks.
        stream = torch.float64 if dtype == torch.float64 else torch.float32
        assert_close_to_numpy(total, expected_total, stream)


def test_add_norm_keeps_a_float32_stream_under_half_inputs():
    hidden, residual = normal(2, 5, 6).half(), normal(2, 5, 6, seed=1).float() * (1 + 1e-5)
    normed, total = add_norm(hidden, residual, torch.ones(6))
    assert torch.equal(total, residual + hidden.float())
    assert (normed.dtype, total.dtype) == (torch.float16, torch.float32)


@each_engine
@each_dtype
@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize(("path", "pool"), WALKS)
def test_conv_pool(path, pool, pooling, dtype, engine):
    for height, width in GRIDS:
        grid = {"h": height, "w": width}
        inputs = to(conv_inputs(2, height * width), dtype)
        segments = Traversal(path, pool).over(grid)
        with use_engine(engine):
            outputs = conv_pool(*inputs, segments, pooling=pooling, pool_scale=0.25)
        expected = numpy_conv_pool(*as_numpy(inputs), [walk(path, pool, grid)] * 2, pooling, 0.25)
        for out, exact in zip(outputs, expected, strict=True):
            assert_close_to_numpy(out, exact, dtype)


@each_dtype
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("path", "pool"), WALKS)
def test_expand_gate(path, pool, norm, dtype):
    for height, width in GRIDS:
        grid = {"h": height, "w": width}
        segments = Traversal(path, pool).over(grid)
        inputs = to(gate_inputs(2, height * width, segments.num_segments, norm=norm), dtype)
        out = expand_gate(*inputs[:3], segments, *inputs[3:])
        *tensors, norm_weight, norm_bias = as_numpy(inputs)
        walks = [walk(path, pool, grid)] * 2
        expected = numpy_expand_gate(*tensors, walks, norm_weight, norm_bias)
        assert_close_to_numpy(out, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_a_convolution_of_any_width(taps, dtype):
    segments = Traversal("w h").over({"h": 2, "w": 2})  # also one wider than the sequence
    inputs = to(conv_inputs(1, 4, taps=taps), dtype)
    expected = numpy_conv_pool(*as_numpy(inputs), [walk("w h", "", {"h": 2, "w": 2})])
    for out, exact in zip(conv_pool(*inputs, segments), expected, strict=True):
        assert_close_to_numpy(out, exact, dtype)


@each_engine
@each_dtype
@pytest.mark.parametrize("steps", STEPS)
def test_selective_scan(steps, dtype, engine):
    inputs = to(scan_inputs(2, steps, 6), dtype)
    with use_engine(engine):
        out = selective_scan(*inputs)
    assert_close_to_numpy(out, numpy_selective_scan(*as_numpy(inputs)), dtype)


@each_engine
@pytest.mark.parametrize("parameters", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_scan_of_halves_rounds_its_result_alone(dtype, parameters, engine):
    """Step sizes, B and C are float32 for any dtype of the tokens and parameters."""
    u, *rest = scan_inputs(2, 63, 72)
    inputs = [*to([u], dtype), *to(rest, parameters)]
    exact = selective_scan(*to(inputs, torch.float64))
    with use_engine(engine):
        out = selective_scan(*inputs)
    assert out.dtype == dtype
    largest = float(exact.abs().max())
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
    sums = 8 * torch.finfo(torch.float32).eps * largest
    assert ((out.double() - exact).abs() <= rounding + sums).all()


GRID = Traversal("w h", "h").over({"h": 2, "w": 3})
TOKENS = Traversal("h w").over({"h": 2, "w": 3})
MASKED = Traversal("w h", "h").over(
    {"h": 2, "w": 3}, torch.tensor([[0, 2, 3], [1, 4, 5]]), "published"
)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        *(
            (lambda *a, k=kind: add_norm(*a, kind=k), (normal(2, 3, 4), residual, *affine))
            for kind in ("rms", "layer")
            for residual in (normal(2, 3, 4, seed=1), None)
            for affine in ((normal(4, seed=2), normal(4, seed=3)), (normal(4, seed=2),))
        ),
        *(
            (
                lambda *a, s=segments, p=pooling: conv_pool(*a, s, pooling=p, pool_scale=0.5),
                conv_inputs(2, segments.num_tokens, 2, taps=3),
            )
            for segments in (GRID, TOKENS, MASKED)
            for pooling in ("mean", "max")
        ),
        *(
            (
                lambda *a, s=segments: expand_gate(*a[:3], s, *a[3:]),
                gate_inputs(2, segments.num_tokens, segments.num_segments, 2, norm),
            )
            for segments in (GRID, TOKENS, MASKED)
            for norm in (True, False)
        ),
        *((selective_scan, scan_inputs(2, steps, 2, states=2, rank=1)) for steps in (1, 3)),
    ],
)
def test_gradients_of_the_references(function, inputs):
    leaves = tuple(to(inputs, torch.float64, grad=True))
    assert torch.autograd.gradcheck(function, leaves)


# Under a mask.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mirror", ["published", "exact"])
@pytest.mark.parametrize(("path", "pool"), WALKS[:2])
def test_a_masked_layer_against_numpy(path, pool, mirror, dtype):
    grid, kept = {"h": 4, "w": 3}, [[0, 1, 5, 10, 11], [2, 3, 4, 5, 7]]  # empty rows and columns
    width, states, rank = 5, 3, 2
    x, weight, bias, D = to(conv_inputs(2, 5, width), dtype)
    z = normal(2, 5, width, seed=4).to(dtype)
    _, *scan_parameters = to(scan_inputs(2, 1, width, states, rank), dtype)

    segments = Traversal(path, pool).over(grid, torch.tensor(kept), mirror)
    pooled, skip = conv_pool(x, weight, bias, D, segments)
    y = selective_scan(pooled, *scan_parameters)
    actual = expand_gate(skip, z, y, segments)

    parameters = as_numpy([weight, bias, *scan_parameters, D])
    expected = []
    for sequence, cells in zip(x.double().numpy(), kept, strict=True):
        forward = walk(path, pool, grid, cells)
        order, own = forward.order, forward.segments[0]
        directions = [(order, own, 1)]
        if mirror == "published":  # token n-1-j at position j, in the segment of token j
            directions.append((order[::-1], own, 1))
        else:
            directions.append((order[::-1], own[::-1], -1))
        mixed = np.zeros_like(sequence)
        for direction, (walked, used, ascending) in enumerate(directions):
            conv_w, conv_b, projection, *rest, skip = (p[direction] for p in parameters)
            values = convolve(sequence[walked], conv_w, conv_b)
            steps = np.zeros((forward.num_segments, width))
            for value, s in zip(values, used, strict=True):
                steps[s] += value / forward.segment_size
            steps = steps[::ascending]
            dt, B, C = np.split(steps @ projection.T, [rank, rank + states], axis=1)
            scanned = scan(steps, dt, B, C, *rest)[::ascending]
            for value, token, s in zip(values, walked, used, strict=True):
                mixed[token] += (scanned[s] + skip * value) / 2
        expected.append(mixed)
    assert_close_to_numpy(actual, np.stack(expected) * silu(z.double().numpy()), dtype)


@each_engine
def test_strides_do_not_matter(engine):
    """x and z are halves of one tensor, x_proj a part of another; u is transposed.

    So are y and the skip. (A transposed x_proj would be summed in another order.)
    """
    batch, rows, width = 2, 3 + 2 * 4, 72
    grid = {"h": 3, "w": 5}
    _, *conv_parameters = to(conv_inputs(batch, 15, width), torch.float32)
    _, _, *scan_parameters = to(scan_inputs(batch, 5, width), torch.float32)
    segments = Traversal("w h", "h").over(grid)

    def mixer(contiguous: bool):
        shapes = (batch, 15, 2 * width), (2, rows, width + 3), (2, width, 5, batch)
        xz, x_proj, u = (normal(*shape) for shape in shapes)
        xz, x_proj, u = to([xz, width**-0.5 * x_proj, u], torch.float32, grad=True)
        parts = [*xz.chunk(2, -1), x_proj[..., 1:-2], u.permute(0, 3, 2, 1)]
        assert not any(part.is_contiguous() for part in parts)
        parts = [part.contiguous() if contiguous else part for part in parts]
        x, z, projection, u_scan = parts
        pooled, skip = conv_pool(x, *conv_parameters, segments)
        y = selective_scan(u_scan + pooled, projection, *scan_parameters)
        parts = [t.contiguous() if contiguous else t.mT.contiguous().mT for t in (skip, y)]
        assert all(part.is_contiguous() == contiguous for part in parts)
        skip, y = parts
        out = expand_gate(skip, z, y, segments)
        (out.mT * torch.arange(15.0)).sum().backward()
        return out, xz.grad, x_proj.grad, u.grad

    with use_engine(engine):
        for strided, contiguous in zip(mixer(False), mixer(True), strict=True):
            torch.testing.assert_close(strided, contiguous, rtol=1e-5, atol=1e-6)


# Properties of every op.


@each_engine
@each_op
def test_an_empty_batch(op, engine):
    function, inputs = cases(batch=0)[op]
    results = run_with_gradients(function, inputs.values(), torch.float32, engine)
    outputs, gradients = results[: -len(inputs)], results[-len(inputs) :]
    assert outputs
    assert not any(out.numel() for out in outputs)
    for gradient, tensor in zip(gradients, inputs.values(), strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


@each_engine
@each_op
def test_autocast_does_not_reach_inside(op, engine):
    function, inputs = cases()[op]
    plain = run_with_gradients(function, inputs.values(), torch.float32, engine)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = to(inputs.values(), torch.float32, grad=True)
        with use_engine(engine):
            outputs = outputs_of(function(*leaves))
    assert all(out.dtype == torch.float32 for out in outputs)
    probe_backward(outputs)
    for mine, expected in zip([*outputs, *(x.grad for x in leaves)], plain, strict=True):
        assert torch.equal(mine.double(), expected)


@each_op
def test_half_tokens_meet_float32_parameters(op):
    """Under autocast tokens are bfloat16 and parameters float32."""
    function, inputs = cases()[op]
    first, *_ = inputs
    mixed = [t.bfloat16() if name == first else t for name, t in inputs.items()]
    exact_outputs = outputs_of(function(*(t.double() for t in mixed)))
    for out, exact in zip(outputs_of(function(*mixed)), exact_outputs, strict=True):
        assert out.dtype == torch.bfloat16
        bound = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
        assert error(out.double(), exact) <= bound


@pytest.mark.parametrize(("op", "name"), [(op, n) for op in OPS for n in cases()[op][1]])
def test_a_bad_shape_is_named(op, name):
    function, inputs = cases()[op]
    if name in ("hidden", "x", "skip", "u"):
        bad = inputs[name][..., :5] if op == "selective_scan" else inputs[name][:, :7, :5]
    elif name.endswith("weight") and inputs[name].ndim == 3:
        bad = inputs[name][:, :1]  # one channel, of as many taps
    else:
        bad = inputs[name][..., :1]  # would broadcast, and compute something else
    with pytest.raises(ValueError, match=r"\(.*\).*expected") as caught:
        function(*(bad if n == name else t for n, t in inputs.items()))
    shapes = [str(tuple(t.shape)) for t in (bad, *inputs.values())]
    assert any(shape in str(caught.value) for shape in shapes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: add_norm(x, None, torch.ones(6), kind="batch"), "kind='batch'"),
        (lambda x: conv_pool(x, *conv_inputs(2, 15)[1:], TOKENS, pooling="sum"), "pooling='sum'"),
        (lambda x: conv_pool(x, *conv_inputs(2, 15)[1:], TOKENS), r"\(2, 15, 6\).*\(B, 6, E\)"),
        *(
            (
                lambda x, D=D: conv_pool(x[:, :6], *conv_inputs(2, 6)[1:3], D, GRID),
                rf"^D {re.escape(str(tuple(D.shape)))}: expected \(2, 6\)$",
            )
            for D in (torch.ones(6), torch.ones(1, 6), torch.ones(2, 1), torch.ones(2, 6, 1))
        ),
        *(
            (
                lambda x, s=skip: expand_gate(s, *gate_inputs(2, 6, 3)[1:3], GRID),
                rf"^skip {re.escape(str(tuple(skip.shape)))}: expected \(B, 6, E\)$",
            )
            for skip in (torch.ones(2, 15, 6), torch.ones(6, 6), torch.ones(2, 1, 6))
        ),
        (lambda x: selective_scan(x, *[x] * 4), r"u \(2, 15, 6\)"),
        *(
            (
                lambda x, w=shape: selective_scan(
                    x[:, None], torch.ones(w), *scan_inputs(1, 15, 6)[2:]
                ),
                rf"^x_proj {re.escape(str(shape))}: expected \(2, 11, 6\)$",
            )
            for shape in (
                *((11, 6), (1, 11, 6), (2, 6, 11), (2, 11, 1), (2, 11, 6, 1)),
                *((2, 1, 6), (2, 3, 6), (2, 7, 6), (2, 8, 6), (2, 10, 6), (2, 12, 6)),
            )
        ),
        (lambda x: add_norm(x.long(), None, torch.ones(6)), "torch.int64"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(2, 15, 6))
