"""Metadata of weights choose nothing that is run or fetched, and mean what a model can have."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from small_weights import SMALL, TINY

from fastvim import UserError
from fastvim.models import create_model
from fastvim.weights import METADATA_KEY, convert, load_model, read, save
from fastvim.weights.published import read_metadata

SOURCES = {
    "pretrained": True,
    "pretrained_cfg": {"url": "http://127.0.0.1:9/weights.pth"},
    "pretrained_cfg_overlay": {"file": "weights.pth"},
    "checkpoint_path": "weights.pth",
    "cache_dir": "elsewhere",
    "features_only": True,
}


def write(path, metadata: object, model: torch.nn.Module | None = None) -> str:
    """A file with any metadata, in either format."""
    state = (model or create_model(TINY, **SMALL)).state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path, {METADATA_KEY: json.dumps(metadata)})
    else:
        torch.save({"state_dict": state, METADATA_KEY: metadata}, path)
    return str(path)


def refused(path: str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path=path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("option", SOURCES)
def test_metadata_choose_no_other_weights(tmp_path, monkeypatch, option, ending):
    monkeypatch.setattr("urllib.request.urlopen", None)
    told = {"model": TINY, "model_args": {**SMALL, option: SOURCES[option]}}
    assert f"no option '{option}'" in refused(write(tmp_path / f"a.{ending}", told))


@pytest.mark.parametrize("name", ["resnet10t", "local-dir:elsewhere", "hf-hub:timm/resnet18"])
def test_another_librarys_model_is_built_where_the_user_names_it(tmp_path, name):
    model = create_model("resnet10t")
    file = write(tmp_path / "a.safetensors", {"model": name, "model_args": {}}, model)
    assert f"weights of {name}, no model of this library" in refused(file)
    with pytest.raises(UserError, match="no model of this library"):
        convert(file, tmp_path / "b.safetensors")
    if name == "resnet10t":
        loaded, _ = load_model(name, file)
        assert torch.equal(loaded.conv1[0].weight, model.conv1[0].weight)


@pytest.mark.parametrize("option", [o for o in SOURCES if o != "features_only"])
def test_nor_does_the_file_of_a_named_one_choose_other_weights(tmp_path, option):
    told = {"model": "resnet10t", "model_args": {option: SOURCES[option]}}
    file = write(tmp_path / "a.safetensors", told, create_model("resnet10t"))
    with pytest.raises(UserError, match=f"'{option}'"):
        load_model("resnet10t", file)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("depth", 10**9, "expected 1 to 1024"),
        ("img_size", 10**7, "expected 1 to 65536"),
        ("img_size", 60000, "its metadata describe a model of"),
        ("alternate", "no", "expected true or false"),
        ("norm", ["rms"], "expected one of 'rms', 'layer'"),
        ("depth", [2], "expected a whole number"),
        ("depht", 2, "no option 'depht' (nearest: depth"),
        ("traversals", [["h w", "w"]], "traversals"),
    ],
)
def test_options_are_those_of_the_constructor(tmp_path, option, value, words):
    told = {"model": TINY, "model_args": {**SMALL, option: value}}
    assert words in refused(write(tmp_path / "a.safetensors", told))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("mean", "x"), ("std", [0.0]), ("crop_pct", -1), ("crop_pct", 1e-9), ("img_size", 10**7)),
        *(("class_names", 5), ("class_names", [1]), ("in_chans", 7), ("orientation", "up")),
        *(("segmentation", {}), ("features", {}), ("weights", 5), ("model", 3)),
    ],
)
def test_other_fields_have_their_types_and_ranges(tmp_path, field, value):
    told = {"model": TINY, "model_args": SMALL, field: value}
    assert field in refused(write(tmp_path / "a.safetensors", told))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 10**5 + "]" * 10**5, "null", "x", "9" * 5000]
)
def test_metadata_that_are_none(tmp_path, text):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, {METADATA_KEY: text})
    assert "its metadata: " in refused(path)
    with pytest.raises(UserError):
        read_metadata(path)


def test_a_null_field_of_an_image_is_as_none(tmp_path):
    told = {"model": TINY, "model_args": SMALL, "value_range": None, "orientation": None}
    save(tmp_path / "a.safetensors", create_model(TINY, **SMALL).state_dict(), told)
    assert read(tmp_path / "a.safetensors").metadata == told


def test_a_model_larger_than_the_memory_is_refused():
    assert os.sysconf("SC_PHYS_PAGES")
    with pytest.raises(UserError, match="GiB of weights, and this machine"):
        create_model(TINY, embed_dim=60000, depth=1000)
