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
    normal,
    outputs_of,
    probe_backward,
    run_with_gradients,
    scan_inputs,
    to,
)
from torch.library import opcheck
from torch.utils.data import DataLoader, Dataset

import fastvim.ops.cpu.conv
import fastvim.ops.cpu.selective_scan  # noqa: F401  registers the kernels
from fastvim.ops import Traversal, conv_pool, selective_scan

SERVED = ["conv_pool", "selective_scan"]
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
def test_errors_of_the_registered_scan(steps, width):
    """Gradients of u, B, C and the step sizes, before the projections mix them."""
    u, delta, *rest = scan_op_inputs(6, steps, width)
    inputs = [u, 0.05 * delta, *rest]  # small steps: the state outlives a chunk
    exact = run_with_gradients(recurrence, inputs, torch.float64)
    plain = run_with_gradients(recurrence, inputs, torch.float32)
    kernel = run_with_gradients(registered_scan, inputs, torch.float32)
    assert_errors_at_most_twice(kernel, plain, exact)


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


@pytest.mark.parametrize("number", range(5), ids=["u", "delta", "rate", "B", "C"])
@pytest.mark.parametrize("steps", [5, 40])
def test_nan_spreads_as_in_the_recurrence(steps, number):
    """A NaN in Δ, B or C alone; one in u or x_proj reaches all three."""
    inputs = scan_op_inputs(4, steps, 6)
    inputs[number].view(-1)[7] = float("nan")
    expected = run_with_gradients(recurrence, inputs, torch.float32)
    actual = run_with_gradients(registered_scan, inputs, torch.float32)
    assert expected[0].isnan().any()
    assert not expected[0].isnan().all()
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


def kernels(sequences: int = 4, steps: int = 40, width: int = 130) -> list[torch.Tensor]:
    """All outputs of the registered kernels."""
    inputs = scan_op_inputs(sequences, steps, width)
    y, starts = torch.ops.fastvim.scan_cpu(*inputs, True)
    results = [y, starts, *torch.ops.fastvim.scan_cpu_backward(*inputs, starts, y)]
    inputs = conv_op_inputs(sequences, steps, width)
    out = torch.ops.fastvim.conv_silu_cpu(*inputs)
    return [*results, out, *torch.ops.fastvim.conv_silu_cpu_backward(*inputs, out)]


def assert_identical(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_kernels_give_the_same_bits_whatever_the_threads(threads):
    threads(1)
    alone = kernels()
    for count in (1, 2, 2, 5, 64):
        threads(count)
        assert_identical(kernels(), alone)


@pytest.mark.parametrize("op", SERVED)
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


def scan_op_inputs(sequences: int, steps: int, width: int, states: int = 4, grad: bool = False):
    """u, delta, rate, B, C for the registered op."""
    shapes = ((sequences, steps, width),) * 2 + ((2, states, width),)
    shapes += ((sequences, steps, states),) * 2
    tensors = [normal(*shape, seed=i).float() for i, shape in enumerate(shapes)]
    tensors[1], tensors[2] = tensors[1].abs(), -tensors[2].abs()
    return [t.requires_grad_(grad) for t in tensors]


def registered_scan(*inputs: torch.Tensor) -> torch.Tensor:
    return torch.ops.fastvim.scan_cpu(*inputs, True)[0]


def recurrence(u, delta, rate, B, C):
    """The registered scan in plain PyTorch."""
    directions = []
    sequences = zip(*(t.chunk(2) for t in (u, delta, B, C)), strict=True)
    for direction, (u_own, delta_own, B_own, C_own) in enumerate(sequences):
        steps = list(range(u.shape[1]))
        h, y = 0, {}
        for s in steps if direction == 0 else reversed(steps):
            decay = torch.exp2(delta_own[:, s, None] * rate[direction])
            h = decay * h + (delta_own * u_own)[:, s, None] * B_own[:, s, :, None]
            y[s] = (h * C_own[:, s, :, None]).sum(1)
        directions.append(torch.stack([y[s] for s in steps], dim=1))
    return torch.cat(directions)


def conv_op_inputs(sequences: int, tokens: int, width: int, taps: int = 4, grad: bool = False):
    """x, taps, bias for the registered op."""
    x, weight, bias, _ = to(conv_inputs(sequences, tokens, width, taps), torch.float32)
    return to((x, weight.mT.contiguous(), bias), torch.float32, grad)


class Sums(Dataset):
    """Sums of the kernels' outputs, computed in the process that asks for them."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> float:
        torch.set_num_threads(2)  # data workers start with one
        # Summed by numpy: torch's own parallel loops do not survive a fork.
        return float(sum(np.sum(result.numpy()) for result in kernels(4, 20 + index)))


def test_in_a_forked_data_worker(threads):
    here = [Sums()[i] for i in range(3)]  # starts the threads that the fork will not have
    loader = DataLoader(
        Sums(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    assert [float(x) for x in loader] == here


@pytest.mark.parametrize("sequences", [4, 0])
@pytest.mark.parametrize("steps", [1, 16, 17])
def test_registration_of_the_scan(steps, sequences):
    inputs = scan_op_inputs(sequences, steps, 6)
    opcheck(torch.ops.fastvim.scan_cpu.default, (*inputs, False))
    y, starts = torch.ops.fastvim.scan_cpu(*inputs, True)
    opcheck(torch.ops.fastvim.scan_cpu_backward.default, (*inputs, starts, y))
    inputs = scan_op_inputs(sequences, steps, 6, grad=True)
    opcheck(torch.ops.fastvim.scan_cpu.default, (*inputs, True))


@pytest.mark.parametrize("sequences", [4, 0])
@pytest.mark.parametrize("taps", [1, 4])
def test_registration_of_the_convolution(taps, sequences):
    inputs = conv_op_inputs(sequences, 5, 6, taps)
    out = torch.ops.fastvim.conv_silu_cpu(*inputs)
    opcheck(torch.ops.fastvim.conv_silu_cpu_backward.default, (*inputs, out))
    inputs = conv_op_inputs(sequences, 5, 6, taps, grad=True)
    opcheck(torch.ops.fastvim.conv_silu_cpu.default, tuple(inputs))


@pytest.mark.parametrize(("op", "wanted"), [(op, n) for op in SERVED for n in cases()[op][1]])
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
@pytest.mark.parametrize("op", SERVED)
def test_without_gradients(op, context):
    function, inputs = cases()[op]
    expected = outputs_of(function(*inputs.values()))
    with context():
        outputs = outputs_of(function(*inputs.values()))
    assert_identical(outputs, expected)


@pytest.mark.parametrize("op", SERVED)
def test_storages_may_change_their_size(op):
    """Sharded training frees whole weights by it; `Tensor.numpy` would forbid it for good."""
    call, inputs = cases()[op]
    call(*inputs.values())
    for tensor in inputs.values():
        tensor.untyped_storage().resize_(0)
