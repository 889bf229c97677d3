"""Paths and segments of a token grid: one notation for every variant of the model.

Tokens always lie in memory in the row-major order of the grid's axes. A layer does not move them.
It states how it walks them (`path`) and which axes it pools (`pool`).

    B  batch       n  tokens present: L, or the kept ones under a mask
    L  grid cells  S  segments: a segment is all cells that differ only along pooled axes
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "max"]
Mirror = Literal["published", "exact"]


@dataclass(frozen=True)
class Traversal:
    """The walk of one layer over named axes (FastVim paper, section 3.2).

    Args:
        path: axis names, slowest first. `"h w"` walks row by row, `"w h"` column by column.
        pool: axes whose cells are pooled into one segment. Empty: nothing is pooled (Vim).

    Raises:
        ValueError: an axis repeated, or pooled but not on the path.
    """

    path: str
    pool: str = ""

    def __post_init__(self) -> None:
        axes = self.path.split()
        if not axes or len(set(axes)) != len(axes):
            raise ValueError(f"path={self.path!r}: expected distinct axis names, such as 'h w'")
        if unknown := set(self.pool.split()) - set(axes):
            raise ValueError(f"pool={self.pool!r}: {sorted(unknown)} not on the path {self.path!r}")

    def over(
        self, grid: Mapping[str, int], ids_keep: Tensor | None = None, mirror: Mirror = "published"
    ) -> Segments:
        """Apply the walk to a grid.

        Args:
            grid: size of each axis, in memory order (slowest first).
            ids_keep: (B, n) int64, row-major indices of the cells that a mask leaves, ascending.
                None: every cell is present.
            mirror: which segments the backward direction of a masked layer uses (see
                `Segments.keep`). Without a mask both choices are the same.

        Raises:
            ValueError: the grid's axes are not the path's.
        """
        axes = self.path.split()
        if set(axes) != set(grid):
            raise ValueError(f"grid axes {list(grid)} do not match the path {self.path!r}")
        pooled = self.pool.split()
        walk = Segments(
            sizes=tuple(grid[a] for a in axes),
            by_memory=tuple(axes.index(a) for a in grid),
            pooled=tuple(a in pooled for a in axes),
        )
        return walk if ids_keep is None else walk.keep(ids_keep, mirror)


@dataclass(frozen=True)
class MaskedPath:
    """Index tables of a walk over the cells that a mask leaves.

    Attributes:
        order: (B, n) memory index of the token at each path position.
        ids_restore: (B, n) path position of the token at each memory index, inverse of `order`.
        index: (2, B, n) segment of each path position, one row per direction.
        members: (2, B, n) path positions, sorted by segment.
        tokens: (2, B, n) memory indices of `members`.
        starts: (2, B, S + 1) where each segment begins in `members`.
    """

    order: Tensor
    ids_restore: Tensor
    index: Tensor
    members: Tensor
    tokens: Tensor
    starts: Tensor

    @staticmethod
    def build(order: Tensor, index: Tensor, num_segments: int) -> MaskedPath:
        """Derive all tables from two of them."""
        steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
        ids_restore = torch.zeros_like(order).scatter(1, order, steps)
        ascending, members = index.sort(dim=2, stable=True)
        numbers = torch.arange(num_segments + 1, device=index.device)
        starts = torch.searchsorted(ascending, numbers.repeat(*index.shape[:2], 1))
        tokens = order.expand_as(members).gather(2, members)
        return MaskedPath(order, ids_restore, index, members, tokens, starts)


@dataclass(frozen=True)
class Segments:
    """A traversal of a given grid: what the ops need to know of the token order.

    Attributes:
        sizes: size of each axis, in path order (slowest first). They may be symbols of a compiler:
            nothing here asks how they compare.
        by_memory: path axes from the slowest in memory to the fastest.
        pooled: whether each axis is pooled, in path order.
        masked: tables of the cells that a mask leaves. None: every cell is present.
    """

    sizes: tuple[int, ...]
    by_memory: tuple[int, ...]
    pooled: tuple[bool, ...]
    masked: MaskedPath | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of each sequence."""
        return prod(self.sizes) if self.masked is None else self.masked.order.shape[1]

    @property
    def pools(self) -> bool:
        """Whether any axis is pooled."""
        return any(self.pooled)

    @property
    def num_segments(self) -> int:
        """Steps of the scan. Without pooling each token is a step."""
        if not self.pools:
            return self.num_tokens
        return prod([n for n, pool in zip(self.sizes, self.pooled, strict=True) if not pool])

    @property
    def segment_size(self) -> int:
        """Cells of a full segment. A mean divides by it, masked or not."""
        return prod([n for n, pool in zip(self.sizes, self.pooled, strict=True) if pool])

    @property
    def strides(self) -> tuple[int, ...]:
        """Tokens between neighbours along each axis in memory, in path order."""
        strides, step = [0] * len(self.sizes), 1
        for axis in reversed(self.by_memory):
            strides[axis] = step
            step *= self.sizes[axis]
        return tuple(strides)

    @property
    def segment_strides(self) -> tuple[int, ...]:
        """Segments between neighbours along each axis, in path order; 0 along pooled axes.

        Segments are numbered in the order in which the path first meets them.
        """
        strides, step = [], 1
        for size, pooled in zip(reversed(self.sizes), reversed(self.pooled), strict=True):
            strides.append(0 if pooled else step)
            step *= 1 if pooled else size
        return tuple(reversed(strides))

    @property
    def in_memory_order(self) -> bool:
        """Whether the path follows the tokens' order in memory."""
        return self.masked is None and self.by_memory == tuple(range(len(self.sizes)))

    def flatten(self) -> tuple[int, ...]:
        """An unmasked walk as integers, the form in which torch's registered ops take it."""
        assert self.masked is None
        return (*self.sizes, *self.by_memory, *map(int, self.pooled))

    @staticmethod
    def unflatten(walk: Sequence[int]) -> Segments:
        """The walk that `flatten` gave. Eager calls pass the same tuple again and again."""
        return _cached_walk(walk) if isinstance(walk, tuple) else _walk(walk)

    def keep(self, ids_keep: Tensor, mirror: Mirror = "published") -> Segments:
        """The same walk over the cells of a mask (see `Traversal.over`).

        In the backward direction "exact" uses the segments of the forward one. "published" does
        what the published models do: position j of the reversed sequence holds token n-1-j, but
        uses the segment of token j.
        """
        if mirror not in ("published", "exact"):
            raise ValueError(f"mirror={mirror!r}: expected 'published' or 'exact'")
        if ids_keep.ndim != 2 or ids_keep.is_floating_point():
            raise ValueError(
                f"ids_keep: expected integer indices (B, n), got {tuple(ids_keep.shape)}"
            )
        ids_keep = ids_keep.contiguous()  # kernels read it and the tables made of it
        position = torch.zeros_like(ids_keep)
        segment = torch.zeros_like(ids_keep)
        path_step = prod(self.sizes)
        for size, stride, segment_stride in zip(
            self.sizes, self.strides, self.segment_strides, strict=True
        ):
            path_step //= size
            digit = ids_keep // stride % size
            position = position + digit * path_step
            segment = segment + digit * segment_stride
        order = position.argsort(dim=1)
        if not self.pools:
            steps = torch.arange(ids_keep.shape[1], device=ids_keep.device).expand_as(ids_keep)
            index = torch.stack([steps, steps])
        else:
            forward = segment.gather(1, order)
            # The published models scan these segments in ascending order. They are renumbered
            # s -> S-1-s, since the backward scan here always runs in descending order.
            flipped = self.num_segments - 1 - forward.flip(1)
            index = torch.stack([forward, flipped if mirror == "published" else forward])
        segments = self.num_segments if self.pools else ids_keep.shape[1]
        return replace(self, masked=MaskedPath.build(order, index, segments))

    def to_path(self, x: Tensor) -> Tensor:
        """(B, n, E) from memory order to path order."""
        if self.masked is not None:
            return x.gather(1, self.masked.order[:, :, None].expand_as(x))
        if self.in_memory_order:
            return x
        grid: Tensor = x.unflatten(1, [self.sizes[axis] for axis in self.by_memory])
        axes = [1 + self.by_memory.index(axis) for axis in range(len(self.sizes))]
        return grid.permute(0, *axes, -1).flatten(1, -2)

    def from_path(self, x: Tensor) -> Tensor:
        """(B, n, E) from path order back to memory order."""
        if self.masked is not None:
            return x.gather(1, self.masked.ids_restore[:, :, None].expand_as(x))
        if self.in_memory_order:
            return x
        axes = [1 + axis for axis in self.by_memory]
        grid: Tensor = x.unflatten(1, self.sizes)
        return grid.permute(0, *axes, -1).flatten(1, -2)

    def sum_of_path(self, x: Tensor) -> Tensor:
        """Sum (B, L, E) in path order over each segment of an unmasked walk, to (B, S, E)."""
        assert self.masked is None
        axes = [1 + axis for axis, pooled in enumerate(self.pooled) if pooled]
        grid: Tensor = x.unflatten(1, self.sizes)
        return grid.sum(axes).reshape(x.shape[0], self.num_segments, x.shape[-1])

    def reduce(self, x: Tensor, pooling: Pooling) -> Tensor:
        """Pool (2, B, n, E) in path order to one value per segment, (2, B, S, E).

        A mean divides by the full `segment_size`. A segment without tokens is 0.
        """
        if not self.pools:
            return x
        if self.masked is not None:
            shape = (*x.shape[:2], self.num_segments, x.shape[-1])
            index = self.masked.index[..., None].expand_as(x)
            if pooling == "mean":
                return x.new_zeros(shape).scatter_add(2, index, x) / self.segment_size
            return x.new_zeros(shape).scatter_reduce(2, index, x, "amax", include_self=False)
        axes = [2 + axis for axis, pooled in enumerate(self.pooled) if pooled]
        grid: Tensor = x.unflatten(2, self.sizes)
        values = grid.mean(axes) if pooling == "mean" else grid.amax(axes)
        # By way of one axis: torch.export would ask how the merged axes' sizes compare.
        return values.flatten().view(*x.shape[:2], self.num_segments, x.shape[-1])

    def broadcast(self, y: Tensor) -> Tensor:
        """Copy (2, B, S, E), one value per segment, to its tokens in path order, (2, B, n, E)."""
        if not self.pools:
            return y
        if self.masked is not None:
            index = self.masked.index
            return y.gather(2, index[..., None].expand(*index.shape, y.shape[-1]))
        sizes = [
            1 if pooled else size for size, pooled in zip(self.sizes, self.pooled, strict=True)
        ]
        grid: Tensor = y.unflatten(2, sizes)
        return grid.expand(*y.shape[:2], *self.sizes, y.shape[-1]).flatten(2, -2)


def _walk(walk: Sequence[int]) -> Segments:
    axes = len(walk) // 3
    pooled = tuple(bool(pool) for pool in walk[2 * axes :])
    return Segments(tuple(walk[:axes]), tuple(walk[axes : 2 * axes]), pooled)


_cached_walk = functools.lru_cache(maxsize=4096)(_walk)
