"""Walks and the four ops as slow and obvious numpy in float64, for tests to compare with.

Written from docs/architecture.md alone; nothing is imported from fastvim.

B  batch, L  tokens, n  tokens present, E  inner width, K  taps, S  segments, N  state size
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np


class Walk(NamedTuple):
    """How one sequence is walked.

    Attributes:
        order: place in memory of the token at each path position.
        segments: segment of each path position, forward and backward. A backward scan runs from
            the last segment to the first.
        num_segments: steps of the scan.
        segment_size: cells of a segment with nothing masked.
    """

    order: list[int]
    segments: tuple[list[int], list[int]]
    num_segments: int
    segment_size: int


def walk(
    path: str, pool: str, grid: dict[str, int], kept: list[int] | None = None, mirror: str = ""
) -> Walk:
    """Walk the axes of `path`, slowest first, over a grid; `grid` lists axes in memory order."""
    axes, pooled = path.split(), pool.split()
    met: dict[tuple[int, ...], int] = {}
    cells = []
    for digits in product(*(range(grid[axis]) for axis in axes)):
        at = dict(zip(axes, digits, strict=True))
        memory = 0
        for axis, size in grid.items():
            memory = memory * size + at[axis]
        segment = met.setdefault(tuple(at[a] for a in axes if a not in pooled), len(met))
        cells.append((memory, segment))
    size = len(cells) // len(met)
    if kept is None:
        order, segments = [memory for memory, _ in cells], [segment for _, segment in cells]
        return Walk(order, (segments, segments), len(met), size)
    cells = [(memory, segment) for memory, segment in cells if memory in kept]
    order = [kept.index(memory) for memory, _ in cells]
    if not pooled:
        steps = list(range(len(cells)))
        return Walk(order, (steps, steps), len(cells), 1)
    forward = [segment for _, segment in cells]
    backward = forward
    if mirror == "published":
        # Position j of the reversed sequence uses the segment of kept token j, and the segments are
        # scanned in ascending order. Counted from the other end that order is descending.
        backward = [len(met) - 1 - segment for segment in forward][::-1]
    return Walk(order, (forward, backward), len(met), size)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def add_norm(hidden, residual, weight, bias, kind, eps=1e-5):
    """The norm of the sum, and the sum."""
    total = hidden if residual is None else residual + hidden
    normed = np.zeros_like(total)
    for place in np.ndindex(total.shape[:-1]):
        vector = total[place]
        if kind == "layer":
            vector = vector - vector.mean()
        normed[place] = vector / np.sqrt((vector**2).mean() + eps) * weight
        if bias is not None:
            normed[place] += bias
    return normed, total


def convolve(sequence, weight, bias):
    """Causal depthwise convolution of (n, E) with (E, K), and SiLU."""
    n, taps = len(sequence), weight.shape[1]
    out = np.zeros_like(sequence) + bias
    for k in range(taps):
        ago = taps - 1 - k  # the last tap is the token itself
        out[ago:] += weight[:, k] * sequence[: max(0, n - ago)]
    return silu(out)


def convolve_direction(sequence, weight, bias, direction):
    """Backward is the same computation on the reversed sequence."""
    if direction == 0:
        return convolve(sequence, weight, bias)
    return convolve(sequence[::-1], weight, bias)[::-1]


def conv_pool(x, weight, bias, D, walks, pooling="mean", pool_scale=1.0):
    """x (B, n, E), one walk per sequence, to (2, B, S, E), and the skip (B, n, E).

    The skip of a token is the mean over directions of D times its own convolved value, and lies in
    memory as the tokens do.
    """
    out = np.zeros((2, len(x), walks[0].num_segments, x.shape[2]))
    skip = np.zeros_like(x)
    for direction, b in product(range(2), range(len(x))):
        order, segments, num_segments, size = walks[b]
        values = convolve_direction(x[b][order], weight[direction], bias[direction], direction)
        members = [[] for _ in range(num_segments)]
        for value, s in zip(values, segments[direction], strict=True):
            members[s].append(value)
        for s, own in enumerate(members):
            if own:
                pooled = sum(own) / size if pooling == "mean" else np.max(own, axis=0)
                out[direction, b, s] = pooled * pool_scale
        for value, memory in zip(values, order, strict=True):
            skip[b, memory] += D[direction] * value / 2
    return out, skip


def scan(u, dt, B, C, dt_proj, dt_bias, A_log):
    """One direction of one sequence, first step first: u (S, E), dt (S, R), B and C (S, N)."""
    A = -np.exp(A_log)
    h = np.zeros_like(A)
    y = np.zeros_like(u)
    for s in range(len(u)):
        delta = softplus(dt_proj @ dt[s] + dt_bias)
        for n in range(A.shape[1]):
            h[:, n] = np.exp(delta * A[:, n]) * h[:, n] + delta * B[s, n] * u[s]
            y[s] += C[s, n] * h[:, n]
    return y


def select(u, x_proj, rank):
    """dt (S, R), B and C (S, N) of the steps (S, E) of one sequence, by x_proj (R + 2N, E)."""
    projected = np.zeros((len(u), len(x_proj)))
    for s in range(len(u)):
        for row in range(len(x_proj)):
            projected[s, row] = (x_proj[row] * u[s]).sum()
    states = (len(x_proj) - rank) // 2
    return projected[:, :rank], projected[:, rank : rank + states], projected[:, rank + states :]


def selective_scan(u, x_proj, dt_proj, dt_bias, A_log):
    """u (2, B, S, E), x_proj (2, R + 2N, E), the other parameters (2, E, ...)."""
    y = np.zeros_like(u)
    for direction, b in product(range(2), range(u.shape[1])):
        ascending = 1 if direction == 0 else -1
        steps = u[direction, b, ::ascending]
        selected = select(steps, x_proj[direction], dt_proj.shape[2])
        own = [t[direction] for t in (dt_proj, dt_bias, A_log)]
        y[direction, b] = scan(steps, *selected, *own)[::ascending]
    return y


def expand_gate(skip, z, y, walks, norm_weight, norm_bias, eps=1e-5):
    """skip, z (B, n, E) and y (2, B, S, E) to (B, n, E) as it lies in memory."""
    mixed = skip.copy()
    for direction, b in product(range(2), range(len(skip))):
        order, segments, _, _ = walks[b]
        for position, memory in enumerate(order):
            mixed[b, memory] += y[direction, b, segments[direction][position]] / 2
    if norm_weight is not None:
        mixed, _ = add_norm(mixed, None, norm_weight, norm_bias, "layer", eps)
    return mixed * silu(z)
