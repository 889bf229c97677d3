"""JPEG files like photographs, for measurements that must not wait for a download."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, WIDTH, HEIGHT = 2048, 500, 375  # pixels of the field and of an image


@cache
def field() -> np.ndarray:
    """Noise (3, 2048, 2048) with a spectrum like photographs', of mean 0 and deviation 1."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    phases = generator.uniform(0, 2 * np.pi, (3, *frequency.shape))
    noise = np.fft.irfft2(np.exp(1j * phases) / np.maximum(frequency, 1 / 500) ** 1.2)
    return (noise / noise.std((1, 2), keepdims=True)).astype(np.float32)


def draw_photograph(folder: Path, number: int) -> int:
    """Write a JPEG file of 500 x 375 pixels, 4:2:0, cut from the field; returns its bytes.

    Args:
        folder: which is there.
        number: name and seed of the file.
    """
    generator = np.random.default_rng(number)
    top, left = generator.integers(0, SIDE - WIDTH, 2)
    pixels = field()[:, top : top + HEIGHT, left : left + WIDTH]
    noise = generator.normal(0, 4, (HEIGHT, WIDTH, 3))
    image = 128 + 45 * np.moveaxis(pixels, 0, 2) + noise
    path = folder / f"{number:05d}.jpg"
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=88)
    return path.stat().st_size


def draw_folders(root: Path, splits: Mapping[str, int], classes: int = 2) -> list[int]:
    """Write class folders of different files, `root/SPLIT/classN`, by a process on each core.

    Args:
        root: made if it is not there.
        splits: number of images of each split.
        classes: of each split.

    Returns:
        Bytes of every file.
    """
    splitted = chain.from_iterable([split] * count for split, count in splits.items())
    folders = [root / split / f"class{n % classes}" for n, split in enumerate(splitted)]
    for folder in set(folders):
        folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        return list(pool.map(draw_photograph, folders, range(len(folders)), chunksize=16))
