"""Paths and segments of every variant, against walking the axes one cell at a time."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import walk

from fastvim.models.walks import grid_traversals
from fastvim.ops import Traversal

few = settings(max_examples=25, deadline=None, derandomize=True)

# Every walk of the table in docs/architecture.md. All layers of a variant share one order of the
# grid's axes in memory.
FLAT = ("h", "w")
CHANNELS_LAST = ("h", "w", "c")
CHANNELS_FIRST = ("c", "h", "w")
WALKS = [
    ("h w", "w", FLAT),  # FastVim, even layers; odd ones of scan_path="column"
    ("w h", "h", FLAT),  # FastVim, odd layers; even ones of scan_path="column"
    ("h w", "", FLAT),  # Vim
    ("h w c", "w", CHANNELS_LAST),  # FastChannelVim, channel-first
    ("w h c", "h", CHANNELS_LAST),
    ("c h w", "w", CHANNELS_FIRST),  # FastChannelVim, spatial-first
    ("c w h", "h", CHANNELS_FIRST),
    ("h w c", "w c", CHANNELS_LAST),  # FastChannelVim, two axes pooled
    ("w h c", "h c", CHANNELS_LAST),
    ("h w c", "h w", CHANNELS_LAST),
    ("h w c", "", CHANNELS_LAST),  # ChannelVim
    ("l", "", ("l",)),  # Vim with a class token among its tokens
    # Not in that table: every axis pooled, and other orders in memory.
    ("h w", "h w", FLAT),
    ("h w c", "w", CHANNELS_FIRST),
    ("w c h", "c h", ("h", "c", "w")),
]
SIZES = [(2, 3, 4), (3, 2, 5), (5, 7, 3), (1, 4, 3), (4, 1, 3), (3, 4, 1), (1, 1, 1), (1, 1, 5)]

every_walk = pytest.mark.parametrize(
    ("path", "pool", "axes"), WALKS, ids=[f"{p}|{q}|{''.join(a)}" for p, q, a in WALKS]
)


def grids(axes: tuple[str, ...]) -> list[dict[str, int]]:
    """Odd, non-square and thin grids of these axes, in memory order."""
    return [dict(zip(axes, sizes, strict=False)) for sizes in SIZES]


def tokens(*shape: int) -> torch.Tensor:
    """Distinct values in a scrambled order, so that every position is recognised."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(prod(shape), generator=generator).double().reshape(shape)


def segment_index(segments, batch: int = 1) -> torch.Tensor:
    """(2, B, n) segment of each path position, read through `broadcast`."""
    numbers = torch.arange(segments.num_segments)[:, None].expand(2, batch, -1, 1)
    return segments.broadcast(numbers.double())[..., 0].long()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("mean", "row", True), [("h w", "w"), ("w h", "h")]),
        (("max", "column", True), [("w h", "h"), ("h w", "w")]),
        (("mean", "row", False), [("h w", "w")]),
        (("mean", "column", False), [("w h", "h")]),
        (("none", "row", True), [("h w", "")]),
    ],
)
def test_layers_take_the_walks_of_their_variant(options, expected):
    assert [(t.path, t.pool) for t in grid_traversals(*options)] == expected


@every_walk
def test_order_and_segments(path, pool, axes):
    for grid in grids(axes):
        expected = walk(path, pool, grid)
        segments = Traversal(path, pool).over(grid)
        places = torch.arange(prod(grid.values())).double()[None, :, None]
        assert segments.to_path(places).flatten().tolist() == expected.order
        assert segment_index(segments).tolist() == [[s] for s in expected.segments]
        assert segments.num_tokens == prod(grid.values())
        assert segments.num_segments == expected.num_segments
        assert segments.segment_size == expected.segment_size
        assert segments.pools == bool(pool)
        assert segments.sizes == tuple(grid[a] for a in path.split())
        assert segments.pooled == tuple(a in pool.split() for a in path.split())
        # With an axis of size 1 it may be False although the order is the memory's.
        in_memory_order = expected.order == sorted(expected.order)
        assert segments.in_memory_order <= in_memory_order
        if 1 not in grid.values():
            assert segments.in_memory_order == in_memory_order


@every_walk
def test_strides_lead_from_path_digits_to_memory_and_segment(path, pool, axes):
    for grid in grids(axes):
        expected = walk(path, pool, grid)
        segments = Traversal(path, pool).over(grid)
        for position, digits in enumerate(np.ndindex(segments.sizes)):
            assert np.dot(segments.strides, digits) == expected.order[position]
            assert np.dot(segments.segment_strides, digits) == expected.segments[0][position]


@every_walk
def test_to_path_and_from_path_undo_each_other(path, pool, axes):
    for grid in grids(axes):
        segments = Traversal(path, pool).over(grid)
        x = tokens(2, prod(grid.values()), 3)
        walked = segments.to_path(x)
        assert torch.equal(walked, x[:, walk(path, pool, grid).order])
        assert torch.equal(segments.from_path(walked), x)
        assert torch.equal(segments.to_path(segments.from_path(x)), x)


def brute_reduce(x: torch.Tensor, walks: list, pooling: str) -> torch.Tensor:
    out = torch.zeros(2, x.shape[1], walks[0].num_segments, x.shape[3], dtype=x.dtype)
    for place in np.ndindex(2, *out.shape[1:3]):
        direction, b, s = place
        members = [p for p, own in enumerate(walks[b].segments[direction]) if own == s]
        if members:
            values = x[direction, b, members]
            out[place] = (
                values.sum(0) / walks[b].segment_size if pooling == "mean" else values.amax(0)
            )
    return out


@pytest.mark.parametrize("pooling", ["mean", "max"])
@every_walk
def test_reduce_and_broadcast(path, pool, axes, pooling):
    for grid in grids(axes):
        expected = walk(path, pool, grid)
        segments = Traversal(path, pool).over(grid)
        x = tokens(2, 3, segments.num_tokens, 2) - 50  # negative: a maximum with 0 would show
        reduced = segments.reduce(x, pooling)
        torch.testing.assert_close(reduced, brute_reduce(x, [expected] * 3, pooling))
        y = tokens(2, 3, segments.num_segments, 2)
        for own, there, index in zip(y, segments.broadcast(y), expected.segments, strict=True):
            assert torch.equal(there, own[:, index])


@given(data=st.data())
@few
def test_any_walk_over_any_grid(data):
    axes = data.draw(st.permutations(["a", "b", "c", "d"]).map(lambda a: a[:3]))
    grid = {axis: data.draw(st.integers(1, 4)) for axis in axes}
    path = " ".join(data.draw(st.permutations(axes)))
    pool = " ".join(data.draw(st.sets(st.sampled_from(axes), max_size=3)))
    expected = walk(path, pool, grid)
    segments = Traversal(path, pool).over(grid)
    x = tokens(1, segments.num_tokens, 1)
    assert segments.to_path(x).flatten().tolist() == x[0, expected.order, 0].tolist()
    assert torch.equal(segments.from_path(segments.to_path(x)), x)
    assert segment_index(segments)[0, 0].tolist() == expected.segments[0]
    x = x.expand(2, 1, -1, -1)
    torch.testing.assert_close(segments.reduce(x, "mean"), brute_reduce(x, [expected], "mean"))


# Masks.


def draw_kept(cells: int, keep: int, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(cells)
    noise = torch.rand(batch, cells, generator=generator)
    return noise.argsort(1)[:, :keep].sort(1).values


@pytest.mark.parametrize("mirror", ["published", "exact"])
@every_walk
def test_kept_cells(path, pool, axes, mirror):
    grid = dict(zip(axes, (3, 5, 2), strict=False))
    cells = prod(grid.values())
    kept = draw_kept(cells, keep=max(1, cells * 2 // 5))
    walks = [walk(path, pool, grid, k, mirror) for k in kept.tolist()]
    segments = Traversal(path, pool).over(grid, kept, mirror)
    assert segments.num_tokens == kept.shape[1]
    assert torch.equal(segments.masked.ids_restore, segments.masked.order.argsort(1))
    assert segments.num_segments == walks[0].num_segments
    assert segments.segment_size == walks[0].segment_size
    x = tokens(3, kept.shape[1], 2)
    walked = segments.to_path(x)
    for b in range(3):
        assert torch.equal(walked[b], x[b, walks[b].order])
        for direction in range(2):
            expected = walks[b].segments[direction]
            assert segment_index(segments, 3)[direction, b].tolist() == expected
            assert segments.masked.index[direction, b].tolist() == expected
    assert torch.equal(segments.from_path(walked), x)
    x = tokens(2, 3, kept.shape[1], 2) - 50
    for pooling in ("mean", "max"):
        torch.testing.assert_close(segments.reduce(x, pooling), brute_reduce(x, walks, pooling))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_segments_without_a_token_are_zero(pooling):
    kept = torch.tensor([[0, 1, 8], [3, 4, 5]])  # rows 0 and 2 of 3; row 1 alone
    segments = Traversal("h w", "w").over({"h": 3, "w": 3}, kept, "exact")
    x = torch.full((2, 2, 3, 1), -6.0)
    pooled = segments.reduce(x, pooling)[0, :, :, 0]
    one, two, three = (-2.0, -4.0, -6.0) if pooling == "mean" else (-6.0,) * 3
    assert pooled.tolist() == [[two, 0.0, one], [0.0, three, 0.0]]


@pytest.mark.parametrize("mirror", ["published", "exact"])
@every_walk
def test_nothing_masked_is_the_unmasked_walk(path, pool, axes, mirror):
    grid = dict(zip(axes, (3, 4, 2), strict=False))
    cells = prod(grid.values())
    plain = Traversal(path, pool).over(grid)
    masked = Traversal(path, pool).over(grid, torch.arange(cells).expand(2, -1), mirror)
    x = tokens(2, cells, 3)
    assert torch.equal(masked.to_path(x), plain.to_path(x))
    assert torch.equal(segment_index(masked, 2), segment_index(plain, 2))
    x = tokens(2, 2, cells, 3)
    for pooling in ("mean", "max"):
        torch.testing.assert_close(masked.reduce(x, pooling), plain.reduce(x, pooling))


def reflected(kept: torch.Tensor, cells: int) -> torch.Tensor:
    """The same mask on a grid turned about its centre, which reverses every walk."""
    return (cells - 1 - kept).flip(1)


@pytest.mark.parametrize(
    ("path", "pool", "axes"), [w for w in WALKS if w[1]], ids=lambda v: "".join(v)
)
@given(data=st.data())
@few
def test_exact_mirror_is_the_forward_walk_of_the_turned_grid(path, pool, axes, data):
    grid = {axis: data.draw(st.integers(1, 4)) for axis in axes}
    cells = prod(grid.values())
    chosen = data.draw(st.sets(st.integers(0, cells - 1), min_size=1))
    kept = torch.tensor([sorted(chosen)])
    segments = Traversal(path, pool).over(grid, kept, "exact")
    turned = Traversal(path, pool).over(grid, reflected(kept, cells), "exact")
    backward = segment_index(segments)[1, 0]
    forward = segment_index(turned)[0, 0]
    assert backward.flip(0).tolist() == (segments.num_segments - 1 - forward).tolist()
    places = torch.arange(len(chosen)).double()[None, :, None]
    assert torch.equal(segments.to_path(places).flip(1), len(chosen) - 1 - turned.to_path(places))


def test_published_mirror_is_no_mirror_image_under_a_mask():
    kept = torch.tensor([[0, 1, 2, 8]])
    grid = {"h": 3, "w": 3}
    published = Traversal("h w", "w").over(grid, kept, "published")
    # Reversed position 0 holds token 8, of row 2, but pools into row 0, the first step of its scan.
    assert segment_index(published)[1, 0].tolist() == [0, 2, 2, 2]
    exact = Traversal("h w", "w").over(grid, kept, "exact")
    assert segment_index(exact)[1, 0].tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize("path", ["", "h h", "h w h"])
def test_a_path_names_each_axis_once(path):
    with pytest.raises(ValueError, match="path="):
        Traversal(path)


@pytest.mark.parametrize("pool", ["c", "w c"])
def test_pooled_axes_are_on_the_path(pool):
    with pytest.raises(ValueError, match="'c'"):
        Traversal("h w", pool)


@pytest.mark.parametrize("grid", [{"h": 3}, {"h": 3, "w": 3, "c": 2}, {"h": 3, "c": 3}])
def test_the_grid_has_the_axes_of_the_path(grid):
    with pytest.raises(ValueError, match="h w"):
        Traversal("h w").over(grid)


@pytest.mark.parametrize(
    ("kept", "mirror", "message"),
    [
        (torch.zeros(1, 2, dtype=torch.int64), "forward", "mirror='forward'"),
        (torch.zeros(2, dtype=torch.int64), "exact", r"\(2,\)"),
        (torch.zeros(1, 2), "exact", "integer"),
    ],
)
def test_bad_masks(kept, mirror, message):
    with pytest.raises(ValueError, match=message):
        Traversal("h w", "w").over({"h": 3, "w": 3}, kept, mirror)
