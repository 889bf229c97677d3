"""What the Triton kernels share: device functions, and traversals as integers.

Path axes are numbered from the slowest to the fastest: n0, n1, n2 are their sizes, and m0, m1, m2
their strides in memory, in tokens. A walk of fewer axes is filled up on the slow side, with size 1
and stride 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.traversal import Segments

# The interpreter has no inline assembly.
INTERPRETED = triton.knobs.runtime.interpret
MAX_AXES = 3  # most axes of a path that the kernels take


@triton.jit
def token_at(position, n1, n2, m0, m1, m2):
    """Memory index of the token at a path position."""
    rest = position // n2
    return (rest // n1) * m0 + (rest % n1) * m1 + (position % n2) * m2


@triton.jit
def row_of(run, pieces, rows, P, n1, n2, m0, m1):
    """Where a run lies: one of `pieces` runs, of P tokens each, of a row of the path.

    Gives its sequence, its row, its first token within the row, the path position at which the row
    starts, and the memory indices at which the row, the one before and the one after start.
    """
    batch = (run // (pieces * rows)).to(tl.int64)
    row = (run // pieces) % rows
    base = (row // n1) * m0 + (row % n1) * m1
    before = ((row - 1) // n1) * m0 + ((row - 1) % n1) * m1
    after = ((row + 1) // n1) * m0 + ((row + 1) % n1) * m1
    return batch, row, (run % pieces) * P, row * n2, base, before, after


@triton.jit
def near(i, start, L, base, before, after, n1, n2, m0, m1, m2, SHORT: tl.constexpr):
    """Memory index of token i of a row, and whether it is on the path.

    The row starts at path position `start` and memory index `base`. i may be negative or beyond the
    row: the token then lies in a neighbouring row, which starts at `before` or `after`. SHORT: rows
    are shorter than the convolution's window, so that the token may lie further away; it is then
    found by division.
    """
    if SHORT:
        token = token_at(start + i, n1, n2, m0, m1, m2)
    else:
        token = tl.where(i < 0, before + (i + n2) * m2, base + i * m2)
        token = tl.where(i >= n2, after + (i - n2) * m2, token)
    return token, (start + i >= 0) & (start + i < L)


@triton.jit
def load_taps(weight, bias, D, columns, E):
    """Taps, bias and skip of one direction. Taps and bias are halved, as `silu_twice` expects."""
    mask = columns < E
    w0 = 0.5 * tl.load(weight + columns * 4, mask=mask, other=0.0).to(tl.float32)
    w1 = 0.5 * tl.load(weight + columns * 4 + 1, mask=mask, other=0.0).to(tl.float32)
    w2 = 0.5 * tl.load(weight + columns * 4 + 2, mask=mask, other=0.0).to(tl.float32)
    w3 = 0.5 * tl.load(weight + columns * 4 + 3, mask=mask, other=0.0).to(tl.float32)
    b = 0.5 * tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    # Half of the skip: the output is the mean over the two directions.
    d = 0.5 * tl.load(D + columns, mask=mask, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, b, d


@triton.jit
def silu_twice(half, FAST: tl.constexpr):
    """silu(2 · half). FAST uses one hardware function instead of two, with an error of 2**-11."""
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        return half * tanh + half
    # Correctly rounded: an error here would add up in the sums over long segments.
    return tl.div_rn(2.0 * half, 1.0 + exp(-2.0 * half, FAST))


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x)); FAST as in `silu_twice`."""
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * tanh + 0.5
    return tl.div_rn(1.0, 1.0 + exp(-x, FAST))


# 1.5 · 2**23. Adding it rounds a float32 to an integer, which is faster than a conversion.
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _power(rounded, f):
    """2**(n + f), where `rounded` is ROUND + n and f is in [-1/2, 1/2].

    The result must not be subnormal. 2**f is a Chebyshev fit.
    """
    p = 0.0013400427997112274 + f * 0.00015461444854736328
    p = 0.24022650718688965 + f * (0.05550327152013779 + f * (0.009618056938052177 + f * p))
    p = 1.0 + f * (0.6931471824645996 + f * p)
    exponent = rounded.to(tl.int32, bitcast=True) + (127 - ROUND_BITS)
    return p * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2**x for x <= 127, floored at 2**-126.

    FAST uses the hardware function. Its error is 2**-22, but biased downwards, and the gradients of
    a scan accumulate the bias over the steps. Without FAST the result is exact to rounding.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    x = tl.where(x < -126.0, -126.0, x)  # propagates NaN, unlike tl.maximum
    rounded = x + ROUND
    return _power(rounded, x - (rounded - ROUND))


@triton.jit
def exp(x, FAST: tl.constexpr):
    """e**x, FAST as in `exp2`. Without FAST the result is clamped to e**-87 and e**88."""
    if FAST:
        return exp2(x * 1.4426950408889634, FAST)
    x = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))
    rounded = x * 1.4426950408889634 + ROUND
    whole = rounded - ROUND
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4  # ln 2 split high/low (Cody-Waite)
    return _power(rounded, rest * 1.4426950408889634)


@triton.jit
def softplus(x, FAST: tl.constexpr):
    """log(1 + exp(x)), exact to rounding also where exp(x) is tiny. FAST: an error of 2**-13."""
    t = exp(tl.where(x > 20.0, 20.0, x), FAST)
    w = 1.0 + t
    if FAST:
        log = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [w], dtype=tl.float32, is_pure=True, pack=1
        )
        small = tl.where(t < 1e-3, t - 0.5 * t * t, log * 0.6931471805599453)
    else:
        small = tl.where(w == 1.0, t, tl.log(w) * (t / (w - 1.0)))
    return tl.where(x > 20.0, x, small)


def four_taps(weight: Tensor) -> Tensor:
    """Pad the taps (2, E, K) with zeros to (2, E, 4), the window of the kernels.

    Raises:
        ValueError: more than 4 taps.
    """
    missing = 4 - weight.shape[2]
    if missing < 0:
        raise ValueError(
            f"a convolution of {weight.shape[2]} taps: the triton engine takes 4 at most; "
            "fastvim.use_engine('reference') takes any"
        )
    return F.pad(weight, (missing, 0)).contiguous() if missing else weight.contiguous()


def row_pieces(width: int, most: int) -> tuple[int, int]:
    """Size and number of the pieces in which a kernel holds a row of `width` channels.

    The size is a power of two, `most` at most. It divides the width, unless it would be below 64.
    """
    piece = width & -width  # the largest power of two that divides it
    if piece < 64:
        piece = triton.next_power_of_2(width)
    piece = min(piece, most)
    return piece, triton.cdiv(width, piece)


def pools_rows(pooled: Sequence[bool]) -> bool:
    """Whether the segments are the path's rows: only its last axis is pooled."""
    return pooled[-1] and not any(pooled[:-1])


def collapse(segments: Segments) -> tuple[list[int], list[int], list[bool]]:
    """Sizes, memory strides and pooled flags of the path, with neighbouring axes merged."""
    sizes: list[int] = []
    strides: list[int] = []
    pooled: list[bool] = []
    for axis, stride, pool in zip(segments.sizes, segments.strides, segments.pooled, strict=True):
        size = int(axis)  # may be symbolic; kernels are compiled for each size
        if size == 1 and segments.num_tokens > 1:
            continue
        if sizes and pooled[-1] == pool and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
            pooled.append(pool)
    return sizes, strides, pooled


def pad_axes(values: Sequence[int], fill: int) -> list[int]:
    """Exactly `MAX_AXES` numbers, filled up on the slow side."""
    return [fill] * (MAX_AXES - len(values)) + list(values)
