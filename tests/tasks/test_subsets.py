"""Accuracy on subsets of the channels."""

from __future__ import annotations

import pytest
import torch

from fastvim.errors import UserError
from fastvim.models import FastChannelVim
from fastvim.tasks.subsets import channel_subsets, draw_subsets, subset_accuracies


def test_all_subsets():
    assert channel_subsets(3) == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


def test_some_subsets():
    subsets = channel_subsets(8, most=5)
    sizes = [len(subset) for subset in subsets]
    assert sizes == sorted(sizes)
    assert [sizes.count(size) for size in range(1, 9)] == [5] * 7 + [1]
    assert len(set(subsets)) == len(subsets)
    assert all(list(subset) == sorted(set(subset)) for subset in subsets)
    assert subsets == channel_subsets(8, most=5)
    assert subsets != channel_subsets(8, most=5, seed=1)
    with pytest.raises(UserError, match="most 0: expected 1 or more"):
        channel_subsets(8, most=0)


class Brightest(FastChannelVim):
    """Predicts the number of the brightest channel."""

    def forward(self, x, channels):
        scores = torch.full((len(x), 3), -torch.inf)
        scores[:, channels] = x.mean((2, 3))
        return scores


def test_accuracies_are_those_of_the_named_channels():
    model = Brightest(img_size=8, patch_size=8, in_chans=3, embed_dim=8, depth=1).eval()
    target = torch.tensor([0, 0, 0, 1, 1, 2])
    images = torch.nn.functional.one_hot(target, 3).float()[:, :, None, None].expand(-1, -1, 8, 8)
    batches = [(images[:4], target[:4]), (images[4:], target[4:])]
    accuracies = subset_accuracies(model, batches, channel_subsets(3))
    expected = {(0,): 3, (1,): 2, (2,): 1, (0, 1): 5, (0, 2): 4, (1, 2): 3, (0, 1, 2): 6}
    # Without the bright channel the first of the subset is predicted, which is wrong.
    assert accuracies == pytest.approx({subset: count / 6 for subset, count in expected.items()})
    with pytest.raises(UserError, match="no images"):
        subset_accuracies(model, [], channel_subsets(3))


def test_the_picture_has_a_line_for_each_model():
    accuracies = {"all": {(0,): 0.2, (1,): 0.4, (0, 1): 0.9}, "sampled": {(0,): 0.6, (0, 1): 0.8}}
    axes = draw_subsets(accuracies, "title").axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["all"] == [[1, pytest.approx(0.3)], [2, 0.9]]
    assert drawn["sampled"] == [[1, 0.6], [2, 0.8]]
