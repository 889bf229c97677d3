"""Run a kernel of the CPU engine on as many threads as torch.

The threads are those that torch's own operations run on, where these are of GNU's OpenMP: a second
pool would compete with them for the cores. Elsewhere they are plain threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 64  # channels of a task: a few of the widest vectors, and rows that fit the L1 cache
WORDS = 32  # integers that a kernel gets, at most
_forked = False


def _fork() -> None:
    """OpenMP's threads do not survive a fork, and it does not start others."""
    global _forked
    _forked = True
    _pool.cache_clear()


os.register_at_fork(after_in_child=_fork)


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """`GOMP_parallel` of the library that torch has loaded; None: it uses another one."""
    for file in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")):
        found = ctypes.CDLL(str(file)).GOMP_parallel
        found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        found.restype = None
        return found
    return None


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fastvim")


@functools.cache
def _kernel(name: str) -> tuple[int, Callable[[int], None]]:
    """Address of a kernel, "module:function", and the same for a call without the GIL."""
    module, function = name.split(":")
    vector = import_module("fastvim.ops.cpu.vector")
    kernel = vector.compiled(getattr(import_module(f"fastvim.ops.cpu.{module}"), function))
    return kernel.address, kernel.ctypes


def blocks_of(channels: int) -> int:
    """Number of blocks that cover the channels."""
    return -(-channels // BLOCK)


def ready(values: Tensor) -> Tensor:
    """As kernels read it: float32 and contiguous."""
    plain = values.dtype is torch.float32 and values.is_contiguous()
    return values if plain else values.float().contiguous()


def rows_of(values: Tensor) -> Tensor:
    """As kernels read a part of each token: float32, and contiguous along the last axis."""
    values = values.float()
    return values if values.stride(-1) == 1 else values.contiguous()


@functools.lru_cache(maxsize=256)
def bits_of(value: float) -> int:
    """A number as the integer whose bits are those of its float32."""
    bits: int = struct.unpack("i", struct.pack("f", value))[0]
    return bits


def run(name: str, tasks: int, sizes: Sequence[int], arrays: Sequence[Tensor | None]) -> None:
    """Run a kernel until no task is left.

    Args:
        name: "module:function" of this package. The module is imported, and the function compiled,
            at the first call.
        tasks: how many there are; at most as many threads run. What a task computes depends on no
            number of threads, so neither do the sums.
        sizes: sizes and strides, as the kernel reads them.
        arrays: the tensors whose addresses follow; None: 0.
    """
    address, call = _kernel(name)
    addresses = [0 if values is None else values.data_ptr() for values in arrays]
    data = array("q", (0, *sizes, *addresses))  # the first one counts the tasks that were taken
    words, _ = data.buffer_info()
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1:
        call(words)
        return
    parallel = None if _forked else _openmp()
    if parallel is not None:
        parallel(address, words, threads, 0)
        return
    futures = [_pool(threads).submit(call, words) for _ in range(threads)]
    for future in futures:
        future.result()
