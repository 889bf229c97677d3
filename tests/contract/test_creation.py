"""Where and how a model is made, made anew, and changed to another size of images."""

from __future__ import annotations

import pytest
import torch
from families import (
    CHANNEL_FAMILIES,
    CLASSES,
    IMAGE_FAMILIES,
    MASKED_FAMILIES,
    SIDE,
    create,
    image,
    patch_of,
)
from torch import Tensor, nn

from fastvim import FeatureMaps, UserError
from fastvim.models import UPerNet

classifiers = pytest.mark.parametrize("name", [*IMAGE_FAMILIES, *CHANNEL_FAMILIES])
every_model = pytest.mark.parametrize(
    "name", [*IMAGE_FAMILIES, *CHANNEL_FAMILIES, *MASKED_FAMILIES]
)
masked_models = pytest.mark.parametrize("name", MASKED_FAMILIES)
MODEL = next(iter(IMAGE_FAMILIES))


def output(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    out = model(x)
    return getattr(out, "prediction", out).detach()


@every_model
def test_made_in_another_dtype(name):
    """The same draws, rounded."""
    made, cast = create(name, dtype=torch.float16), create(name).to(torch.float16)
    assert {p.dtype for p in made.parameters()} == {torch.float16}
    for key, tensor in cast.state_dict().items():
        assert torch.equal(made.state_dict()[key], tensor), key


def assert_drawn_alike(made: nn.Module, fresh: nn.Module) -> None:
    """Memory without values becomes weights with the moments of the constructor's."""
    made.to_empty(device="cpu")
    for tensor in made.state_dict().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    torch.manual_seed(5)
    made.init_weights()
    theirs = fresh.state_dict()
    for key, ours in made.state_dict().items():
        ours, expected = ours.double(), theirs[key].double()
        assert ours.isfinite().all(), key
        if ours.numel() == 1:
            assert torch.equal(ours, expected), key
            continue
        spread = float(expected.std())
        assert abs(float(ours.mean() - expected.mean())) <= spread, key
        if spread == 0 or ours.numel() > 500:
            torch.testing.assert_close(float(ours.std()), spread, atol=0, rtol=0.2, msg=key)
            largest = float(expected.abs().max())
            torch.testing.assert_close(float(ours.abs().max()), largest, atol=0, rtol=0.5, msg=key)
    grads = [p.requires_grad for p in made.parameters()]
    assert grads == [p.requires_grad for p in fresh.parameters()]


@every_model
def test_made_on_a_device_without_memory_and_drawn_anew(name):
    made = create(name, device="meta")
    assert {p.device.type for p in made.parameters()} == {"meta"}
    assert_drawn_alike(made, create(name))


def test_a_segmentor_drawn_anew():
    def build() -> UPerNet:
        torch.manual_seed(0)
        return UPerNet(FeatureMaps(create(MODEL), range(4)), 3, channels=32, aux_channels=16)

    with torch.device("meta"):
        made = build()
    assert_drawn_alike(made, build())


@every_model
def test_weights_drawn_anew_follow_the_seed(name):
    model, drawn = create(name), []
    parameters = [*model.parameters()]
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        model.init_weights()
        drawn.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
    assert all(map(torch.equal, drawn[0].values(), drawn[1].values()))
    assert any(not torch.equal(drawn[0][key], drawn[2][key]) for key in drawn[0])
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@every_model
@pytest.mark.parametrize("size", [(5, 4), (2, 2)], ids=str)
def test_another_input_size_is_the_model_with_its_positions_resized(name, size):
    """Which it computes for such images anyway: the results do not change."""
    x, model = image(name, *size), create(name)
    expected = output(model, x)
    model.set_input_size(tuple(side * patch_of(name) for side in size))
    torch.testing.assert_close(output(model, x), expected)
    encoder = model.encoder if name in MASKED_FAMILIES else model
    assert encoder.grid_size == size
    tokens = size[0] * size[1] + encoder.positions_class
    assert encoder.pos_embed.shape[1] == tokens
    assert encoder.pos_embed.requires_grad == (name not in MASKED_FAMILIES)
    model.load_state_dict(create(name, img_size=encoder.img_size).state_dict())


@classifiers
def test_patches_of_another_size(name):
    """On images enlarged as much, the tokens stay about the same."""
    patch = patch_of(name)
    smooth = nn.functional.interpolate(torch.randn(2, 3, 2, 2), SIDE * patch, mode="bicubic")
    large = nn.functional.interpolate(smooth, SIDE * 2 * patch, mode="bicubic")
    model = create(name)
    with torch.no_grad():
        before = model.patch_embed(smooth)
        model.set_input_size(SIDE * 2 * patch, patch_size=2 * patch)
        after = model.patch_embed(large)
    assert model.grid_size == (SIDE, SIDE)
    assert {info["reduction"] for info in model.feature_info} == {2 * patch}
    assert float((after - before).norm() / before.norm()) < 0.05
    assert model(large).shape == (2, CLASSES)


def test_sizes_that_are_none():
    model = create("vim_tiny_patch16_stride8_224")
    with pytest.raises(UserError, match="overlap"):
        model.set_input_size(patch_size=8)
    with pytest.raises(UserError, match=r"square"):
        model.set_input_size(patch_size=(8, 16))
    with pytest.raises(UserError, match=r"img_size"):
        model.set_input_size(0)


@classifiers
def test_a_fixed_image_size(name):
    model = create(name, dynamic_img_size=False)
    assert torch.equal(model(image(name)), create(name, dynamic_img_size=True)(image(name)))
    with pytest.raises(UserError, match="dynamic_img_size=False"):
        model(image(name, SIDE + 1))
    model.set_input_size((SIDE + 1) * patch_of(name))
    assert model(image(name, SIDE + 1)).shape == (2, CLASSES)


@masked_models
def test_an_autoencoder_as_timm_looks_at_it(name):
    """It has no head; its features are the encoder's, of whole images."""
    model, x = create(name), image(name)
    out = model(x)
    assert out.shape == out.prediction.shape
    assert out.shape[0] == 2
    features = model.forward_features(x)
    assert torch.equal(features, model.encoder(x))
    assert model.forward_head(features).shape == (2, model.num_features)
    assert model.num_classes == 0
    model.reset_classifier(0)
    with pytest.raises(UserError, match="num_classes 5"):
        model.reset_classifier(5)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, features)
    assert [m.shape for m in maps] == [
        (2, info["num_chs"], SIDE, SIDE) for info in model.feature_info
    ]
    assert all(model.get_submodule(info["module"]) for info in model.feature_info)
    twin = create(name, num_classes=0, features_only=True, feature_cls="getter", out_indices=(1,))
    with torch.no_grad():
        assert torch.equal(twin(x)[0], maps[1])
