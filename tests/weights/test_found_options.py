"""The options of a model, found in its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_weights import (
    CHANNEL_VIM,
    CHANNELS,
    FASTVIM,
    SMALL,
    VARIANTS,
    VIM,
    WITHOUT_TRACE,
    create,
)

from fastvim import UserError
from fastvim.models import create_model
from fastvim.weights import (
    Checkpoint,
    convert,
    find_options,
    load_model,
    resolve,
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_found(variant):
    name, options = VARIANTS[variant]
    model = create(name, **options)
    found = find_options(model.state_dict(), 32)
    expected = {"class_token": name in (VIM, CHANNEL_VIM), **SMALL, **options}
    expected = {option: expected[option] for option in expected.keys() - WITHOUT_TRACE}
    assert {**found, **expected} == found
    rebuilt = create_model(CHANNELS if "channel" in name else FASTVIM, **found)
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    assert {n: t.shape for n, t in rebuilt.state_dict().items()} == shapes


@pytest.fixture
def golden_overlap():
    path = Path(__file__).parents[1] / "golden" / "vim_overlap.npz"
    arrays = dict(np.load(path))
    state = {k[6:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("state/")}
    return state, torch.from_numpy(arrays["in/image"]), torch.from_numpy(arrays["out/logits"])


def test_a_file_of_overlapping_patches_predicts_as_published(golden_overlap, tmp_path):
    state, image, expected = golden_overlap
    source, target = tmp_path / "vim.pth", tmp_path / "vim.safetensors"
    torch.save({"model": state}, source)
    found = convert(source, target, model_args={"img_size": 32})["model_args"]
    assert (found["patch_size"], found["patch_stride"], found["img_size"]) == (8, 4, 32)
    assert found["class_token"]
    assert not found["norm_after_ssm"]
    model, _ = load_model(path=target)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("patch", "stride", "size", "found"),
    [
        (16, 8, 224, (8, 224)),  # Vim's fine-tuned models, from the weights alone
        (16, 16, 224, (16, 224)),
        (16, 16, 384, (16, 384)),
        (8, 8, 32, (8, 32)),  # patches of 72 apart would also make 4 x 4 of 224 pixels
    ],
)
def test_strides_of_vim_without_a_word(patch, stride, size, found):
    side = (size - patch) // stride + 1
    state = create(VIM, patch_size=patch, img_size=side * patch).state_dict()
    options = find_options(state)
    assert (options["patch_stride"], options["img_size"]) == found


@pytest.mark.parametrize("name", [FASTVIM, VIM])
def test_real_sizes_find_their_names(name):
    with torch.device("meta"):
        state = create_model(name).state_dict()
    _, metadata = resolve(Checkpoint(Path("weights.pth"), state, "only"))
    assert metadata["model"] == name
    assert metadata["model_args"]["img_size"] == 224


@pytest.mark.parametrize(
    "missing", ["patch_embed.proj.weight", "pos_embed", "blocks.0.mixer.conv_weight"]
)
def test_options_of_another_architecture(missing):
    state = create().state_dict()
    del state[missing]
    with pytest.raises(UserError, match=f"{missing}.*missing"):
        find_options(state)


@pytest.mark.parametrize(
    ("img_size", "cells", "message"),
    [(None, 15, r"\(1, 15, 16\).*square"), (100, 16, "img_size=100"), ([20, 32], 16, "img_size")],
)
def test_positions_of_no_square_grid(img_size, cells, message):
    state = {**create().state_dict(), "pos_embed": torch.zeros(1, cells, 16)}
    with pytest.raises(UserError, match=message):
        find_options(state, img_size)
