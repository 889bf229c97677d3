"""transformers' dense models over its wrapper of timm's `features_only`."""

from __future__ import annotations

import pytest
import torch

import fastvim  # noqa: F401  (registers the models)

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.clients


def config(**options):
    options = {"backbone": "fastvim_tiny_patch16_224", "features_only": True, **options}
    return transformers.TimmBackboneConfig(use_pretrained_backbone=False, **options)


@pytest.mark.parametrize(
    ("out_indices", "strides"), [(None, [32]), ([0, 1, 2, 3], [4, 8, 16, 32]), ([1, -1], [8, 32])]
)
def test_maps_of_a_backbone(out_indices, strides):
    backbone = transformers.TimmBackbone(config(out_indices=out_indices)).eval()
    assert backbone.channels == [192] * len(strides)
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96)).feature_maps
    assert [m.shape for m in maps] == [(1, 192, 64 // side, 96 // side) for side in strides]


def test_upernet_learns():
    torch.manual_seed(0)
    model = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=config(out_indices=[0, 1, 2, 3]),
            hidden_size=32,
            num_labels=2,
            auxiliary_in_channels=192,
        )
    )
    labels = (torch.arange(64) > 32).long().expand(2, 64, 64)
    images = torch.randn(2, 3, 64, 64) + labels[:, None]
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(4):
        output = model(images, labels=labels)
        assert output.logits.shape == (2, 2, 64, 64)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss))
    assert losses[-1] < 0.8 * losses[0], losses


def test_mask2former_takes_the_maps():
    torch.manual_seed(0)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_labels": 3}
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4}
    sizes |= {"dim_feedforward": 32, "encoder_feedforward_dim": 32, "num_queries": 5}
    model = transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(backbone_config=config(out_indices=[0, 1, 2, 3]), **sizes)
    ).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).masks_queries_logits.shape == (1, 5, 16, 16)
