"""What timm and training expect of a masked autoencoder, once a family."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import families
import pytest
import torch
from families import DEPTH, DIM, MASKED_FAMILIES, gradients_of, patch_of
from timm.models import group_parameters
from torch import Tensor, nn

from fastvim import use_engine
from fastvim.weights import to_published

SIDE = 4  # a quarter of 16 patches is kept

MODEL = next(iter(MASKED_FAMILIES))
every_model = pytest.mark.parametrize("name", MASKED_FAMILIES)
create = functools.partial(families.create, side=SIDE)
image = functools.partial(families.image, rows=SIDE)


def noise(cells: int = SIDE**2) -> Tensor:
    return torch.rand(2, cells, generator=torch.Generator().manual_seed(2))


@every_model
def test_forward(name, engine):
    model = create(name)
    pixels = patch_of(name) ** 2 * 3
    class_token = "_vim_" in name
    for rows, columns, cells in ((4, 4, 16), (2, 5, 10), (3.5, 1.2, 8)):
        x = image(name, rows=rows, columns=columns)
        with torch.no_grad():
            output = model(x, noise(cells))
            again = model(x[1:], noise(cells)[1:])
        kept = cells // 4
        assert output.loss.shape == ()
        assert output.loss.isfinite()
        assert output.prediction.shape == (2, cells, pixels)
        assert output.mask.shape == (2, cells)
        assert output.ids_keep.shape == (2, kept)
        assert output.latent.shape == (2, kept + class_token, DIM)
        assert not output.mask.gather(1, output.ids_keep).any()
        torch.testing.assert_close(again.prediction, output.prediction[1:])


@every_model
@pytest.mark.parametrize("mirror", ["published", "exact"])
def test_both_engines_agree(name, mirror):
    model, x = create(name, mirror=mirror), image(name)
    runs = []
    for engine in ("reference", "numba"):
        model.zero_grad()
        with use_engine(engine):
            output = model(x, noise())
            output.loss.backward()
        runs.append({"prediction": output.prediction.detach(), **gradients_of(model)})
    for key, expected in runs[0].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(runs[1][key], expected, atol=1e-5 * scale, rtol=1e-4, msg=key)


@every_model
def test_other_channels(name):
    output = create(name, in_chans=5)(image(name, in_chans=5))
    assert output.prediction.shape[2] == patch_of(name) ** 2 * 5


@every_model
def test_groups_of_parameters(name):
    model = create(name)
    layer_of = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layer_of) == {n for n, _ in model.named_parameters()}
    for parameter, layer in layer_of.items():
        first, second, *rest = f"{parameter}..".split(".")
        if first != "encoder":
            expected = DEPTH + 1
        elif second == "blocks":
            expected = 1 + int(rest[0])
        else:
            expected = DEPTH + 1 if second == "norm" else 0
        assert layer == expected, parameter


@every_model
def test_no_weight_decay_names_parameters(name):
    model = create(name)
    spared = {n for n, _ in model.named_parameters() if n.endswith(("conv_bias", "dt_bias", ".D"))}
    assert model.no_weight_decay() == spared
    assert {n.split(".")[0] for n in spared} == {"encoder", "decoder_blocks"}


@every_model
def test_checkpointed_gradients_are_the_same(name, engine):
    model, x = create(name, drop_path_rate=0.5).train(), image(name)
    blocks = (model.encoder.blocks[1], model.decoder_blocks[1])
    gradients, forwards = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        calls = []
        hooks = [b.mixer.register_forward_pre_hook(lambda *_, c=calls: c.append(1)) for b in blocks]
        torch.manual_seed(3)
        model(x, noise()).loss.backward()
        for hook in hooks:
            hook.remove()
        gradients.append(gradients_of(model))
        forwards.append(len(calls))
    assert forwards == [2, 4]  # recomputed in the backward pass
    for key, expected in gradients[0].items():
        assert torch.equal(gradients[1][key], expected), key


@every_model
def test_pretrained_weights_are_fitted_by_timm(name, tmp_path):
    source = create(name)
    torch.save(to_published(source.state_dict()), tmp_path / "weights.pth")
    options = {
        "pretrained": True,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")},
    }
    for side in (SIDE, SIDE + 1):
        other = create(name, side=side, **options)
        for key, tensor in source.state_dict().items():
            if side == SIDE or "pos_embed" not in key:
                assert torch.equal(other.state_dict()[key], tensor), key
        # Positions are fixed: another grid has its own.
        fresh = create(name, side=side)
        assert torch.equal(other.encoder.pos_embed, fresh.encoder.pos_embed)
        assert torch.equal(other.decoder_pos_embed, fresh.decoder_pos_embed)


@every_model
def test_copies_give_the_same(name):
    model, x = create(name), image(name)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    loaded = create(name)
    nn.init.zeros_(loaded.encoder.blocks[0].mixer.A_log)
    loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(twin(x, noise()).prediction, model(x, noise()).prediction)
            assert not twin.encoder.pos_embed.requires_grad
            assert not twin.decoder_pos_embed.requires_grad


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(name, dtype, engine):
    model, x = create(name), image(name)
    with torch.no_grad():
        expected = model(x, noise())
        output = model.to(dtype)(x.to(dtype), noise())
    assert output.prediction.dtype == output.latent.dtype == dtype
    assert output.loss.dtype == torch.float32
    # Each of the blocks rounds its input, its projections and its output.
    bound = 4 * (DEPTH + 2) ** 0.5 * torch.finfo(dtype).eps
    for actual, exact in zip(output[:2], expected[:2], strict=True):
        assert float((actual - exact).norm() / exact.norm()) < bound


@every_model
def test_autocast(name, engine):
    model, x = create(name, drop_path_rate=0.1), image(name)
    with torch.no_grad():
        expected = model(x, noise()).prediction
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(x, noise()).prediction
    error = float((prediction - expected).norm() / expected.norm())
    assert 0 < error < 8 * torch.finfo(torch.bfloat16).eps
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(x, noise()).loss
    assert loss.dtype == torch.float32
    loss.backward()
    for key, gradient in gradients_of(model).items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all(), key
        assert gradient.any(), key


def test_a_model_on_the_meta_device_gives_shapes():
    model, x = create(MODEL).to("meta"), image(MODEL).to("meta")
    assert model(x).prediction.shape == (2, SIDE**2, patch_of(MODEL) ** 2 * 3)
