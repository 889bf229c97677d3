"""How a channel model does with fewer channels than it was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import comb

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastvim.errors import UserError
from fastvim.models import FastChannelVim
from fastvim.options import COUNT, check_given
from fastvim.pictures.colours import BLUE, GREEN, GREY, ORANGE, VIOLET

COLOURS = (BLUE, ORANGE, GREEN, GREY, VIOLET)

Subset = tuple[int, ...]


def channel_subsets(count: int, most: int | None = None, seed: int = 0) -> list[Subset]:
    """Subsets of `count` channels, each in ascending order, the smallest first.

    Args:
        count: of the channels.
        most: subsets of each size at most, a random choice of them; None for all.
        seed: of that choice.

    Raises:
        UserError: `most` below 1.
    """
    check_given(COUNT, most=most)
    draw = np.random.default_rng(seed)
    subsets: list[Subset] = []
    for size in range(1, count + 1):
        if most is None or comb(count, size) <= most:
            subsets += combinations(range(count), size)
            continue
        chosen: set[Subset] = set()
        while len(chosen) < most:
            drawn = draw.choice(count, size, replace=False)
            chosen.add(tuple(int(channel) for channel in np.sort(drawn)))
        subsets += sorted(chosen)
    return subsets


@torch.inference_mode()
def subset_accuracies(
    model: FastChannelVim, batches: Iterable[tuple[Tensor, Tensor]], subsets: Sequence[Subset]
) -> dict[Subset, float]:
    """Accuracy of the same weights on each subset of the channels.

    Args:
        model: in eval mode.
        batches: images (B, C, H, W) of all channels, and targets (B,).
        subsets: of the channels.

    Raises:
        UserError: no images.
    """
    device = model.pos_embed.device
    indices = [torch.tensor(subset, device=device) for subset in subsets]
    right, seen = torch.zeros(len(subsets), dtype=torch.int64, device=device), 0
    for images, target in batches:
        images, target = images.to(device), target.to(device)
        for i, channels in enumerate(indices):
            right[i] += (model(images[:, channels], channels).argmax(1) == target).sum()
        seen += len(target)
    if seen == 0:
        raise UserError("no images to evaluate")
    return dict(zip(subsets, (right / seen).tolist(), strict=True))


def by_size(accuracies: Mapping[Subset, float]) -> dict[int, list[float]]:
    """The accuracies of all subsets of each size, the smallest size first."""
    sizes: dict[int, list[float]] = {}
    for subset in sorted(accuracies, key=len):
        sizes.setdefault(len(subset), []).append(accuracies[subset])
    return sizes


def draw_subsets(accuracies: Mapping[str, Mapping[Subset, float]], title: str) -> Figure:
    """Accuracy against the number of channels: the mean over subsets, and every subset.

    Args:
        accuracies: of each model, by its name.
        title: above the axes.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (name, scores) in enumerate(accuracies.items()):
        colour = COLOURS[i % len(COLOURS)]
        sizes = by_size(scores)
        means = [float(np.mean(values)) for values in sizes.values()]
        axes.plot(list(sizes), means, color=colour, linewidth=2.2, label=name, zorder=3)
        shift = 0.08 * (i - (len(accuracies) - 1) / 2)  # apart, where subsets do equally well
        for size, points in sizes.items():
            places = [size + shift] * len(points)
            axes.scatter(places, points, s=16, color=colour, alpha=0.45, linewidth=0, zorder=2)
    count = max(len(subset) for scores in accuracies.values() for subset in scores)
    axes.set(xlabel="channels", ylabel="accuracy", xticks=range(1, count + 1), title=title)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="y", color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, loc="lower right").get_texts():
        text.set_parse_math(False)  # names may hold a $
    return figure
