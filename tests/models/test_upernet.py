"""UPerNet: shapes at every size, the maps that each head reads, the place of its logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvim.models import FastVim, FeatureMaps
from fastvim.models.heads.upernet import FCNHead, UPerNet, UPerNetHead

PATCH, DIM, CLASSES = 4, 8, 5


def create(classes: int = CLASSES, **options) -> UPerNet:
    backbone = FastVim(img_size=32, patch_size=PATCH, embed_dim=DIM, depth=4, norm="layer")
    maps = FeatureMaps(backbone, (0, 1, 2, 3))
    return UPerNet(maps, classes, **{"channels": 12, "aux_channels": 6, **options})


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (4, 4), (17, 30), (4, 65)])
def test_logits_of_any_size(size):
    model = create()
    image = torch.randn(2, 3, *size)
    for logits in model(image):
        assert logits.shape == (2, CLASSES, *size)
    model.eval()
    logits = model(image)
    assert logits.shape == (2, CLASSES, *size)
    torch.testing.assert_close(model(image[1:]), logits[1:])


def test_every_parameter_gets_a_gradient():
    model = create()
    sum(logits.square().mean() for logits in model(torch.randn(2, 3, 32, 24))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_auxiliary_head_reads_the_third_map():
    model = create(drop_rate=0.0)
    image = torch.randn(2, 3, 16, 16)
    auxiliary = model(image)[1]
    expected = model.aux_head(model.maps(image)[2])
    torch.testing.assert_close(auxiliary[..., ::15, ::15], expected[..., ::3, ::3])  # corners


def test_sizes_are_the_published_ones():
    def convolution(inputs: int, outputs: int, kernel: int) -> int:
        return kernel**2 * inputs * outputs + 2 * outputs

    with torch.device("meta"):
        head = UPerNetHead([192] * 4, 150)
        auxiliary = FCNHead(192, 150)
    expected = (
        4 * convolution(192, 512, 1)  # pools
        + convolution(192 + 4 * 512, 512, 3)
        + 3 * convolution(192, 512, 1)
        + 3 * convolution(512, 512, 3)
        + convolution(4 * 512, 512, 3)
        + 150 * 513
    )
    assert sum(parameter.numel() for parameter in head.parameters()) == expected
    expected = convolution(192, 256, 3) + 150 * 257
    assert sum(parameter.numel() for parameter in auxiliary.parameters()) == expected
    assert (head.drop.p, auxiliary.drop.p) == (0.1, 0.1)


def test_head_is_its_definition():
    """On one grid: the sums of the maps from the last down, and the pools of the last."""
    torch.manual_seed(0)
    head = UPerNetHead([DIM] * 3, CLASSES, channels=6, pool_scales=(1, 2)).double().eval()
    maps = [torch.randn(2, DIM, 4, 4, dtype=torch.float64) for _ in range(3)]
    one = head.pools[0][1](maps[2].mean((2, 3), keepdim=True)).expand(-1, -1, 4, 4)
    four = head.pools[1][1](maps[2].unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)))
    # A 2x2 grid on 4x4 places: each a mixture by distance from the centres, clamped at the edge.
    mixture = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], dtype=torch.float64)
    four = mixture @ four @ mixture.T
    last = head.pooled(torch.cat([maps[2], one, four], dim=1))
    middle = head.laterals[1](maps[1]) + last
    first = head.laterals[0](maps[0]) + middle
    levels = [head.smooth[0](first), head.smooth[1](middle), last]
    torch.testing.assert_close(head(maps), head.classifier(head.fusion(torch.cat(levels, dim=1))))


def test_maps_of_several_grids():
    head = UPerNetHead([4, 6, 8], CLASSES, channels=6)
    maps = [torch.randn(2, 4, 12, 8), torch.randn(2, 6, 6, 4), torch.randn(2, 8, 3, 2)]
    assert head(maps).shape == (2, CLASSES, 12, 8)


def test_logits_lie_where_their_patches_are():
    """A padded image: the grid reaches beyond it, and its logits must not be squeezed into it."""
    model = create()
    image = torch.zeros(1, 3, 6, 10)  # 2 x 3 patches of 4 pixels
    ramp = torch.arange(3.0).expand(1, 1, 2, 3)
    pixels = model._to_pixels(ramp, image)
    expected = ((torch.arange(10) + 0.5) / PATCH - 0.5).clamp(0, 2)
    torch.testing.assert_close(pixels, expected.expand(1, 1, 6, 10))


def test_norms_become_synchronised():
    model = create()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert norms == 4 + 1 + 3 + 3 + 1 + 1
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == norms


def test_the_backbones_vectors_do_not_decay():
    model = create()
    names = {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    assert "maps.backbone.blocks.0.mixer.D" in model.no_weight_decay()
