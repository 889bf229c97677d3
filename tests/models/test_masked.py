"""Masked autoencoders: the mask, the encoder, the decoder, the loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_masked import (
    DIM,
    KINDS,
    PATCH,
    PUBLISHED,
    all_kept,
    classifier,
    create,
    every_kind,
    image,
    scramble,
    some_kept,
)
from torch import Tensor

from fastvim import UserError, use_engine
from fastvim.layers import sincos_grid
from fastvim.models import FastVim
from fastvim.weights import checkpoint_filter_fn

few = settings(max_examples=20, deadline=None, derandomize=True)

# Directions of the mixer that the tensors are stacked by.
STACKED = ("conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D")
grids = st.tuples(st.integers(1, 5), st.integers(1, 5))
seeds = st.integers(0, 1000)


# The encoder.


@pytest.mark.parametrize("mirror", ["published", "exact"])
@every_kind
@given(grid=grids, seed=seeds)
@few
def test_with_nothing_masked_it_is_the_unmasked_model(kind, mirror, grid, seed):
    model = scramble(create(kind, grid, mirror=mirror), seed)
    plain = classifier(kind, grid, num_classes=0, global_pool="").double().eval()
    plain.load_state_dict(model.encoder_state_dict())
    with torch.no_grad(), use_engine("reference"):
        latent = model.forward_encoder(image(grid), all_kept(grid))
        torch.testing.assert_close(latent, plain(image(grid)))


def half_turned(encoder: FastVim) -> dict[str, Tensor]:
    """Weights of an encoder that should see an image as this one sees it turned by 180°.

    The walk backwards over an image is the walk forwards over the image turned by 180°, whether
    by rows or by columns. (Flipped along one axis it is not: a row's end would still lead to the
    next row's start, but from the other side.)
    """
    state = encoder.state_dict()
    turned = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in state.items():
        if name.rsplit(".", 1)[-1] in STACKED:
            turned[name] = tensor.flip(0)
    turned["pos_embed"] = state["pos_embed"].flip(1)
    turned["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flip(2, 3)
    return turned


def error_of_half_turn(
    kind: str, grid: tuple[int, int], count: int, seed: int, mirror: str
) -> float:
    model = scramble(create(kind, grid, mirror=mirror), seed)
    twin = create(kind, grid, mirror=mirror).double().eval()
    twin.encoder.load_state_dict(half_turned(model.encoder))
    kept = some_kept(grid, count, seed)
    turned = (grid[0] * grid[1] - 1 - kept).flip(1)
    with torch.no_grad(), use_engine("reference"):
        expected = model.forward_encoder(image(grid), kept)
        actual = twin.forward_encoder(image(grid).flip(2, 3), turned).flip(1)
    return float((actual - expected).abs().max())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vim"])
@given(data=st.data(), grid=grids, seed=seeds)
@few
def test_exact_is_a_mirror_image_under_any_mask(kind, data, grid, seed):
    count = data.draw(st.integers(1, grid[0] * grid[1]))
    assert error_of_half_turn(kind, grid, count, seed, "exact") < 1e-9


@given(data=st.data(), seed=seeds)
@few
def test_a_class_token_mirrors_where_it_is_in_the_middle(data, seed):
    """It does among an even number of kept tokens, on a grid of an even number of cells."""
    grid = (3, 4)
    count = 2 * data.draw(st.integers(1, 6))
    for mirror in ("exact", "published"):  # nothing is pooled: they are the same
        assert error_of_half_turn("vim", grid, count, seed, mirror) < 1e-9


def test_published_is_no_mirror_image_under_a_mask():
    assert error_of_half_turn("fastvim", (4, 4), 5, 0, "published") > 1e-3
    assert error_of_half_turn("fastvim", (4, 4), 16, 0, "published") < 1e-9


@every_kind
def test_what_is_masked_is_not_seen(kind):
    model, kept = scramble(create(kind)), some_kept((4, 4), 5, 0)
    x = image()
    mask = torch.ones(2, 16).double().scatter(1, kept, 0)
    noise = mask[:, :, None] * torch.randn(2, 16, 48, dtype=torch.float64)
    with torch.no_grad():
        latent = model.forward_encoder(x, kept)
        assert torch.equal(model.forward_encoder(x + model.unpatchify(noise, (4, 4)), kept), latent)
        assert not torch.allclose(model.forward_encoder(x, some_kept((4, 4), 5, 1)), latent)
    assert latent.shape == (2, 5 + (kind == "vim"), DIM)


@every_kind
@pytest.mark.parametrize("engine", ["reference", "numba"])
def test_every_trained_weight_has_a_gradient(kind, engine):
    model = scramble(create(kind, drop_path_rate=0.0)).float()
    with use_engine(engine):
        model(image().float(), generator=torch.Generator().manual_seed(0)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("pos_embed" not in name)
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


# The mask.


@given(batch=st.integers(1, 3), tokens=st.integers(4, 40), ratio=st.floats(0, 0.75), seed=seeds)
@few
def test_masks_keep_the_least_noise_in_ascending_order(batch, tokens, ratio, seed):
    model = create()
    noise = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed))
    kept = model.random_mask(batch, tokens, mask_ratio=ratio, noise=noise)
    assert kept.shape == (batch, int(tokens * (1 - ratio)))
    assert kept.dtype == torch.int64
    for own, values in zip(kept.tolist(), noise, strict=True):
        assert own == sorted(set(own))
        left_out = [float(v) for i, v in enumerate(values) if i not in own]
        assert max(float(values[i]) for i in own) <= min(left_out, default=1.0)


def test_masks_are_reproducible_from_a_generator():
    model, x = create().eval(), image().float()

    def run(seed: int) -> Tensor:
        return model(x, generator=torch.Generator().manual_seed(seed)).ids_keep

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    drawn = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x, drawn).ids_keep, run(0))
    assert not torch.equal(run(0)[0], run(0)[1])  # each image has its own
    torch.manual_seed(0)
    first = model(x).ids_keep
    torch.manual_seed(0)
    assert torch.equal(model(x).ids_keep, first)


@every_kind
def test_ratios(kind):
    model, x = create(kind).eval(), image().float()
    with torch.no_grad():
        for ratio, kept in ((None, 4), (0.5, 8), (0.9, 1), (0.0, 16)):
            output = model(x, mask_ratio=ratio)
            assert output.ids_keep.shape == (2, kept)
            assert output.mask.sum(1).tolist() == [16 - kept] * 2
            assert output.latent.shape == (2, kept + (kind == "vim"), DIM)
            assert output.prediction.shape == (2, 16, PATCH**2 * 3)
            assert output.loss.isfinite()
    assert output.loss == 0  # of no patch at all


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mask_ratio": 1.0}, ("mask_ratio 1.0", "less than 1")),
        ({"mask_ratio": -0.1}, ("mask_ratio -0.1", "at least 0")),
        ({"mask_ratio": float("nan")}, ("mask_ratio nan",)),
        ({"mask_ratio": 0.95}, ("mask_ratio=0.95", "16 patches")),
        ({"noise": torch.rand(2, 15)}, ("noise (2, 15)", "(2, 16)")),
        ({"noise": torch.rand(16)}, ("noise (16,)", "(2, 16)")),
    ],
)
def test_masks_that_cannot_be(arguments, named):
    with pytest.raises(UserError) as caught:
        create()(image().float(), **arguments)
    message = str(caught.value)
    assert all(part in message for part in named), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mirror": "none"}, ("mirror 'none'", "'published'", "'exact'")),
        ({"mask_ratio": 1}, ("mask_ratio 1",)),
        ({"decoder_depth": 0}, ("decoder_depth 0",)),
        ({"decoder_embed_dim": 10}, ("10", "multiple of 4")),
        ({"embed_dim": 18}, ("18", "multiple of 4")),
        ({"class_token": True}, ("class_token=True", "pooling='none'")),
        ({"pooling": "sum"}, ("pooling 'sum'",)),
    ],
)
def test_options_outside_their_choices(options, named):
    with pytest.raises(UserError) as caught:
        create(**options)
    message = str(caught.value)
    assert all(part in message for part in named), message
    assert "\n" not in message


# The decoder.


@every_kind
def test_the_decoder_tells_cells_apart_by_their_positions_alone(kind):
    """Every masked patch starts from one token; with positions of zero only its place is left."""
    model, kept = scramble(create(kind)), some_kept((4, 4), 5, 0)
    seen = []
    model.decoder_blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        latent = model.forward_encoder(image(), kept)
        prediction = model.forward_decoder(latent, kept, (4, 4))
    assert prediction.shape == (2, 16, 48)
    inputs = seen[0] - model.decoder_pos_embed
    embedded = model.decoder_embed(latent)
    if kind == "vim":
        torch.testing.assert_close(inputs[:, -1], embedded[:, 2])  # the class token comes last
        embedded = torch.cat([embedded[:, :2], embedded[:, 3:]], dim=1)
        inputs = inputs[:, :-1]
    for tokens, own, cells in zip(inputs, embedded, kept, strict=True):
        torch.testing.assert_close(tokens[cells], own)
        masked = [i for i in range(16) if i not in cells.tolist()]
        torch.testing.assert_close(tokens[masked], model.mask_token[0].expand(11, -1))


# Patches and the loss.


@given(grid=grids, channels=st.integers(1, 4), patch=st.integers(2, 5))
@few
def test_patches_there_and_back(grid, channels, patch):
    model = create(patch_size=patch, in_chans=channels, img_size=20, depth=1)
    height, width = grid[0] * patch, grid[1] * patch
    x = torch.arange(2.0 * channels * height * width).reshape(2, channels, height, width)
    patches = model.patchify(x)
    assert patches.shape == (2, grid[0] * grid[1], patch**2 * channels)
    assert torch.equal(model.unpatchify(patches, grid), x)
    for row in range(grid[0]):
        for column in range(grid[1]):
            block = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            pixels = block.permute(0, 2, 3, 1).flatten(1)  # row, column, channel
            assert torch.equal(patches[:, row * grid[1] + column], pixels)


def test_patches_of_another_grid():
    with pytest.raises(UserError, match=r"\(2, 16, 48\).*3 \* 4, 48"):
        create().unpatchify(torch.zeros(2, 16, 48), (3, 4))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@given(count=st.integers(1, 15), seed=seeds)
@few
def test_the_loss_is_of_masked_patches_alone(norm_pix_loss, count, seed):
    model, x = create(norm_pix_loss=norm_pix_loss), image(seed=seed)
    kept = some_kept((4, 4), count, seed)
    mask = torch.ones(2, 16).scatter(1, kept, 0)
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(2, 16, 48, generator=generator, dtype=torch.float64)
    prediction.requires_grad_()
    loss = model.forward_loss(x, prediction, mask)
    errors = []
    for b in range(2):
        for cell in range(16):
            row, column = cell // 4 * PATCH, cell % 4 * PATCH
            target = x[b, :, row : row + PATCH, column : column + PATCH].permute(1, 2, 0).flatten()
            if norm_pix_loss:
                deviation = ((target - target.mean()) ** 2).sum() / 47 + 1e-6
                target = (target - target.mean()) / deviation**0.5
            if mask[b, cell]:
                errors.append((prediction[b, cell] - target).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    loss.backward()
    assert (prediction.grad.abs().sum(-1) > 0).equal(mask > 0)


def test_a_flat_patch_has_a_target():
    model = create()
    for value in (0.0, 3.0):
        loss = model.forward_loss(
            torch.full((1, 3, 16, 16), value), torch.zeros(1, 16, 48), torch.ones(1, 16)
        )
        assert loss == 0


# Images of other sizes.


def test_positions():
    """Sines and cosines of the column, then of the row."""
    vectors = sincos_grid((3, 5), 8)[0]
    for row in range(3):
        for column in range(5):
            at = torch.tensor([column, column / 100.0])
            down = torch.tensor([row, row / 100.0])
            expected = torch.cat([at.sin(), at.cos(), down.sin(), down.cos()])
            torch.testing.assert_close(vectors[5 * row + column], expected)


@every_kind
def test_another_size_is_the_model_of_that_size(kind):
    small = create(kind).double().eval()
    for grid in ((5, 5), (2, 6)):
        large = create(kind, grid).double().eval()
        large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
        noise = torch.rand(2, grid[0] * grid[1])
        with torch.no_grad():
            # Sides that are no multiple of the patch are padded.
            for x in (image(grid), image(grid)[:, :, 1:, 2:]):
                for actual, expected in zip(small(x, noise), large(x, noise), strict=True):
                    torch.testing.assert_close(actual, expected)


# Initial values.


@every_kind
def test_initial_values(kind):
    torch.manual_seed(0)
    model = create(kind, embed_dim=64, patch_size=16, img_size=64, decoder_embed_dim=48)
    weight = model.encoder.patch_embed.proj.weight.detach()
    bound = (6 / (64 + 3 * 16**2)) ** 0.5  # Xavier, of the flattened kernel
    assert 0.99 * bound < float(weight.abs().max()) <= bound
    bias = model.encoder.patch_embed.proj.bias.detach()
    assert 0.9 / 768**0.5 < float(bias.abs().max()) <= 1 / 768**0.5  # of 3 · 16² inputs
    for linear in (model.decoder_embed, model.decoder_pred):
        assert not linear.bias.any()
    mask_token = create(kind, decoder_embed_dim=4096, decoder_depth=1).mask_token.detach()
    torch.testing.assert_close(float(mask_token.std()), 0.02, rtol=0.1, atol=0.0)
    cells = model.encoder._cell_positions((4, 4))
    assert torch.equal(cells, sincos_grid((4, 4), 64))
    assert torch.equal(model.decoder_pos_embed[:, :16], sincos_grid((4, 4), 48))
    assert not model.decoder_pos_embed[:, 16:].any()


# The compiler.


@pytest.mark.parametrize("mirror", ["published", pytest.param("exact", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_compiles_whole(kind, mirror):
    torch._dynamo.reset()
    model, x = scramble(create(kind, mirror=mirror, depth=2)).float(), image().float()
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    runs = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(x, noise)
        output.loss.backward()
        trained = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        runs.append([*(t.detach() for t in output), *trained])
    for actual, expected in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected)
