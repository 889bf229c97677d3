"""What all drawn sets share: random numbers, and the registers of faults and oddities."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

SIDE = 16
NAMES = ("ant", "bee", "cat", "dog")
ORIENTATION = 0x0112  # the EXIF tag
MODEL = "fastvim_tiny_patch16_224"
BLOCKS = {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 2}

Outcome = Literal["stops", "warns"]


@dataclass
class Drawn:
    """A set of files and the recipe that trains on it.

    Attributes:
        root: its folder.
        rng: draws all that is random in it.
        data: arguments of the data module.
        task: arguments of the task.
    """

    root: Path
    rng: np.random.Generator
    data: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)

    def pick(self, pattern: str) -> Path:
        """One of the files."""
        files = sorted(self.root.glob(pattern))
        return files[self.rng.integers(len(files))]

    def noise(self, width: int = 0, height: int = 0, channels: int = 3) -> np.ndarray:
        """uint8 (H, W, C), or (H, W) for one channel."""
        width, height = (side or int(self.rng.integers(SIDE, 2 * SIDE)) for side in (width, height))
        shape = (height, width, channels) if channels > 1 else (height, width)
        return self.rng.integers(0, 256, shape, dtype=np.uint8)

    def chance(self, share: float = 0.5) -> bool:
        return bool(self.rng.random() < share)


class Fault(NamedTuple):
    """A planted fault: whether a run stops before its first step, or warns and goes on right."""

    layout: str
    outcome: Outcome
    plant: Callable[[Drawn], str]


FAULTS: list[Fault] = []
ODDITIES: dict[str, list[Callable[[Drawn], None]]] = {}


def fault(layout: str, outcome: Outcome) -> Callable[[Any], Any]:
    def register(plant: Callable[[Drawn], str]) -> Callable[[Drawn], str]:
        FAULTS.append(Fault(layout, outcome, plant))
        return plant

    return register


def odd(layout: str) -> Callable[[Any], Any]:
    def register(change: Callable[[Drawn], None]) -> Callable[[Drawn], None]:
        ODDITIES.setdefault(layout, []).append(change)
        return change

    return register


def named(path: Path) -> str:
    """The pattern of a file's name."""
    return re.escape(path.name)
