"""The numba engine: errors beside plain PyTorch's, NaN and inf, threads, forks, registration.

Errors are compared by ratio: a kernel may be twice as far from float64 as plain PyTorch in the same
dtype is, and no further.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from inputs import (
    DTYPES,
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
from torch.library import opcheck
from torch.utils.data import DataLoader, Dataset

from fastvim.ops import Traversal, add_norm, conv_pool, expand_gate, selective_scan
from fastvim.ops.cpu import threads as cpu_threads
from fastvim.ops.dispatch import ENGINES as SERVED
from fastvim.ops.dispatch import OPS, resolve

for engines in SERVED.values():
    resolve(engines[0].function)  # registers the ops

# Lengths 1, 7, 63, 196 and 197, with channels that fill part of a block of 64, all of it, or run
# into a second and a third; steps below, at and across the chunk of 16 of the scan's backward pass.
SCANS = [(1, 72), (7, 130), (15, 64), (16, 72), (17, 130), (32, 6), (63, 72), (196, 6), (197, 72)]
GRIDS = [((1, 1), 72), ((1, 7), 130), ((7, 1), 64), ((7, 9), 72), ((14, 14), 6), ((197, 1), 6)]


def assert_as_exact_as_plain_pytorch(function, inputs, dtype: torch.dtype) -> None:
    """Every output, and the gradient of every input."""
    inputs = to(inputs, dtype)
    exact = run_with_gradients(function, inputs, torch.float64)
    plain = run_with_gradients(function, inputs, dtype, "reference")
    kernel = run_with_gradients(function, inputs, dtype, "numba")
    assert_errors_at_most_twice(kernel, plain, exact)


def assert_errors_at_most_twice(kernel, plain, exact) -> None:
    for number, (e, p, k) in enumerate(zip(exact, plain, kernel, strict=True)):
        # Two units in the last place of the largest value: both sum in float32 but in other orders,
        # and the kernel's exponential rounds its argument to base 2 first.
        eps = 2 * torch.finfo(torch.float32).eps * float(e.abs().max())
        assert error(k, e) <= 2 * error(p, e) + eps, f"output or gradient {number}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("steps", "width"), SCANS)
def test_errors_of_the_scan(steps, width, dtype):
    assert_as_exact_as_plain_pytorch(selective_scan, scan_inputs(3, steps, width), dtype)


@pytest.mark.parametrize(("steps", "width"), SCANS)
def test_errors_of_a_scan_of_small_steps(steps, width):
    """The state outlives a chunk."""
    u, x_proj, dt_proj, dt_bias, A_log = scan_inputs(3, steps, width)
    inputs = (u, x_proj, dt_proj, dt_bias - 3, A_log)
    assert_as_exact_as_plain_pytorch(selective_scan, inputs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "width"), GRIDS)
@pytest.mark.parametrize(("path", "pool"), WALKS)
@pytest.mark.parametrize("norm", [True, False])
def test_errors_of_the_gate(path, pool, grid, width, norm, dtype):
    height, across = grid
    segments = Traversal(path, pool).over({"h": height, "w": across})
    inputs = gate_inputs(3, height * across, segments.num_segments, width, norm)
    assert_as_exact_as_plain_pytorch(
        lambda s, z, y, *n: expand_gate(s, z, y, segments, *n),
        inputs if norm else inputs[:3],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("rows", "width"), [(1, 72), (15, 6), (70, 130)])
def test_errors_of_the_norm(rows, width, kind, dtype):
    hidden, residual = normal(2, rows, width), normal(2, rows, width, seed=1)
    weight, bias = 1 + normal(width, scale=0.2, seed=2), normal(width, seed=3)
    for inputs in ((hidden, residual, weight, bias), (hidden, residual, weight)):
        assert_as_exact_as_plain_pytorch(lambda *a: add_norm(*a, kind=kind), inputs, dtype)
    first = (hidden, weight, bias)
    assert_as_exact_as_plain_pytorch(lambda h, *n: add_norm(h, None, *n, kind=kind), first, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "width"), GRIDS)
@pytest.mark.parametrize(("path", "pool"), WALKS)
def test_errors_of_the_convolution(path, pool, grid, width, dtype):
    height, across = grid
    length = height * across
    segments = Traversal(path, pool).over({"h": height, "w": across})
    for pooling in ("mean", "max"):
        assert_as_exact_as_plain_pytorch(
            lambda *a, p=pooling: conv_pool(*a, segments, pooling=p),
            conv_inputs(3, length, width),
            dtype,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_under_a_mask(dtype):
    kept = torch.tensor([[0, 2, 3, 5, 11], [1, 4, 5, 9, 10]])
    segments = Traversal("w h", "h").over({"h": 3, "w": 4}, kept)
    for pooling in ("mean", "max"):
        assert_as_exact_as_plain_pytorch(
            lambda *a, p=pooling: conv_pool(*a, segments, pooling=p), conv_inputs(2, 5, 72), dtype
        )
    assert_as_exact_as_plain_pytorch(
        lambda s, z, y, *n: expand_gate(s, z, y, segments, *n), gate_inputs(2, 5, 4, 72), dtype
    )


@pytest.mark.parametrize("taps", [1, 2, 3, 7])
def test_errors_of_other_windows(taps):
    segments = Traversal("w h", "h").over({"h": 5, "w": 9})
    inputs = conv_inputs(2, 45, 72, taps)
    function = lambda *a: conv_pool(*a, segments)  # noqa: E731
    assert_as_exact_as_plain_pytorch(function, inputs, torch.float32)


@pytest.mark.parametrize(
    ("path", "pool"),
    [("h w c", "w"), ("w h c", "h c"), ("h w c", "h w"), ("c h w", "w"), ("c w h", "h")],
)
def test_errors_over_channels(path, pool):
    """Where a segment comes again, and where it does not."""
    segments = Traversal(path, pool).over({"h": 5, "w": 9, "c": 4})
    assert_as_exact_as_plain_pytorch(
        lambda *a: conv_pool(*a, segments), conv_inputs(2, 180, 72), torch.float32
    )
    assert_as_exact_as_plain_pytorch(
        lambda s, z, y, *n: expand_gate(s, z, y, segments, *n),
        gate_inputs(2, 180, segments.num_segments, 72),
        torch.float32,
    )


@pytest.fixture
def threads():
    """Set the number of torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("op", "name", "place"),
    [
        *(("selective_scan", name, 7) for name in ("u", "dt_proj", "dt_bias", "A_log")),
        # A weight of dt, of B and of C: 6 channels, 3 rows of dt and 4 of each other.
        *(("selective_scan", "x_proj", 6 * row + 1) for row in (1, 4, 9)),
        *(("conv_pool", name, 7) for name in ("x", "weight", "bias", "D")),
        *(("expand_gate", name, 7) for name in ("skip", "z", "y")),
        *(("add_norm", name, 7) for name in ("hidden", "residual")),
    ],
)
def test_nan_spreads_as_in_the_reference(op, name, place):
    """To what depends on it, and not to other channels, other sequences or earlier steps."""
    function, inputs = cases()[op]
    inputs[name].view(-1)[place] = float("nan")
    expected = run_with_gradients(function, inputs.values(), torch.float32, "reference")
    actual = run_with_gradients(function, inputs.values(), torch.float32, "numba")
    outputs = expected[: -len(inputs)]
    assert any(out.isnan().any() for out in outputs)
    assert not all(out.isnan().all() for out in outputs)
    for tensor, reference in zip(actual, expected, strict=True):
        assert torch.equal(tensor.isnan(), reference.isnan())


@pytest.mark.parametrize("bias", [-200.0, -30.0, 30.0, 1e4])
def test_steps_that_keep_or_forget_everything(bias):
    """Decays of 1, and decays far below the smallest float32."""
    function, inputs = cases()["selective_scan"]
    inputs["dt_bias"] += bias
    exact = run_with_gradients(function, inputs.values(), torch.float64)
    kernel = run_with_gradients(function, inputs.values(), torch.float32, "numba")
    for tensor, reference in zip(kernel, exact, strict=True):
        # The kernel's decays end at 2**-126, far below what shows in the results.
        scale = max(1e-20, float(reference.abs().max()))
        torch.testing.assert_close(tensor, reference, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("value", [-300.0, -90.0, 90.0, 1e30])
def test_a_convolution_of_large_numbers(value):
    """Where SiLU is the identity, and where it is 0."""
    function, inputs = cases()["conv_pool"]
    inputs["bias"] += value
    exact = run_with_gradients(function, inputs.values(), torch.float64)
    kernel = run_with_gradients(function, inputs.values(), torch.float32, "numba")
    for tensor, reference in zip(kernel, exact, strict=True):
        torch.testing.assert_close(tensor, reference, atol=1e-30, rtol=1e-4)


def kernels(sequences: int = 4, length: int = 150, width: int = 130) -> list[torch.Tensor]:
    """All outputs of the registered ops, and the gradients that theirs give."""
    ops, walk = torch.ops.fastvim, (length, 0, 0)
    x, weight, bias, D = to(conv_inputs(sequences, length, width), torch.float32)
    skip, z, y, *norm = to(gate_inputs(sequences, length, length, width), torch.float32)
    rows = to((normal(sequences, length, width), normal(sequences, length, width)), torch.float32)
    scan = to(scan_inputs(sequences, length, width), torch.float32)
    conv = (x, weight, bias, D, walk, None, None, 1.0)
    gate = (skip, z, y, walk, None, None, *norm, 1e-5)
    norms = (*rows, *norm, True, 1e-5)
    outputs = {
        "conv_pool": ops.conv_pool_cpu(*conv),
        "scan": (ops.selective_scan_cpu(*scan),),
        "gate": (ops.expand_gate_cpu(*gate),),
        "norm": ops.add_norm_cpu(*norms),
    }
    total = outputs["norm"][1]
    gradients = (
        ops.conv_pool_cpu_backward(*conv, *outputs["conv_pool"]),
        ops.selective_scan_cpu_backward(*scan, *outputs["scan"]),
        ops.expand_gate_cpu_backward(*gate, *outputs["gate"]),
        ops.add_norm_cpu_backward(total, norm[0], *outputs["norm"], True, 1e-5),
    )
    return [tensor for group in (*outputs.values(), *gradients) for tensor in group]


def assert_identical(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_kernels_give_the_same_bits_whatever_the_threads(threads):
    threads(1)
    alone = kernels()
    for count in (1, 2, 2, 5, 64):
        threads(count)
        assert_identical(kernels(), alone)


def test_plain_threads_give_the_same_bits(threads, monkeypatch):
    """Where torch's own threads are not those of GNU's OpenMP."""
    threads(2)
    expected = kernels()
    monkeypatch.setattr(cpu_threads, "_openmp", lambda: None)
    assert_identical(kernels(), expected)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_give_the_same_bits(op, threads):
    threads(2)
    function, inputs = cases(batch=5)[op]
    first, second = (
        run_with_gradients(function, inputs.values(), torch.float32, "numba") for _ in range(2)
    )
    assert_identical(first, second)


def test_several_python_threads_at_once(threads):
    threads(2)
    sizes = [(2, 20, 72), (4, 7, 130), (6, 33, 6), (8, 16, 64)]
    alone = [kernels(*size) for size in sizes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda size: kernels(*size), sizes * 5, timeout=60))
    for run, expected in zip(together, alone * 5, strict=True):
        assert_identical(run, expected)


class Sums(Dataset):
    """Sums of the kernels' outputs, computed in the process that asks for them."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> float:
        torch.set_num_threads(2)  # data workers start with one
        # Few values, and no products: torch's own parallel loops do not survive a fork.
        conv, length = to(conv_inputs(4, 20 + index, 72), torch.float32), 20 + index
        walk = ((length, 0, 0), None, None)
        pooled, skip = torch.ops.fastvim.conv_pool_cpu(*conv, *walk, 1.0)
        gated = torch.ops.fastvim.expand_gate_cpu(skip, skip, pooled, *walk, None, None, 1e-5)
        return float(np.sum(gated.numpy()))


def test_in_a_forked_data_worker(threads):
    here = [Sums()[i] for i in range(3)]  # starts the threads that the fork will not have
    loader = DataLoader(
        Sums(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    assert [float(x) for x in loader] == here


WALKED = ([5, 0, 0], None, None)
REGISTERED = {
    "add_norm": lambda a: (*a, True, 1e-5),
    "conv_pool": lambda a: (*a, *WALKED, 0.5),
    "selective_scan": tuple,
    "expand_gate": lambda a: (*a[:3], *WALKED, *a[3:], 1e-5),
}


@pytest.mark.parametrize("sequences", [4, 0])
@pytest.mark.parametrize("op", OPS)
def test_registration(op, sequences):
    inputs = {
        "add_norm": (normal(sequences, 5, 6), normal(sequences, 5, 6), normal(6), normal(6)),
        "conv_pool": conv_inputs(sequences, 5),
        "selective_scan": scan_inputs(sequences, 5, 6),
        "expand_gate": gate_inputs(sequences, 5, 5),
    }[op]
    registered = getattr(torch.ops.fastvim, f"{op}_cpu").default
    arguments = REGISTERED[op](to(inputs, torch.float32))
    outputs = outputs_of(registered(*arguments))
    opcheck(registered, REGISTERED[op](to(inputs, torch.float32, grad=True)))
    backward = getattr(torch.ops.fastvim, f"{op}_cpu_backward").default
    if op == "add_norm":
        arguments = (outputs[1], arguments[2], *outputs, True, 1e-5)
    else:
        arguments = (*arguments, *outputs)
    opcheck(backward, arguments)


@pytest.mark.parametrize(("op", "wanted"), [(op, n) for op in OPS for n in cases()[op][1]])
def test_a_gradient_of_one_input_alone(op, wanted):
    function, inputs = cases()[op]
    expected = run_with_gradients(function, inputs.values(), torch.float32, "numba")
    inputs[wanted].requires_grad_()
    outputs = outputs_of(function(*inputs.values()))
    for out, own in zip(outputs, expected[: -len(inputs)], strict=True):
        assert torch.equal(out.double(), own)
    probe_backward(outputs)
    own = expected[-len(inputs) :][list(inputs).index(wanted)]
    assert torch.equal(inputs[wanted].grad.double(), own)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", OPS)
def test_without_gradients(op, context):
    function, inputs = cases()[op]
    expected = outputs_of(function(*inputs.values()))
    with context():
        outputs = outputs_of(function(*inputs.values()))
    assert_identical(outputs, expected)


@pytest.mark.parametrize("op", OPS)
def test_storages_may_change_their_size(op):
    """Sharded training frees whole weights by it; `Tensor.numpy` would forbid it for good."""
    call, inputs = cases()[op]
    call(*inputs.values())
    for tensor in inputs.values():
        tensor.untyped_storage().resize_(0)
