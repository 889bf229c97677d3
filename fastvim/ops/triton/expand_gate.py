"""expand_gate on GPUs: convolutions, broadcast, skip, norm and gate in one pass over the tokens.

B  batch, L  tokens, E  inner width, S  segments, P  tokens of a run (a stretch of a path's row)
A program walks a run two tokens at a time, with all of E in registers as the norm asks, and the
window of eight tokens beside it, so that each token is loaded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.traversal import Segments
from fastvim.ops.triton.common import INTERPRETED, four_taps, near, pad_axes, silu

PIECE = 16  # tokens that a program walks at most
PER_THREAD = 4  # channels of a thread


@triton.jit
def _gate(
    mixed_0, mixed_1, z_0, z_1, in_row, scale, shift, eps, E, NORM: tl.constexpr, FAST: tl.constexpr
):
    """Norm and gate of two tokens, in one reduction each for mean and variance."""
    if NORM:
        both = tl.join(mixed_0, mixed_1)
        both = tl.where(in_row[:, None], both - (tl.sum(both, axis=0) / E)[None, :], 0.0)
        both *= tl.rsqrt(tl.sum(both * both, axis=0) / E + eps)[None, :]
        mixed_0, mixed_1 = tl.split(both)
        mixed_0 = mixed_0 * scale + shift
        mixed_1 = mixed_1 * scale + shift
    return mixed_0 * silu(z_0, FAST), mixed_1 * silu(z_1, FAST)


@triton.jit
def _expand_gate_kernel(
    x, z, y, weight, bias, skip, norm_weight, norm_bias, out, eps,
    L, S, pieces, y_direction, x_batch, z_batch, n1, n2, m0, m1, s0, s1,
    E: tl.constexpr, m2: tl.constexpr, s2: tl.constexpr,
    x_token: tl.constexpr, z_token: tl.constexpr,
    P: tl.constexpr, EVEN: tl.constexpr, SHORT: tl.constexpr, NORM: tl.constexpr,
    FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = L // n2
    piece = tl.program_id(0) % pieces
    row = (tl.program_id(0) // pieces) % rows
    batch = (tl.program_id(0) // (pieces * rows)).to(tl.int64)
    start, first = row * n2, piece * P
    base = (row // n1) * m0 + (row % n1) * m1
    before = ((row - 1) // n1) * m0 + ((row - 1) % n1) * m1
    after = ((row + 1) // n1) * m0 + ((row + 1) % n1) * m1
    segment = (row // n1) * s0 + (row % n1) * s1
    columns = tl.arange(0, BLOCK)
    in_row = columns < E
    p_x = x + batch * x_batch + columns
    p_z = z + batch * z_batch + (base + first * m2) * z_token + columns
    p_y = y + (batch * S + segment + first * s2) * E + columns
    p_out = out + (batch * L + base + first * m2) * E + columns

    w = weight + columns * 4
    f0 = tl.load(w, mask=in_row, other=0.0).to(tl.float32)
    f1 = tl.load(w + 1, mask=in_row, other=0.0).to(tl.float32)
    f2 = tl.load(w + 2, mask=in_row, other=0.0).to(tl.float32)
    f3 = tl.load(w + 3, mask=in_row, other=0.0).to(tl.float32)
    w += E * 4
    g0 = tl.load(w, mask=in_row, other=0.0).to(tl.float32)
    g1 = tl.load(w + 1, mask=in_row, other=0.0).to(tl.float32)
    g2 = tl.load(w + 2, mask=in_row, other=0.0).to(tl.float32)
    g3 = tl.load(w + 3, mask=in_row, other=0.0).to(tl.float32)
    fb = tl.load(bias + columns, mask=in_row, other=0.0).to(tl.float32)
    gb = tl.load(bias + E + columns, mask=in_row, other=0.0).to(tl.float32)
    fd = 0.5 * tl.load(skip + columns, mask=in_row, other=0.0).to(tl.float32)
    gd = 0.5 * tl.load(skip + E + columns, mask=in_row, other=0.0).to(tl.float32)
    scale = fb
    shift = fb
    if NORM:
        scale = tl.load(norm_weight + columns, mask=in_row, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias + columns, mask=in_row, other=0.0).to(tl.float32)

    # Where the row is one segment, all its tokens receive the same.
    same = tl.load(p_y, mask=in_row, other=0.0).to(tl.float32)
    same += tl.load(p_y + y_direction, mask=in_row, other=0.0).to(tl.float32)
    window = ()
    for k in tl.static_range(6):
        token, inside = near(
            first + k - 3, start, L, base, before, after, n1, n2, m0, m1, m2, SHORT
        )
        value = tl.load(p_x + token * x_token, mask=in_row & inside, other=0.0)
        window = window + (value.to(tl.float32),)
    x0, x1, x2, x3, x4, x5 = window
    p_ahead = p_x + (base + (first + 3) * m2) * x_token
    for j in tl.static_range(0, P, 2):
        i = first + j
        if j < P - 4 and EVEN and not SHORT:
            x6 = tl.load(p_ahead, mask=in_row, other=0.0).to(tl.float32)
            x7 = tl.load(p_ahead + m2 * x_token, mask=in_row, other=0.0).to(tl.float32)
        else:
            token, inside = near(i + 3, start, L, base, before, after, n1, n2, m0, m1, m2, SHORT)
            x6 = tl.load(p_x + token * x_token, mask=in_row & inside, other=0.0).to(tl.float32)
            token, inside = near(i + 4, start, L, base, before, after, n1, n2, m0, m1, m2, SHORT)
            x7 = tl.load(p_x + token * x_token, mask=in_row & inside, other=0.0).to(tl.float32)
        mask_0 = in_row if EVEN else in_row & (i < n2)
        mask_1 = in_row if EVEN else in_row & (i + 1 < n2)
        y_0 = same
        y_1 = same
        if s2 != 0:
            y_0 = tl.load(p_y, mask=mask_0, other=0.0).to(tl.float32)
            y_0 += tl.load(p_y + y_direction, mask=mask_0, other=0.0).to(tl.float32)
            y_1 = tl.load(p_y + s2 * E, mask=mask_1, other=0.0).to(tl.float32)
            y_1 += tl.load(p_y + s2 * E + y_direction, mask=mask_1, other=0.0).to(tl.float32)
        z_0 = tl.load(p_z, mask=mask_0, other=0.0).to(tl.float32)
        z_1 = tl.load(p_z + m2 * z_token, mask=mask_1, other=0.0).to(tl.float32)
        ahead = silu(fb + f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3, FAST)
        behind = silu(gb + g3 * x3 + g2 * x4 + g1 * x5 + g0 * x6, FAST)
        mixed_0 = 0.5 * y_0 + fd * ahead + gd * behind
        ahead = silu(fb + f0 * x1 + f1 * x2 + f2 * x3 + f3 * x4, FAST)
        behind = silu(gb + g3 * x4 + g2 * x5 + g1 * x6 + g0 * x7, FAST)
        mixed_1 = 0.5 * y_1 + fd * ahead + gd * behind
        out_0, out_1 = _gate(mixed_0, mixed_1, z_0, z_1, in_row, scale, shift, eps, E, NORM, FAST)
        tl.store(p_out, out_0, mask=mask_0)
        tl.store(p_out + m2 * E, out_1, mask=mask_1)
        x0, x1, x2, x3, x4, x5 = x2, x3, x4, x5, x6, x7
        p_ahead += 2 * m2 * x_token
        p_z += 2 * m2 * z_token
        p_y += 2 * s2 * E
        p_out += 2 * m2 * E


def expand_gate_triton(
    x: Tensor,
    z: Tensor,
    y: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    D: Tensor,
    segments: Segments,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """`fastvim.ops.expand_gate` for GPU tensors of at most 32 bits, forward, without a mask."""
    x, z = (t if t.stride(2) == 1 else t.contiguous() for t in (x, z))
    y, conv_bias, D = (t.contiguous() for t in (y, conv_bias, D))
    conv_weight = four_taps(conv_weight)
    B, L, E = x.shape
    out = torch.empty(B, L, E, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if norm_weight is not None and norm_bias is None:
        norm_bias = torch.zeros_like(norm_weight)
    n, m, s = (
        pad_axes(values, fill)
        for values, fill in (
            (segments.sizes, 1), (segments.strides, 0), (segments.segment_strides, 0),
        )
    )  # fmt: skip
    row = n[2]
    P = min(PIECE, row + row % 2)
    pieces = triton.cdiv(row, P)
    block = triton.next_power_of_2(E)
    _expand_gate_kernel[(B * (L // row) * pieces,)](
        x, z, y, conv_weight, conv_bias, D, norm_weight, norm_bias, out, eps,
        L, segments.num_segments, pieces, y.stride(0), x.stride(0), z.stride(0),
        *n[1:], *m[:2], *s[:2],
        E=E, m2=m[2], s2=s[2], x_token=x.stride(1), z_token=z.stride(1),
        P=P, EVEN=row % P == 0, SHORT=row < 4, NORM=norm_weight is not None,
        FAST=x.dtype != torch.float32 and not INTERPRETED,
        BLOCK=block, num_warps=min(32, max(1, block // (32 * PER_THREAD))),
    )  # fmt: skip
    return out
