"""What the CPU kernels share: compilation, 2**x inside vectorised loops, threads.

A kernel takes a range of tasks, `kernel(first, last, *arrays)`, so that slices of the range can run
on several threads. A task is one sequence and one block of `BLOCK` channels.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba import float32, int32
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

BLOCK = 64  # channels of a task: four of the widest vectors, and its rows stay in the first cache
LOG2_E = np.float32(1.4426950408889634)
LN_2 = np.float32(0.6931471805599453)

# Chebyshev fit of 2**f on [-1/2, 1/2], relative error 3e-9.
C0, C1, C2, C3, C4, C5, C6 = (
    np.float32(c)
    for c in np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)

# Sums may be reordered into vector lanes; nothing may assume that values are finite.
jit: Callable[..., Any] = functools.partial(
    numba.njit, nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy"
)


@intrinsic
def _as_float(typing_context: Any, bits: Any) -> Any:
    """Reinterpret the bits of an int32 as a float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), build


@jit(inline="always")
def exp2(x):  # type: ignore[no-untyped-def]
    """2**x for x <= 0, floored at 2**-126. numba's own exp would be a call per element."""
    x = float32(-126.0) if x < float32(-126.0) else x
    whole = np.floor(x + float32(0.5))
    f = x - whole
    p = C0 + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    bits = (int32(whole) + int32(127)) << int32(23)
    return p * _as_float(bits)  # type: ignore[call-arg]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fastvim")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def parallel(kernel: Any, tasks: int, *tensors: Tensor) -> None:
    """Run kernel(first, last, *arrays) over slices of the tasks, on as many threads as torch.

    The kernels release the GIL, so plain threads serve: no numba threading layer to conflict with
    torch's, and a forked data worker starts with none.
    """
    arrays = [tensor.detach().numpy() for tensor in tensors]
    threads = max(1, min(torch.get_num_threads(), tasks))
    if threads == 1:
        kernel(0, tasks, *arrays)
        return
    bounds = [tasks * k // threads for k in range(threads + 1)]
    slices = itertools.pairwise(bounds)
    futures = [_pool(threads).submit(kernel, a, b, *arrays) for a, b in slices]
    for future in futures:
        future.result()


def blocks_of(channels: int) -> int:
    """Blocks that cover the channels."""
    return -(-channels // BLOCK)
