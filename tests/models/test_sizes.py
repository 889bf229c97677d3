"""The registered models' sizes, the initial values that belong to no layer, and bad options."""

from __future__ import annotations

import pytest
import timm
import torch

from fastvim import FastVim, UserError
from fastvim.models import create_model

# Width, blocks, patch, grid, and parameters with 1000 classes.
SIZES = {
    "fastvim_tiny_patch16_224": (192, 24, 16, 14, 7_166_056),
    "fastvim_small_patch16_224": (384, 24, 16, 14, 25_832_680),
    "fastvim_base_patch16_224": (768, 24, 16, 14, 97_670_632),
    "fastvim_large_patch16_224": (1024, 48, 16, 14, 340_229_096),
    "fastvim_huge_patch14_224": (1280, 64, 14, 16, 702_370_280),
    # The same with 32 x 32 positions instead of 16 x 16.
    "fastvim_huge_patch14_448": (1280, 64, 14, 32, 702_370_280 + (32**2 - 16**2) * 1280),
    "vim_tiny_patch16_224": (192, 24, 16, 14, 7_166_440),
    "vim_small_patch16_224": (384, 24, 16, 14, 25_833_448),
    "vim_base_patch16_224": (768, 24, 16, 14, 97_672_168),
    "vim_large_patch16_224": (1024, 48, 16, 14, 340_231_144),
    # With a patch every 8 pixels: 27 x 27 positions instead of 14 x 14.
    "vim_tiny_patch16_stride8_224": (192, 24, 16, 27, 7_166_440 + (27**2 - 14**2) * 192),
    "vim_small_patch16_stride8_224": (384, 24, 16, 27, 25_833_448 + (27**2 - 14**2) * 384),
}
# Patch, parameters with 8 channels and 161 classes; 384 wide, 24 blocks.
CHANNELS = {
    "fastchannelvim_small_patch16_224": (16, 25_316_129),
    "fastchannelvim_small_patch8_224": (8, 25_468_193),
    "channelvim_small_patch16_224": (16, 25_316_513),
    "channelvim_small_patch8_224": (8, 25_468_577),
}
# Masked autoencoders, encoder as above: width of the decoder; parameters, fixed ones included.
MASKED = {
    "mae_fastvim_tiny_patch16_224": (192, 24, 16, 14, 192, None),
    "mae_fastvim_small_patch16_224": (384, 24, 16, 14, 384, None),
    "mae_fastvim_base_patch16_224": (768, 24, 16, 14, 512, 101_428_992),
    "mae_fastvim_large_patch16_224": (1024, 48, 16, 14, 512, 343_862_528),
    "mae_fastvim_huge_patch14_224": (1280, 64, 14, 16, 512, 705_817_164),
    "mae_vim_tiny_patch16_224": (192, 24, 16, 14, 192, None),
    "mae_vim_small_patch16_224": (384, 24, 16, 14, 384, None),
    "mae_vim_base_patch16_224": (768, 24, 16, 14, 512, 101_431_040),
    "mae_vim_large_patch16_224": (1024, 48, 16, 14, 512, 343_865_088),
}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 5}


def test_every_size_is_registered():
    names = timm.list_models(["fastvim_*", "vim_*", "*channelvim_*", "mae_*"])
    ours = [n for n in names if timm.model_entrypoint(n).__module__.startswith("fastvim.")]
    assert sorted(ours) == sorted(names) == sorted([*SIZES, *CHANNELS, *MASKED])


@pytest.mark.parametrize("name", CHANNELS)
def test_sizes_of_channel_models(name):
    patch, parameters = CHANNELS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (model.in_chans, model.num_classes, len(model.blocks)) == (8, 161, 24)
    assert model.patch_embed.patch_size == patch
    assert model.grid_size == (224 // patch, 224 // patch)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    dim, depth, patch, side, parameters = SIZES[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.embed_dim == model.num_features == model.head_hidden_size == dim
    assert len(model.blocks) == depth
    assert model.patch_embed.patch_size == patch
    assert model.patch_embed.stride == (8 if "stride8" in name else patch)
    assert model.grid_size == (side, side)
    assert model.num_classes == model.head.out_features == 1000
    class_token = name.startswith("vim_")
    assert (model.cls_token is not None) == class_token
    assert model.pos_embed.shape == (1, side**2 + class_token, dim)
    assert [t.pool for t in model.traversals] == ([""] if class_token else ["w", "h"])
    assert model.global_pool == ("token" if class_token else "avg")


@pytest.mark.parametrize("name", MASKED)
def test_sizes_of_masked_autoencoders(name):
    dim, depth, patch, side, decoder, parameters = MASKED[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters
    encoder = model.encoder
    assert (encoder.embed_dim, len(encoder.blocks)) == (dim, depth)
    assert (encoder.patch_embed.patch_size, encoder.grid_size) == (patch, (side, side))
    class_token = "_vim_" in name
    assert (encoder.cls_token is not None) == class_token
    assert [t.pool for t in encoder.traversals] == ([""] if class_token else ["w", "h"])
    assert encoder.pos_embed.shape == (1, side**2 + class_token, dim)
    assert model.decoder_pos_embed.shape == (1, side**2 + class_token, decoder)
    assert len(model.decoder_blocks) == 2
    assert (model.mask_ratio, model.norm_pix_loss, model.mirror) == (0.75, True, "published")


@pytest.mark.parametrize("name", ["fastvim_tiny_patch16_224", "vim_tiny_patch16_224"])
def test_initial_values(name):
    torch.manual_seed(0)
    model = create_model(name, depth=1)
    for parameter in (model.pos_embed, model.head.weight, model.cls_token):
        if parameter is not None:
            parameter = parameter.detach()
            torch.testing.assert_close(float(parameter.std()), 0.02, rtol=0.15, atol=0.0)
            assert abs(float(parameter.mean())) < 0.005
    assert (model.head.bias == 0).all()
    assert all((b.norm.weight == 1).all() for b in model.blocks)
    # out_proj is divided by the root of the depth, here 1, and elsewhere not.
    deep = create_model(name, depth=4).blocks[3].mixer.out_proj.weight.detach()
    ratio = model.blocks[0].mixer.out_proj.weight.detach().abs().max() / deep.abs().max()
    torch.testing.assert_close(float(ratio), 2.0, rtol=0.02, atol=0.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pooling": "sum"}, ("pooling 'sum'", "'mean'", "'max'", "'none'")),
        ({"scan_path": "diagonal"}, ("scan_path 'diagonal'", "'row'", "'column'")),
        ({"norm": "batch"}, ("norm 'batch'", "'rms'", "'layer'")),
        ({"global_pool": "map"}, ("global_pool 'map'", "'avg'", "'last'", "'max_logit'")),
        ({"global_pool": "token"}, ("global_pool='token'", "class_token=True")),
        ({"class_token": True}, ("class_token=True", "pooling='none'")),
        ({"class_token": True, "pooling": "max"}, ("class_token=True", "pooling='none'")),
        ({"img_size": 4}, ("4 x 4", "8 x 8")),
        ({"depth": "two"}, ("depth 'two'", "1 or more")),
        ({"embed_dim": 2.5}, ("embed_dim 2.5", "whole numbers")),
        ({"drop_rate": 1}, ("drop_rate 1", "less than 1")),
    ],
)
def test_options_outside_their_choices(options, named):
    with pytest.raises(UserError) as caught:
        FastVim(**{**SMALL, **options})
    message = str(caught.value)
    assert all(part in message for part in named), message
    assert "\n" not in message


def test_a_column_order_means_nothing_to_a_class_token():
    with pytest.raises(UserError, match="scan_path"):
        FastVim(**SMALL, class_token=True, pooling="none", scan_path="column")


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("fastvim_tny_patch16_224", {}, ("'fastvim_tny_patch16_224'", "fastvim_tiny_patch16_224")),
        ("vim_larg_patch16_224", {}, ("vim_large_patch16_224",)),
        ("fastvim_tiny_patch16_224.in22k", {}, ("fastvim_tiny_patch16_224", "in1k")),
        ("fastvim_tiny_patch16_224", {"drop_path": 0.1}, ("'drop_path'", "drop_path_rate")),
        ("vim_tiny_patch16_224", {"embed_dims": 8}, ("'embed_dims'", "embed_dim")),
        ("vim_tiny_patch16_224", {"zzz": 8}, ("'zzz'",)),
        ("mae_fastvim_tiny_patch16_224", {"num_classes": 5}, ("num_classes 5", "no head")),
        ("mae_vim_tiny_patch16_224", {"decoder_dim": 8}, ("'decoder_dim'", "decoder_embed_dim")),
        ("vim_tiny_patch16_224", {"device": "gpu"}, ("device 'gpu'", "'cuda'")),
        ("vim_tiny_patch16_224", {"global_pool": "map"}, ("'map'", "'avgmax'")),
        ("vim_tiny_patch16_224", {"output_stride": 16}, ("output_stride=16", "features_only")),
    ],
)
def test_mistyped_models_and_options(name, options, named):
    with pytest.raises(UserError) as caught:
        create_model(name, **options)
    message = str(caught.value)
    assert all(part in message for part in named), message
    assert "\n" not in message


def test_create_model_passes_options_on():
    model = create_model("fastvim_tiny_patch16_224", **SMALL, in_chans=1, drop_path_rate=0.1)
    assert isinstance(model, FastVim)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert model.norm.drop_path.drop_prob == 0.1


def test_create_model_makes_models_of_timm_too():
    assert create_model("resnet10t", num_classes=3).num_classes == 3
