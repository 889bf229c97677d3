"""Run lengths of many masks at once: whether they fit their images, and what they show.

Pixels are counted down the columns, and the first run is of pixels outside of the object.
`fastvim.models.heads.results` says how COCO writes run lengths as text.

n: masks; H: an image's height
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

MOST_DIGITS = 7  # of a number in a text: enough for 2**34 pixels
LONGEST_RUN = 1 << 34


class Shown(NamedTuple):
    """What masks show.

    Attributes:
        pixels: of the whole image, as their runs have it, int64 (n,); -1 for what are no runs.
        area: pixels of the object, int64 (n,).
        bounds: of the object, x1, y1, x2, y2, int64 (n, 4); 0 without one.
    """

    pixels: np.ndarray
    area: np.ndarray
    bounds: np.ndarray


def shown(counts: Sequence[str | list[int]], heights: np.ndarray) -> Shown:
    """What masks show.

    Args:
        counts: of each mask, text or numbers, not empty.
        heights: H of their images, int64 (n,).
    """
    pixels, area = np.full(len(counts), -1), np.zeros(len(counts), dtype=np.int64)
    bounds = np.zeros((len(counts), 4), dtype=np.int64)
    for indices, runs, sizes in (_of_numbers(counts), _of_texts(counts)):
        if not len(indices):
            continue
        starts = np.cumsum(sizes) - sizes
        ok = np.minimum.reduceat(runs, starts) >= 0
        ends = np.cumsum(runs)
        before = (ends - runs)[starts]
        pixels[indices] = np.where(ok, np.add.reduceat(runs, starts), -1)
        place = np.arange(len(runs)) - np.repeat(starts, sizes)
        of_object = (place % 2 == 1) & (runs > 0)
        area[indices] = np.add.reduceat(np.where(of_object, runs, 0), starts)
        last = ends - np.repeat(before, sizes) - 1
        bounds[indices] = _bounds(last - runs + 1, last, of_object, starts, heights[indices], sizes)
    bounds[area == 0] = 0
    return Shown(pixels, area, bounds)


def _bounds(
    first: np.ndarray,
    last: np.ndarray,
    of_object: np.ndarray,
    starts: np.ndarray,
    heights: np.ndarray,
    sizes: np.ndarray,
) -> np.ndarray:
    """x1, y1, x2, y2 of the object in each mask, from the first and last pixels of all runs."""
    height = np.repeat(heights, sizes)
    x1, x2 = first // height, last // height
    whole = x1 != x2  # a run that goes on in the next column touches both borders
    y1 = np.where(whole, 0, first % height)
    y2 = np.where(whole, height - 1, last % height)
    most = np.iinfo(np.int64).max
    low = [np.minimum.reduceat(np.where(of_object, v, most), starts) for v in (x1, y1)]
    high = [np.maximum.reduceat(np.where(of_object, v, -1), starts) + 1 for v in (x2, y2)]
    return np.stack(low + high, axis=1)


def _of_numbers(counts: Sequence[str | list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the masks that are numbers, all their runs, and how many each has."""
    chosen = [i for i, each in enumerate(counts) if isinstance(each, list)]
    sizes = np.array([len(counts[i]) for i in chosen], dtype=np.int64)
    runs = np.fromiter(chain.from_iterable(counts[i] for i in chosen), np.int64, int(sizes.sum()))
    return np.array(chosen, dtype=np.int64), runs, sizes


def _of_texts(counts: Sequence[str | list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for those that are text and can be read."""
    chosen = [i for i, each in enumerate(counts) if isinstance(each, str) and _is_sound(each)]
    texts = [str(counts[i]).encode("ascii") for i in chosen]
    digits = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - ord("0")
    if not texts:
        return np.zeros(0, dtype=np.int64), digits, np.zeros(0, dtype=np.int64)
    text_ends = np.cumsum([len(text) for text in texts])
    ends = np.flatnonzero(digits < 32)
    first = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - first + 1
    places = np.arange(digits.size) - np.repeat(first, lengths)
    numbers = np.add.reduceat((digits & 31) << 5 * np.minimum(places, MOST_DIGITS), first)
    numbers -= (digits[ends] >> 4 & 1) << 5 * np.minimum(lengths, MOST_DIGITS)
    sizes = np.diff(np.searchsorted(ends, text_ends - 1, side="right"), prepend=0)
    of = np.repeat(np.arange(len(texts)), sizes)
    place = np.arange(len(numbers)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    for later in ((place % 2 == 1), (place % 2 == 0) & (place > 0)):
        numbers[later] = _sums_within(numbers[later], of[later])
    too_long = np.bincount(of, lengths > MOST_DIGITS, len(texts)) > 0
    numbers[np.repeat(too_long, sizes)] = -1
    return np.array(chosen, dtype=np.int64), numbers, sizes


def _is_sound(text: str) -> bool:
    """Whether all characters are digits, and the last one ends a number."""
    return text.isascii() and min(text) >= "0" and max(text) <= "o" and text[-1] < "P"


def _sums_within(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Cumulative sums that begin anew with each value of `of`, which ascends."""
    sums = np.cumsum(values)
    first = np.flatnonzero(np.diff(of, prepend=-1))
    before = (sums - values)[first]
    return sums - np.repeat(before, np.diff(first, append=len(values)))
