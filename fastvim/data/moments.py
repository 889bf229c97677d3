"""Mean and standard deviation of each channel over many image files.

C, H, W: channels, height and width
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastvim.data.arrays import read_array
from fastvim.data.parallel import read_in_order
from fastvim.data.remote import UnreadableFileError
from fastvim.errors import UserError

FAR = 10  # deviations between a mean and the one that training subtracts
FLAT = 0.01  # deviation after training has divided by another one

Measured = tuple[str, "Moments | UnreadableFileError"]  # a path and its image's moments, or why not


class Moments(NamedTuple):
    """Of each channel: the number of values, their mean and the sum of squared deviations.

    Attributes:
        number: values per channel.
        mean: float64 (C,).
        squares: float64 (C,).
    """

    number: int
    mean: np.ndarray
    squares: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """The standard deviations, float64 (C,)."""
        return np.sqrt(self.squares / self.number)

    @classmethod
    def of(cls, image: np.ndarray) -> Moments:
        """Those of an image (C, H, W)."""
        values = image.reshape(len(image), -1).astype(np.float64)
        mean = values.mean(axis=1)
        return cls(values.shape[1], mean, ((values - mean[:, None]) ** 2).sum(axis=1))

    def __or__(self, other: Moments) -> Moments:
        """Those of both sets of values (Chan, Golub, LeVeque 1979)."""
        number = self.number + other.number
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.number / number)
        between = delta**2 * (self.number * other.number / number)
        return Moments(number, mean, self.squares + other.squares + between)


class ChannelValues:
    """Lowest and highest value and moments of each channel of the images of a split."""

    def __init__(self) -> None:
        self._moments: Moments | None = None
        self._lowest = self._highest = np.zeros(0)

    def add(self, number: int, channels: Sequence[Sequence[float]]) -> None:
        """Take an image of this number of values in each channel, and what `seen` says of them."""
        lowest, highest, mean, squares = np.asarray(channels, dtype=np.float64).T
        moments = Moments(number, mean, squares)
        if self._moments is None:
            self._moments, self._lowest, self._highest = moments, lowest, highest
            return
        self._moments |= moments
        self._lowest = np.minimum(self._lowest, lowest)
        self._highest = np.maximum(self._highest, highest)

    def constant(self) -> list[str]:
        """The channels of one value, in words."""
        return [
            f"channel {channel}, always {low:g}"
            for channel, (low, high) in enumerate(zip(self._lowest, self._highest, strict=True))
            if low == high
        ]

    def unlike(self, mean: Sequence[float], std: Sequence[float]) -> list[str]:
        """The channels that lie far from what training takes for their mean and deviation."""
        if self._moments is None:
            return []
        own = zip(self._moments.mean, self._moments.std, mean, std, strict=True)
        return [
            f"channel {channel} with mean {m:.4g} and std {s:.4g}, given mean {given:g} and std "
            f"{divisor:g}"
            for channel, (m, s, given, divisor) in enumerate(own)
            if s > 0 and (abs(m - given) > FAR * divisor or s < FLAT * divisor)
        ]


def seen(image: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Lowest, highest value, mean and squared deviations of each channel of an image (C, H, W)."""
    moments = Moments.of(image)
    lowest, highest = image.min(axis=(1, 2)), image.max(axis=(1, 2))
    columns = (lowest, highest, moments.mean, moments.squares)
    return tuple(zip(*(column.tolist() for column in columns), strict=True))


def measure(paths: list[str], workers: int, **reading: Any) -> Iterator[Measured]:
    """The moments of each image, in the order of the paths.

    Args:
        paths: files or URLs that `read_array` opens.
        workers: files read at a time.
        reading: further arguments of `read_array`.
    """

    def moments(path: str) -> Moments:
        return Moments.of(read_array(path, **reading))

    results = read_in_order(moments, paths, workers, UnreadableFileError)
    return zip(paths, results, strict=True)


def add_up(
    measured: Iterable[Measured], skip_unreadable: bool = False
) -> tuple[Moments | None, int, list[UnreadableFileError]]:
    """The moments of all images, how many those are, and why the others were skipped.

    Args:
        measured: of `measure`.
        skip_unreadable: leave out what cannot be read.

    Raises:
        UserError: images with different numbers of channels; `UnreadableFileError` for a file that
            is not to be skipped.
    """
    total: Moments | None = None
    used, skipped = 0, []
    for path, result in measured:
        if isinstance(result, UnreadableFileError):
            if not skip_unreadable:
                raise result
            skipped.append(result)
        elif total is not None and len(result.mean) != len(total.mean):
            raise UserError(
                f"{path}: {len(result.mean)} channels; those before have {len(total.mean)}"
            )
        else:
            total, used = result if total is None else total | result, used + 1
    return total, used, skipped
