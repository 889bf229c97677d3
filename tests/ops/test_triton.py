"""The GPU kernels against the definitions in float64: on a GPU, else in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from inputs import DTYPES, conv_inputs, error, gate_inputs, normal, scan_inputs, to

from fastvim.ops import Traversal, add_norm, conv_pool, expand_gate, selective_scan, use_engine
from fastvim.ops.triton.conv_pool import conv_pool_triton
from fastvim.ops.triton.expand_gate import expand_gate_triton
from fastvim.ops.triton.norm import add_norm_triton
from fastvim.ops.triton.selective_scan import selective_scan_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WALKS = [
    ("h w", "w"),
    ("w h", "h"),
    ("h w", ""),
    ("h w c", "w"),
    ("w h c", "h"),
    ("c h w", "w"),
    ("c w h", "h"),
    ("h w c", "w c"),
    ("w h c", "h c"),
    ("h w c", "h w"),
    ("h w c", ""),
]
# Rows shorter than the window, longer than what a program walks, and no multiple of it.
GRIDS = [(1, 1, 1), (3, 19, 1), (5, 2, 2)]

# The interpreter rounds to bfloat16 towards zero, unlike a GPU: that dtype needs one.
HERE = [dtype for dtype in DTYPES if DEVICE == "cuda" or dtype != torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", HERE, ids=str)
each_walk = pytest.mark.parametrize(("path", "pool"), WALKS)
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def assert_as_exact(kernel, definition, inputs, dtype: torch.dtype) -> None:
    """Rule 9: at most twice the error of plain PyTorch in the same dtype."""
    inputs = [None if t is None else t.to(DEVICE) for t in to(inputs, dtype)]
    doubles = [None if t is None else t.double() for t in inputs]
    with torch.no_grad(), use_engine("reference"):
        exact, plain, actual = definition(*doubles), definition(*inputs), kernel(*inputs)
    many = exact if isinstance(exact, tuple) else (exact,)
    for e, p, k in zip(
        many,
        plain if isinstance(plain, tuple) else (plain,),
        actual if isinstance(actual, tuple) else (actual,),
        strict=True,
    ):
        assert k.dtype == p.dtype
        assert k.shape == p.shape
        # Two units in the last place of float32, in which both compute, of the largest value.
        eps = 2 * torch.finfo(torch.float32).eps * float(e.abs().max())
        assert error(k, e) <= 2 * error(p, e) + eps


def segments_of(path, pool, grid):
    sizes = dict(zip("hwc", grid, strict=True))
    return Traversal(path, pool).over({axis: sizes[axis] for axis in "hwc" if axis in path})


@each_grid
@each_walk
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_conv_pool(path, pool, grid, pooling):
    segments = segments_of(path, pool, grid)
    check_conv_pool(segments, torch.float32, pooling)


@each_dtype
@pytest.mark.parametrize("pool", ["w", ""])
def test_conv_pool_in_every_dtype(pool, dtype):
    check_conv_pool(segments_of("h w", pool, (3, 7, 1)), dtype, "mean")


def check_conv_pool(segments, dtype, pooling):
    options = {"pooling": pooling, "pool_scale": 0.5}
    assert_as_exact(
        lambda *a: conv_pool_triton(*a, segments, **options),
        lambda *a: conv_pool(*a, segments, **options),
        conv_inputs(2, segments.num_tokens, 40),
        dtype,
    )


@each_grid
@each_walk
def test_expand_gate(path, pool, grid):
    check_expand_gate(segments_of(path, pool, grid), torch.float32, norm=True)


@each_dtype
@pytest.mark.parametrize("norm", [True, False])
def test_expand_gate_in_every_dtype(norm, dtype):
    check_expand_gate(segments_of("w h", "h", (3, 7, 1)), dtype, norm)


def check_expand_gate(segments, dtype, norm):
    assert_as_exact(
        lambda *a: expand_gate_triton(*a[:6], segments, *a[6:]),
        lambda *a: expand_gate(*a[:6], segments, *a[6:]),
        gate_inputs(2, segments.num_tokens, segments.num_segments, 40, norm),
        dtype,
    )


@each_dtype
@pytest.mark.parametrize("steps", [1, 7, 33, 63])  # one chunk, and several
@pytest.mark.parametrize("width", [6, 72])
def test_selective_scan(steps, width, dtype):
    inputs = scan_inputs(2, steps, width)
    assert_as_exact(selective_scan_triton, selective_scan, inputs, dtype)


@each_dtype
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("first", [True, False])
def test_add_norm(kind, first, dtype):
    inputs = [normal(2, 7, 24, seed=1), None if first else normal(2, 7, 24, seed=2)]
    inputs += [normal(24, seed=3), normal(24, seed=4)]
    assert_as_exact(
        lambda *a: add_norm_triton(*a, kind=kind), lambda *a: add_norm(*a, kind=kind), inputs, dtype
    )


def test_narrow_and_wide_windows():
    segments = segments_of("h w", "w", (3, 5, 1))
    x, weight, bias = (t.to(DEVICE) for t in conv_inputs(2, 15, 8))
    with torch.no_grad():
        expected = conv_pool(x, weight[..., :3], bias, segments)
        torch.testing.assert_close(conv_pool_triton(x, weight[..., :3], bias, segments), expected)
        with pytest.raises(ValueError, match="8 taps"):
            conv_pool_triton(x, torch.cat([weight, weight], -1), bias, segments)


def test_empty_batch():
    segments = segments_of("h w", "w", (3, 5, 1))
    x, weight, bias = (t.to(DEVICE) for t in conv_inputs(0, 15, 8))
    assert conv_pool_triton(x, weight, bias, segments).shape == (2, 0, 3, 8)
