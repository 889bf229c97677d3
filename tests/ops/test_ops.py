"""The four ops against numpy in float64: the definitions in every dtype, and the numba engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from definitions import add_norm as numpy_add_norm
from definitions import conv_pool as numpy_conv_pool
from definitions import convolve, scan, silu, walk
from definitions import expand_gate as numpy_expand_gate
from definitions import selective_scan as numpy_selective_scan
from inputs import (
    DTYPES,
    ENGINES,
    WALKS,
    cases,
    conv_inputs,
    error,
    gate_inputs,
    normal,
    run_with_gradients,
    scan_inputs,
    to,
)

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
    """Within what one rounding of the result, and sums in float32 or better, can do."""
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
        # The stream keeps float32 whatever the dtype of the blocks.
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
            out = conv_pool(*inputs, segments, pooling=pooling, pool_scale=0.25)
        expected = numpy_conv_pool(*as_numpy(inputs), [walk(path, pool, grid)] * 2, pooling, 0.25)
        assert_close_to_numpy(out, expected, dtype)


@each_engine
@each_dtype
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("path", "pool"), WALKS)
def test_expand_gate(path, pool, norm, dtype, engine):
    for height, width in GRIDS:
        grid = {"h": height, "w": width}
        segments = Traversal(path, pool).over(grid)
        inputs = to(gate_inputs(2, height * width, segments.num_segments, norm=norm), dtype)
        with use_engine(engine):
            out = expand_gate(*inputs[:6], segments, *inputs[6:])
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
    assert_close_to_numpy(conv_pool(*inputs, segments), expected, dtype)


@each_engine
@each_dtype
@pytest.mark.parametrize("steps", STEPS)
def test_selective_scan(steps, dtype, engine):
    inputs = to(scan_inputs(2, steps, 6), dtype)
    with use_engine(engine):
        out = selective_scan(*inputs)
    assert_close_to_numpy(out, numpy_selective_scan(*as_numpy(inputs)), dtype)


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
                lambda *a, s=segments: expand_gate(*a[:6], s, *a[6:]),
                gate_inputs(2, segments.num_tokens, segments.num_segments, 2, norm),
            )
            for segments in (GRID, TOKENS, MASKED)
            for norm in (True, False)
        ),
        *((selective_scan, scan_inputs(2, steps, 2, states=2, rank=1)) for steps in (1, 3)),
    ],
)
def test_gradients_of_the_definitions(function, inputs):
    leaves = tuple(to(inputs, torch.float64, grad=True))
    assert torch.autograd.gradcheck(function, leaves)


# Under a mask.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mirror", ["published", "exact"])
@pytest.mark.parametrize(("path", "pool"), WALKS[:2])
def test_a_masked_layer_is_that_of_section_5(path, pool, mirror, dtype):
    grid, kept = {"h": 4, "w": 3}, [[0, 1, 5, 10, 11], [2, 3, 4, 5, 7]]  # empty rows and columns
    width, states, rank = 5, 3, 2
    x, weight, bias = to(conv_inputs(2, 5, width), dtype)
    z, D = to([normal(2, 5, width, seed=4), normal(2, width, seed=5)], dtype)
    x_proj = normal(2, rank + 2 * states, width, seed=6).to(dtype)
    dt_proj, dt_bias, A_log = to(scan_inputs(2, 1, width, states, rank)[4:], dtype)

    segments = Traversal(path, pool).over(grid, torch.tensor(kept), mirror)
    pooled = conv_pool(x, weight, bias, segments)
    parts = (pooled @ x_proj.mT[:, None]).split([rank, states, states], dim=-1)
    y = selective_scan(pooled, *parts, dt_proj, dt_bias, A_log)
    actual = expand_gate(x, z, y, weight, bias, D, segments)

    parameters = as_numpy([weight, bias, x_proj, dt_proj, dt_bias, A_log, D])
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
            conv_w, conv_b, projection, *scan_parameters, skip = (p[direction] for p in parameters)
            values = convolve(sequence[walked], conv_w, conv_b)
            steps = np.zeros((forward.num_segments, width))
            for value, s in zip(values, used, strict=True):
                steps[s] += value / forward.segment_size
            steps = steps[::ascending]
            dt, B, C = np.split(steps @ projection.T, [rank, rank + states], axis=1)
            scanned = scan(steps, dt, B, C, *scan_parameters)[::ascending]
            for value, token, s in zip(values, walked, used, strict=True):
                mixed[token] += (scanned[s] + skip * value) / 2
        expected.append(mixed)
    assert_close_to_numpy(actual, np.stack(expected) * silu(z.double().numpy()), dtype)


@each_engine
def test_strides_do_not_matter(engine):
    """x and z are halves of one tensor, dt, B and C parts of another; y and u are transposed."""
    batch, states, rank, width = 2, 4, 3, 72
    grid = {"h": 3, "w": 5}
    *_, weight, bias = conv_inputs(batch, 15, width)
    *_, dt_proj, dt_bias, A_log = scan_inputs(batch, 5, width, states, rank)
    D = normal(2, width, seed=6)
    segments = Traversal("w h", "h").over(grid)

    def mixer(contiguous: bool):
        shapes = (batch, 15, 2 * width), (2, batch, 5, rank + 2 * states), (2, width, 5, batch)
        xz, dtBC, u = to([normal(*shape) for shape in shapes], torch.float32, grad=True)
        parts = [*xz.chunk(2, -1), *dtBC.split([rank, states, states], -1), u.permute(0, 3, 2, 1)]
        assert not any(part.is_contiguous() for part in parts)
        parts = [part.contiguous() if contiguous else part for part in parts]
        x, z, dt, B, C, u_scan = parts
        parameters = [t.float() for t in (weight, bias, dt_proj, dt_bias, A_log, D)]
        pooled = conv_pool(x, *parameters[:2], segments)
        y = selective_scan(u_scan + pooled, dt, B, C, *parameters[2:5])
        y = y.mT.contiguous().mT if not contiguous else y
        out = expand_gate(x, z, y, *parameters[:2], parameters[5], segments)
        (out.mT * torch.arange(15.0)).sum().backward()
        return out, xz.grad, dtBC.grad, u.grad

    with use_engine(engine):
        for strided, contiguous in zip(mixer(False), mixer(True), strict=True):
            torch.testing.assert_close(strided, contiguous, rtol=1e-5, atol=1e-6)


# What holds for each op alike, by name.


@each_engine
@each_op
def test_an_empty_batch(op, engine):
    function, inputs = cases(batch=0)[op]
    out, *gradients = run_with_gradients(function, inputs.values(), torch.float32, engine)
    assert out.numel() == 0
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
            out = function(*leaves)
    out.backward(normal(*out.shape, seed=99).float())
    assert out.dtype == torch.float32
    for mine, expected in zip([out, *(x.grad for x in leaves)], plain, strict=True):
        assert torch.equal(mine.double(), expected)


@each_op
def test_half_tokens_meet_float32_parameters(op):
    """Under autocast the tokens come in bfloat16 and the parameters stay in float32."""
    function, inputs = cases()[op]
    first, *_ = inputs
    mixed = [t.bfloat16() if name == first else t for name, t in inputs.items()]
    exact = function(*(t.double() for t in mixed))
    out = function(*mixed)
    assert out.dtype == torch.bfloat16
    assert error(out.double(), exact) <= torch.finfo(torch.bfloat16).eps * float(exact.abs().max())


@pytest.mark.parametrize(("op", "name"), [(op, n) for op in OPS for n in cases()[op][1]])
def test_a_bad_shape_is_named(op, name):
    function, inputs = cases()[op]
    if name in ("hidden", "x", "u"):
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
        (lambda x: selective_scan(x, *[x] * 6), r"u \(2, 15, 6\)"),
        (lambda x: add_norm(x.long(), None, torch.ones(6)), "torch.int64"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(2, 15, 6))
