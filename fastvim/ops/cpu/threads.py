"""Run the tasks of a CPU kernel on several threads."""

from __future__ import annotations

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvim.ops.cpu.kernels import BLOCK


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fastvim")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def parallel(kernel: Any, tasks: int, *tensors: Tensor) -> None:
    """Run kernel(first, last, *arrays) over slices of the tasks, on as many threads as torch.

    The kernels release the GIL, so plain threads suffice. numba's threading layers may conflict
    with torch's, and do not survive a fork.
    """
    arrays = [np.asarray(_Memory(tensor)) for tensor in tensors]
    threads = max(1, min(torch.get_num_threads(), tasks))
    if threads == 1:
        kernel(0, tasks, *arrays)
        return
    bounds = [tasks * k // threads for k in range(threads + 1)]
    slices = itertools.pairwise(bounds)
    futures = [_pool(threads).submit(kernel, a, b, *arrays) for a, b in slices]
    for future in futures:
        future.result()


class _Memory:
    """The memory of a contiguous tensor, for numpy.

    `Tensor.numpy` would forbid the storage to change its size for good. Sharded training frees the
    storage of whole weights in that way.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(tensor.shape),
            "typestr": np.dtype(str(tensor.dtype).removeprefix("torch.")).str,
            "data": (tensor.data_ptr(), False),
        }


def blocks_of(channels: int) -> int:
    """Number of blocks that cover the channels."""
    return -(-channels // BLOCK)
