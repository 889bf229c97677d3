"""segmentation_models_pytorch's decoders over the pyramid of `features_only`."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import fastvim  # noqa: F401  (registers the models)

smp = pytest.importorskip("segmentation_models_pytorch")
pytestmark = pytest.mark.clients

DECODERS = {
    "Unet": {},
    "UnetPlusPlus": {},
    "MAnet": {},
    "Linknet": {},
    "FPN": {},
    "PSPNet": {},
    "PAN": {},
    "DeepLabV3": {},
    "DeepLabV3Plus": {},
    "UPerNet": {},
    "Segformer": {},
    "DPT": {"decoder_readout": "ignore"},
}


def build(decoder: str, encoder: str = "fastvim_tiny_patch16_224", **options):
    torch.manual_seed(0)
    options = {"embed_dim": 16, "encoder_weights": None, "classes": 2, **options}
    return getattr(smp, decoder)(f"tu-{encoder}", **DECODERS[decoder], **options)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_learns(decoder):
    """To tell the bright half of an image; few steps on one batch lower the loss by a third."""
    model = build(decoder)
    torch.manual_seed(1)
    labels = (torch.arange(128) > 64).long().expand(2, 128, 128)
    images = torch.randn(2, 3, 128, 128) + labels[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    losses = []
    for _ in range(10):
        logits = model(images)
        assert logits.shape == (2, 2, 128, 128)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss))
        if len(losses) == 1:
            trained = dict(model.encoder.named_parameters())
            reached = [p for p in trained.values() if p.grad is not None and p.grad.any()]
            assert len(reached) > 0.9 * len(trained)
        optimizer.step()
    assert min(losses[-3:]) < losses[0] / 1.5, losses


@pytest.mark.parametrize(
    "encoder",
    [
        "vim_tiny_patch16_224",
        "fastvim_huge_patch14_224",
        "fastchannelvim_small_patch8_224",
        "mae_fastvim_tiny_patch16_224",
    ],
)
def test_every_family_is_an_encoder(encoder):
    model = build("Unet", encoder, in_channels=4).eval()
    assert model.encoder.out_channels == [4, 0, 16, 16, 16, 16]
    with torch.no_grad():
        assert model(torch.randn(1, 4, 96, 64)).shape == (1, 2, 96, 64)


def test_fewer_stages_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build("Unet", encoder_depth=3, decoder_channels=(32, 16, 16)).eval()
    assert model.encoder.out_channels == [3, 0, 16, 16]
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)
