"""Tables of a walk, as the kernels of the CPU engine read them.

B  batch, L  tokens, S  segments
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastvim.ops.traversal import MaskedPath, Segments


class Walk(NamedTuple):
    """A traversal of a grid, token by token; all int64.

    Attributes:
        order: (B or 1, L), memory index of each path position.
        segment: (2 or 1, B or 1, L), segment of each path position, a row per direction.
        tokens: the same, of each token in memory.
        steps: S, the number of segments.
        run: path positions that follow each other in a segment; L where a segment comes again.
        size: cells of a full segment.
        strides: of the tables along directions and batch; 0 where all share a row.
    """

    order: Tensor
    segment: Tensor
    tokens: Tensor
    steps: int
    run: int
    size: int
    strides: tuple[int, int]


# A walk as the arguments of a registered op: integers, and two tables where there is a mask.
Arguments = tuple[Sequence[int], Tensor | None, Tensor | None]


def arguments_of(segments: Segments) -> Arguments:
    """What `walk_of` makes a walk of."""
    masked = segments.masked
    if masked is None:
        return segments.flatten(), None, None
    return replace(segments, masked=None).flatten(), masked.order, masked.index


def segments_of(walk: Sequence[int], order: Tensor | None, index: Tensor | None) -> Segments:
    """The traversal of which `arguments_of` made these."""
    segments = Segments.unflatten(walk)
    if order is None or index is None:
        return segments
    steps = segments.num_segments if segments.pools else order.shape[1]
    return replace(segments, masked=MaskedPath.build(order, index, steps))


def walk_of(walk: Sequence[int], order: Tensor | None, index: Tensor | None) -> Walk:
    """The tables of a traversal. Those without a mask are kept for the next layer."""
    if order is None or index is None:
        return _unmasked(tuple(walk))
    segments = Segments.unflatten(walk)
    steps = segments.num_segments if segments.pools else order.shape[1]
    tokens = torch.empty_like(index).scatter(2, order.expand_as(index), index)
    sequences, length = order.shape
    size, strides = segments.segment_size, (sequences * length, length if sequences > 1 else 0)
    return Walk(order.contiguous(), index.contiguous(), tokens, steps, length, size, strides)


@functools.lru_cache(maxsize=256)
def _unmasked(walk: tuple[int, ...]) -> Walk:
    segments = Segments.unflatten(walk)
    length = segments.num_tokens
    order, index = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.int64)
    rest, run, together = torch.arange(length), 1, True
    axes = (segments.sizes, segments.strides, segments.segment_strides, segments.pooled)
    for size, stride, segment_stride, pooled in zip(*map(reversed, axes), strict=True):
        digit = rest % size
        order += digit * stride
        index += digit * segment_stride
        rest = rest // size
        if size > 1:
            run = (run * size if together else length) if pooled else run
            together = together and pooled
    if not segments.pools:
        index, run = torch.arange(length), 1
    tokens = torch.empty_like(index).scatter(0, order, index)
    tables, size = (order[None], index[None, None], tokens[None, None]), segments.segment_size
    return Walk(*tables, segments.num_segments, run, size, (0, 0))
