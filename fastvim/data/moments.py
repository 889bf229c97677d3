"""Mean and deviation of images' channels, file by file."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Of each channel: the number of values, their mean and the sum of squared deviations.

    Attributes:
        number: of one channel; all have as many.
        mean: float64 (C,).
        squares: float64 (C,).
    """

    number: int
    mean: np.ndarray
    squares: np.ndarray

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
