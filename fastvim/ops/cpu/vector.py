"""What the kernels of the CPU engine share: memory, tasks, and functions of vectors.

The inner loops of a kernel run over `BLOCK` channels. LLVM turns them into the vector instructions
of the machine at hand: nothing here depends on a set of them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import float32, int32
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj

from fastvim.ops.cpu.threads import WORDS

LOG2_E = np.float32(1.4426950408889634)
SHIFT = np.float32(1.5 * 2**23 + 127)  # x + SHIFT ends in the bits of x, rounded, and 127
LN_2 = np.float32(0.6931471805599453)

# Chebyshev fits: 2**f on [-1/2, 1/2] with a relative error of 3e-9, and log(1 + z) / s as a
# function of s**2 <= 1/9, where s = z / (2 + z).
C0, C1, C2, C3, C4, C5, C6 = (
    np.float32(c)
    for c in np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)


def _logarithm(t: Any) -> Any:
    s = np.sqrt(np.maximum(t, 1e-30))
    return 2 * np.arctanh(s) / s


A0, A1, A2, A3, A4, A5 = (
    np.float32(a)
    for a in np.polynomial.Chebyshev.interpolate(_logarithm, 5, domain=[0, 1 / 9])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)

# Values are not assumed to be finite. A function that is not inlined has two bodies, of its own
# library and of the kernel that calls it: a process that compiles them runs the one, and a process
# that finds the kernel on the disk runs the other.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def _inlined(*fastmath: str) -> Callable[..., Any]:
    made: Callable[..., Any] = numba.njit(forceinline=True, fastmath=set(fastmath), **_OPTIONS)
    return made


inlined = _inlined("contract", "nsz")
_SUMS = {"contract", "nsz", "reassoc"}  # sums are reordered, for vectorisation
summing = _inlined(*_SUMS)


@functools.cache
def _digest() -> str:
    """Of all files that kernels are made of."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def compiled(function: Callable[[Any], None]) -> Any:
    """A kernel as a function of C, from numba's cache where it is there.

    That cache looks at a function's own file alone, so its name holds the digest of all files.
    """
    function.__qualname__ = f"{function.__name__}_{_digest()}"
    return numba.cfunc(types.void(types.voidptr), cache=True, fastmath=_SUMS, **_OPTIONS)(function)


@intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:
    """Reinterpret the bits of an int32 as a float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), build


@intrinsic
def as_int(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 as an int32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), build


def _selecting(comparison: str) -> Any:
    """Of two float32 values the one that compares so, the first if it is NaN: one instruction.

    A condition in Python is a branch, of which LLVM makes several instructions.
    """

    def choose(typing_context: Any, x: Any, bound: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, bound = args
            return builder.select(builder.fcmp_ordered(comparison, bound, x), bound, x)

        return types.float32(types.float32, types.float32), build

    return intrinsic(choose)


greater, less = _selecting(">"), _selecting("<")


@intrinsic
def wide(typing_context: Any) -> Any:
    """Vectorise this function's loops with the widest vectors.

    LLVM takes half of them on Intel's servers. It looks at a function before it is inlined, too.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def next_task(typing_context: Any, data: Any) -> Any:
    """The number of the next task, which no other thread gets: the first word counts them."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        counter = builder.bitcast(args[0], word.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(word, 1), "monotonic")

    return types.int64(types.voidptr), build


@intrinsic
def copy(typing_context: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy float32 values from address to address. LLVM does not see that a loop may do so."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, source, count = args
        byte = ir.IntType(8).as_pointer()
        size = builder.mul(count, ir.Constant(count.type, 4))
        pointers = builder.inttoptr(target, byte), builder.inttoptr(source, byte)
        cgutils.raw_memcpy(builder, *pointers, size, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def allocate(typing_context: Any, count: Any) -> Any:
    """The address of memory for float32 values, which is not set, and a line of the cache.

    numpy's arrays take a third of a second to compile.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        size = builder.mul(builder.add(args[0], ir.Constant(word, 16)), ir.Constant(word, 4))
        return builder.ptrtoint(context.nrt.allocate(builder, size), word)

    return types.int64(types.int64), build


@intrinsic
def release(typing_context: Any, address: Any) -> Any:
    """Free what was allocated."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        context.nrt.free(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), build


@inlined
def aligned(address):
    """The first address from here on at which a vector lies in one line of the cache."""
    return (address + 63) // 64 * 64


def _array_at(dtype: Any) -> Any:
    """A contiguous array at an address: (address, shape). `numba.carray` is compiled for each."""

    def array_at(typing_context: Any, address: Any, shape: Any) -> Any:
        found = types.Array(dtype, len(shape), "C")

        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            made = arrayobj.make_array(found)(context, builder)
            sizes = cgutils.unpack_tuple(builder, args[1])
            strides = [ir.Constant(sizes[0].type, context.get_abi_sizeof(made.data.type.pointee))]
            for size in reversed(sizes):
                strides.insert(0, builder.mul(strides[0], size))
            data = builder.inttoptr(args[0], made.data.type)
            arrayobj.populate_array(made, data, sizes, strides[1:], strides[-1], None)
            return made._getvalue()

        return found(types.int64, types.UniTuple(types.int64, len(shape))), build

    return intrinsic(array_at)


floats, integers = _array_at(types.float32), _array_at(types.int64)


@intrinsic
def words(typing_context: Any, data: Any) -> Any:
    """The integers that `threads.run` gave: sizes, then addresses."""
    found = types.Array(types.int64, 1, "C")

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = arrayobj.make_array(found)(context, builder)
        size, step = (ir.Constant(ir.IntType(64), value) for value in (WORDS, 8))
        data = builder.bitcast(args[0], made.data.type)
        arrayobj.populate_array(made, data, [size], [step], step, None)
        return made._getvalue()

    return found(types.voidptr), build


@inlined
def exp2(x):
    """2**x of x <= 126, floored at 2**-126. numba's own exp makes a call for each value."""
    x = greater(x, float32(-126.0))
    shifted = x + SHIFT
    f = x - (shifted - SHIFT)
    g = f * f
    p = (C0 + f * C1) + g * ((C2 + f * C3) + g * ((C4 + f * C5) + g * C6))
    return p * as_float(as_int(shifted) << int32(23))


@inlined
def exp_below(x):
    """1 + exp(-x), at most 2**126: silu(x) is x divided by it."""
    return float32(1.0) + exp2(less(-LOG2_E * x, float32(126.0)))


@_inlined("contract", "arcp", "ninf")
def reciprocal(x):
    """1 / x of a finite x, by an estimate and a step of Newton's where a processor has estimates.

    In a loop of its own: a division takes longer there. In a long chain of operations it does not.
    """
    return float32(1.0) / x


@inlined
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return float32(1.0) / exp_below(x)


@inlined
def softplus(x):
    """log(1 + exp(x)), exact to rounding also where exp(x) is tiny."""
    z = exp2(-LOG2_E * abs(x))
    s = z / (float32(2.0) + z)
    t = s * s
    log = s * (A0 + t * (A1 + t * (A2 + t * (A3 + t * (A4 + t * A5)))))
    return (x if x > float32(0.0) else float32(0.0)) + log
