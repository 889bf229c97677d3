"""The GPU kernels against the references in float64: on a GPU, else in the interpreter."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

pytest.importorskip("triton")

from inputs import (
    DEVICE,
    DTYPES,
    call_of,
    cases,
    conv_inputs,
    engine_of,
    error,
    gate_inputs,
    normal,
    on_device,
    outputs_of,
    probe_backward,
    run_with_gradients,
    scan_inputs,
    to,
)

from fastvim.ops import (
    Traversal,
    add_norm,
    conv_pool,
    engine_name,
    expand_gate,
    selective_scan,
    use_engine,
)
from fastvim.ops.dispatch import OPS
from fastvim.ops.triton import selective_scan_kernels
from fastvim.ops.triton.common import collapse
from fastvim.ops.triton.conv_pool import conv_pool_triton
from fastvim.ops.triton.expand_gate import expand_gate_triton
from fastvim.ops.triton.masked import (
    conv_pool_masked,
    expand_gate_masked,
)
from fastvim.ops.triton.norm import add_norm_triton
from fastvim.ops.triton.selective_scan import selective_scan_triton

ON_GPU = DEVICE == "cuda"
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
# Rows that are shorter than the window, and rows of one, two and four runs with a remainder. Cells
# of few and of several channels.
GRIDS = [(1, 1, 1), (3, 19, 1), (5, 2, 2), (2, 35, 1), (4, 3, 5)]
STEPS = [1, 6, 9]  # of the scan: groups of five, with a remainder
WIDTHS = [6, 40]
SCANS = [(1, 6), (6, 6), (1, 40), (9, 40)]  # those of them that make test runs
if ON_GPU:  # the interpreter would take minutes
    GRIDS += [(1, 7, 1), (7, 1, 1), (7, 9, 1), (14, 14, 1), (197, 1, 1), (4, 49, 1), (3, 300, 1)]
    GRIDS += [(1, 135, 1), (14, 14, 8), (2, 300, 3)]
    STEPS += [7, 17, 33, 63, 196, 197, 3000]
    WIDTHS += [32, 72, 384, 1000, 2560]

# The interpreter rounds to bfloat16 towards zero, unlike a GPU, so that dtype needs a GPU.
HERE = [dtype for dtype in DTYPES if ON_GPU or dtype != torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", HERE, ids=str)


def assert_as_exact(kernel, reference, inputs, dtype: torch.dtype, gradients=True) -> None:
    """Compare every output, and the gradient of every input, with float64.

    The kernel's error may be twice that of the reference in the same dtype.
    """
    inputs = [None if t is None else t.to(DEVICE) for t in to(inputs, dtype)]
    run = run_without_gradients
    if gradients:  # of the same weighted sum in every dtype
        run = functools.partial(run_with_gradients, exact=dtype)
    with use_engine("reference"):
        exact = run(reference, inputs, torch.float64)
        plain = run(reference, inputs, dtype)
    actual = run(kernel, inputs, dtype)
    for number, (e, p, k) in enumerate(zip(exact, plain, actual, strict=True)):
        # Two units in the last place of float32, in which both compute, of the largest value.
        eps = 2 * torch.finfo(torch.float32).eps * float(e.abs().max())
        assert error(k, e) <= 2 * error(p, e) + eps, f"output or gradient {number}"


def run_without_gradients(function, tensors, dtype: torch.dtype):
    with torch.no_grad():
        return [t.double() for t in outputs_of(function(*to(tensors, dtype)))]


def segments_of(path, pool, grid):
    sizes = dict(zip("hwc", grid, strict=True))
    return Traversal(path, pool).over({axis: sizes[axis] for axis in "hwc" if axis in path})


def cells():
    """Every walk over every grid, without those that are launched as another and compute the same.

    With one channel, for instance, "c h w" is "h w".
    """
    found = {}
    for (path, pool), grid in itertools.product(WALKS, GRIDS):
        segments = segments_of(path, pool, grid)
        order = segments.to_path(torch.arange(segments.num_tokens)[None, :, None])
        steps = segments.broadcast(torch.arange(segments.num_segments)[None, None, :, None])
        computed = (*order.flatten().tolist(), *steps.flatten().tolist())
        found.setdefault((computed, repr(collapse(segments))), (path, pool, grid))
    return list(found.values())


each_cell = pytest.mark.parametrize(("path", "pool", "grid"), cells(), ids=str)


@each_cell
@pytest.mark.parametrize("pooling", ["mean", pytest.param("max", marks=pytest.mark.slow)])
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


@each_cell
def test_expand_gate(path, pool, grid):
    check_expand_gate(segments_of(path, pool, grid), torch.float32, norm=True)


@each_dtype
@pytest.mark.parametrize("norm", [True, False])
def test_expand_gate_in_every_dtype(norm, dtype):
    check_expand_gate(segments_of("w h", "h", (3, 7, 1)), dtype, norm)


def check_expand_gate(segments, dtype, norm):
    assert_as_exact(
        lambda *a: expand_gate_triton(*a[:3], segments, *a[3:]),
        lambda *a: expand_gate(*a[:3], segments, *a[3:]),
        gate_inputs(2, segments.num_tokens, segments.num_segments, 40, norm),
        dtype,
    )


@each_dtype
@pytest.mark.parametrize(
    ("steps", "width"),
    [
        pytest.param(*scan, marks=() if ON_GPU or scan in SCANS else pytest.mark.slow)
        for scan in itertools.product(STEPS, WIDTHS)
    ],
)
def test_selective_scan(steps, width, dtype):
    inputs = scan_inputs(2, steps, width, rank=max(3, width // 32))
    assert_as_exact(selective_scan_triton, selective_scan, inputs, dtype)


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize("walk", selective_scan_kernels.WALKS[::3], ids=str)
def test_chunks_of_a_sequence(walk, dtype, monkeypatch, forget_launches):
    """17 steps in chunks of 5 and a remainder. A lane holds all states of a channel, or a part."""
    monkeypatch.setattr(selective_scan_kernels, "WALKS", (walk,))
    monkeypatch.setattr(selective_scan_kernels, "LONG", 8)
    monkeypatch.setattr(selective_scan_kernels, "SHORTEST", 4)
    inputs = scan_inputs(1, 17, 40)
    assert_as_exact(selective_scan_triton, selective_scan, inputs, dtype)


KEPT = [[0, 1, 5, 10, 11], [2, 3, 4, 5, 7]]  # of 4 x 3 cells, with empty rows and columns


@each_dtype
@pytest.mark.parametrize("mirror", ["published", "exact"])
@pytest.mark.parametrize(("path", "pool"), [("h w", "w"), ("w h", "h"), ("w h", "w"), ("h w", "")])
def test_kept_cells(path, pool, mirror, dtype):
    kept = torch.tensor(KEPT, device=DEVICE).T.contiguous().T  # not contiguous
    segments = Traversal(path, pool).over({"h": 4, "w": 3}, kept, mirror)
    assert_as_exact(
        lambda *a: conv_pool_masked(*a, segments, pool_scale=0.25),
        lambda *a: conv_pool(*a, segments, pool_scale=0.25),
        conv_inputs(2, 5, 136),
        dtype,
    )
    assert_as_exact(
        lambda *a: expand_gate_masked(*a[:3], segments, *a[3:]),
        lambda *a: expand_gate(*a[:3], segments, *a[3:]),
        gate_inputs(2, 5, segments.num_segments, 136),
        dtype,
    )


@pytest.mark.parametrize("scattered", [("h w c", "w"), ("h w c", "w c"), ("c h w", "w")])
def test_kept_cells_of_scattered_segments(scattered):
    grid = {"h": 3, "w": 2, "c": 2}
    kept = torch.stack([torch.randperm(12)[:7].sort().values for _ in range(2)]).to(DEVICE)
    segments = Traversal(*scattered).over(grid, kept)
    assert_as_exact(
        lambda *a: conv_pool_masked(*a, segments),
        lambda *a: conv_pool(*a, segments),
        conv_inputs(2, 7, 8),
        torch.float32,
    )


@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(width, dtype):
    segments = segments_of("h w", "w", (3, 5, 1))
    assert_as_exact(
        lambda *a: conv_pool_triton(*a, segments),
        lambda *a: conv_pool(*a, segments),
        conv_inputs(2, 15, width),
        dtype,
    )
    assert_as_exact(
        lambda *a: expand_gate_triton(*a[:3], segments, *a[3:]),
        lambda *a: expand_gate(*a[:3], segments, *a[3:]),
        gate_inputs(2, 15, 3, width),
        dtype,
    )


@each_dtype
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("width", [24, *WIDTHS])
def test_add_norm(width, kind, first, dtype):
    inputs = [normal(2, 7, width, seed=1), None if first else normal(2, 7, width, seed=2)]
    inputs += [normal(width, seed=3), normal(width, seed=4)]
    assert_as_exact(
        lambda *a: add_norm_triton(*a, kind=kind), lambda *a: add_norm(*a, kind=kind), inputs, dtype
    )


@each_dtype
def test_strides_do_not_matter(dtype):
    """x and z are halves of one tensor, y and u transposed, weights rows of larger ones."""
    segments = segments_of("w h", "h", (3, 5, 1))
    x, weight, bias, D = to(conv_inputs(2, 15, 40), dtype)
    skip, z, y, *norm = to(gate_inputs(2, 15, 5, 40), dtype)
    u, *parameters = to(scan_inputs(2, 5, 40), dtype)
    apart = [
        lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
        lambda t: torch.stack([t, t], -1)[:, 0] if t.ndim == 1 else t.mT.contiguous().mT,
    ]

    def run(move):
        tensors = [x, weight, bias, D, skip, z, y, *norm, u, *parameters]
        x_, weight_, bias_, D_, skip_, z_, y_, *rest = (move(t.to(DEVICE)) for t in tensors)
        return [
            *conv_pool_triton(x_, weight_, bias_, D_, segments),
            expand_gate_triton(skip_, z_, y_, segments, *rest[:2]),
            selective_scan_triton(*rest[2:]),
            *add_norm_triton(x_, skip_, *rest[:2]),
        ]

    expected = run(lambda t: t.contiguous())
    for move in apart:
        for actual, wanted in zip(run(move), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_give_the_same_bits(op):
    _, inputs = on_device(op)
    engine = engine_of(op)
    first, second = (
        run_with_gradients(lambda *t: engine(*call_of(op, list(t))), inputs.values(), torch.float32)
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("op", "wanted"), [(op, name) for op in OPS for name in cases()[op][1]])
def test_a_gradient_of_one_input_alone(op, wanted):
    _, inputs = on_device(op)
    engine = engine_of(op)

    def run(names):
        leaves = {n: t.clone().requires_grad_(n in names) for n, t in inputs.items()}
        outputs = outputs_of(engine(*call_of(op, list(leaves.values()))))
        probe_backward(outputs)
        return leaves[wanted].grad

    assert torch.equal(run([wanted]), run(list(inputs)))


@pytest.mark.parametrize("op", OPS)
def test_serves_gpus(op):
    assert engine_name(op, "cuda", torch.bfloat16) == "triton"
    assert engine_name(op, "cuda", torch.float64) == "reference"


def test_rows_that_no_number_of_runs_divides():
    """135 tokens fill 15 of 16 runs of 9."""
    check_conv_pool(segments_of("h w", "w", (1, 135, 1)), torch.float32, "mean")


def test_narrow_and_wide_windows():
    segments = segments_of("h w", "w", (3, 5, 1))
    x, weight, *rest = (t.to(DEVICE).float() for t in conv_inputs(2, 15, 8))
    with torch.no_grad():
        expected = conv_pool(x, weight[..., :3], *rest, segments)
        torch.testing.assert_close(conv_pool_triton(x, weight[..., :3], *rest, segments), expected)
        with pytest.raises(ValueError, match="8 taps"):
            conv_pool_triton(x, torch.cat([weight, weight], -1), *rest, segments)


def test_empty_batch():
    segments = segments_of("h w", "w", (3, 5, 1))
    inputs = [t.to(DEVICE) for t in conv_inputs(0, 15, 8)]
    pooled, skip = conv_pool_triton(*inputs, segments)
    assert (pooled.shape, skip.shape) == ((2, 0, 3, 8), (0, 15, 8))
