"""Where an autoencoder's weights go: into a classifier, into published files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_masked import PUBLISHED, all_kept, classifier, create, image, scramble

from fastvim.models import create_model
from fastvim.weights import checkpoint_filter_fn, from_published, to_published


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize("options", [{}, {"pool_scale": 0.25}])
def test_the_encoder_goes_into_a_classifier(kind, options):
    model = scramble(create(kind))
    if kind == "vim":
        options = {**options, "global_pool": "token"}
    bare = classifier(kind, num_classes=0, **options).double().eval()
    bare.load_state_dict(model.encoder_state_dict())
    own = dict(model.encoder.named_parameters())
    for name, tensor in model.encoder_state_dict().items():
        assert tensor.data_ptr() == own[name].data_ptr()  # not a copy
    whole = classifier(kind, num_classes=5, **options).double().eval()
    for weights in (model.state_dict(), to_published(model.state_dict())):
        fitted = checkpoint_filter_fn(weights, whole)
        head = {name: tensor for name, tensor in whole.state_dict().items() if "head" in name}
        assert fitted.keys() | head.keys() == whole.state_dict().keys()
        whole.load_state_dict({**fitted, **head})
        with torch.no_grad():
            torch.testing.assert_close(whole(image()), whole.head(bare(image())))
            if "pool_scale" not in options:
                latent = model.forward_encoder(image(), all_kept((4, 4)))
                read_out = latent[:, 8] if kind == "vim" else latent.mean(1)
                torch.testing.assert_close(bare(image()), read_out)


def test_registered_names_fit_each_other():
    for family in PUBLISHED:
        with torch.device("meta"):
            masked = create_model(f"mae_{family}_base_patch16_224")
            plain = create_model(f"{family}_base_patch16_224", num_classes=0)
        shapes = {n: t.shape for n, t in masked.encoder_state_dict().items()}
        assert shapes == {n: t.shape for n, t in plain.state_dict().items()}


def test_a_larger_classifier_gets_resized_positions():
    model, large = create("vim"), classifier("vim", (6, 6), num_classes=0, global_pool="token")
    large.load_state_dict(checkpoint_filter_fn(model.state_dict(), large))
    grid = model.encoder._cell_positions((4, 4)).unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False)
    position = large.pos_embed
    cells = torch.cat([position[:, :18], position[:, 19:]], dim=1)
    torch.testing.assert_close(cells.mT.unflatten(2, (6, 6)), resized)
    assert not position[:, 18].any()


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_names(kind):
    """As in the published files: the class token's position comes first."""
    state = scramble(create(kind)).state_dict()
    published = to_published(state)
    assert not [n for n in published if n.startswith(("encoder.", "blocks.", "norm."))]
    decoder = {"embed", "pos_embed", "blocks", "norm", "pred"}
    assert {
        n.split(".")[0].removeprefix("decoder_") for n in published if "decoder" in n
    } == decoder
    if kind == "vim":
        for name, ours, place in (
            ("pos_embed", "encoder.pos_embed", 8),
            ("decoder_pos_embed", "decoder_pos_embed", 16),
        ):
            vectors = list(state[ours][0])
            vectors.insert(0, vectors.pop(place))
            assert torch.equal(published[name][0], torch.stack(vectors))
    back = from_published(published)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
