"""timm's `features_only`: a pyramid at strides 4 to 32."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from families import (
    CHANNEL_FAMILIES,
    DEPTH,
    DIM,
    IMAGE_FAMILIES,
    MASKED_FAMILIES,
    create,
    gradients_of,
    patch_of,
)
from torch.export import Dim

from fastvim import UserError, use_engine
from fastvim.models import create_model

every_model = pytest.mark.parametrize(
    "name", [*IMAGE_FAMILIES, *CHANNEL_FAMILIES, *MASKED_FAMILIES]
)
MODEL = next(iter(IMAGE_FAMILIES))


def backbone_of(name: str):
    model = create(name)
    return model.encoder if name in MASKED_FAMILIES else model


@every_model
@pytest.mark.parametrize("size", [(64, 96), (64, 64), (67, 45)], ids=str)
def test_every_level_has_its_stride(name, size):
    pyramid = create(name, features_only=True)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = pyramid(x)
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    assert pyramid.feature_info.channels() == [DIM] * 4
    assert pyramid.feature_info.module_name() == [f"blocks.{i}" for i in range(4)]
    for stride, level in zip((4, 8, 16, 32), maps, strict=True):
        assert level.shape == (2, DIM, *(math.ceil(side / stride) for side in size))
    parameters = sum(p.numel() for p in pyramid.parameters())
    head = sum(p.numel() for n, p in backbone_of(name).named_parameters() if n.startswith("head."))
    assert parameters == sum(p.numel() for p in backbone_of(name).parameters()) - head


@every_model
def test_levels_are_the_streams_of_four_depths(name):
    """Each through the last norm, in the places of the image where the patches lie."""
    patch = patch_of(name)
    x = torch.randn(1, 3, 4 * patch, 8 * patch)
    with torch.no_grad():
        maps = create(name, features_only=True)(x)
        streams = backbone_of(name).forward_intermediates(x, norm=True, intermediates_only=True)
    assert len(streams) == DEPTH
    for stride, level, stream in zip((4, 8, 16, 32), maps, streams, strict=True):
        size = [math.ceil(side / stride) for side in x.shape[2:]]
        if stride == patch:
            assert torch.equal(level, stream)
        if stride == 2 * patch:
            torch.testing.assert_close(level, F.avg_pool2d(stream, 2))
        expected = F.interpolate(stream, size=size, mode="bilinear")
        torch.testing.assert_close(level, expected)


@pytest.mark.parametrize(
    ("out_indices", "levels"), [((0, 1), [0, 1]), ((-1,), [3]), (2, [2, 3]), ((3, 0), [3, 0])]
)
def test_chosen_levels(out_indices, levels):
    """Blocks that no level needs are removed."""
    pyramid, x = (
        create(MODEL, features_only=True, out_indices=out_indices),
        torch.randn(1, 3, 64, 64),
    )
    with torch.no_grad():
        whole, chosen = create(MODEL, features_only=True)(x), pyramid(x)
    assert pyramid.feature_info.reduction() == [(4, 8, 16, 32)[level] for level in levels]
    assert len(pyramid.model.blocks) == max(levels) + 1
    for level, actual in zip(levels, chosen, strict=True):
        assert torch.equal(actual, whole[level])


@pytest.mark.parametrize(("output_stride", "strides"), [(16, [4, 8, 16, 16]), (8, [4, 8, 8, 8])])
def test_a_smaller_output_stride(output_stride, strides):
    pyramid = create(MODEL, features_only=True, output_stride=output_stride)
    assert pyramid.feature_info.reduction() == strides
    assert [64 // level.shape[2] for level in pyramid(torch.randn(1, 3, 64, 64))] == strides


@pytest.mark.parametrize(
    ("depth", "blocks"), [(1, [0, 0, 0, 0]), (6, [1, 2, 4, 5]), (3, [0, 1, 2, 2])]
)
def test_depths_that_are_no_multiple_of_four(depth, blocks):
    pyramid = create(MODEL, features_only=True, depth=depth)
    assert pyramid.feature_info.module_name() == [f"blocks.{i}" for i in blocks]
    assert len(pyramid(torch.randn(1, 3, 32, 32))) == 4


@every_model
def test_gradients_reach_every_weight_with_and_without_recomputation(name):
    gradients = []
    for recompute in (False, True):
        pyramid = create(name, features_only=True).train()
        pyramid.set_grad_checkpointing(recompute)
        torch.manual_seed(0)
        x = torch.randn(2, 3, 64, 64)
        sum(level.square().sum() for level in pyramid(x)).backward()
        gradients.append(gradients_of(pyramid))
    assert all(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_program_serves_every_size():
    """Sizes that are no multiple of a patch too: what lies beyond the image is left out."""
    pyramid = create(MODEL, features_only=True)
    sizes = {0: Dim("batch"), 2: Dim("height", min=33), 3: Dim("width", min=33)}
    with use_engine("loop"):
        x = torch.randn(2, 3, 70, 90)
        program = torch.export.export(pyramid, (x,), dynamic_shapes=(sizes,)).module()
        for height, width in ((128, 64), (100, 70), (48, 200)):
            x = torch.randn(3, 3, height, width)
            torch.testing.assert_close(program(x), pyramid(x))


def test_half_precision_gives_half_precision():
    pyramid = create(MODEL, features_only=True, dtype=torch.bfloat16)
    maps = pyramid(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16))
    assert {level.dtype for level in maps} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"out_indices": (5, 11)}, "feature_cls='getter'"),
        ({"out_indices": ()}, "out_indices"),
        ({"out_indices": 5}, "out_indices"),
        ({"output_stride": 12}, "output_stride=12"),
        ({"output_stride": 16, "feature_cls": "getter"}, "output_stride=16"),
    ],
    ids=str,
)
def test_what_the_pyramid_does_not_have(options, named):
    with pytest.raises(UserError, match=named):
        create_model(MODEL, img_size=32, embed_dim=16, depth=4, features_only=True, **options)
