"""Folders of weights that timm loads: `config.json`, and the model card."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import published_files as files
import pytest
import timm
import torch
import yaml
from hub_folders import draw, folder_of, predicted
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import fastvim
from fastvim.errors import MachineError
from fastvim.models import MaskedAutoencoder, create_model
from fastvim.weights import read
from fastvim.weights.card import SHOWN
from fastvim.weights.hub import save_folder, timm_config
from fastvim_cli import main

TINY = "fastvim_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
recent = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31),
    reason="timm adapts grey weights, and writes a model's options, from 1.0.31 on",
)
FILES = ("model.safetensors", "config.json", "README.md")


def write(folder: Path, name: str = TINY, told: dict | None = None, **options) -> torch.nn.Module:
    """A folder of a small model; returns the model."""
    torch.manual_seed(0)
    options = {**SMALL, "num_classes": 3, **options}
    model = create_model(name, **options).eval()
    save_folder(
        folder, model.state_dict(), {"model": name, "model_args": options, **(told or {})}, model
    )
    return model


def by_timm(folder: Path, **options) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def output(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # of the mask
    with torch.no_grad():
        found = model(images)
    return found.prediction if isinstance(model, MaskedAutoencoder) else found


DENSE = {next(iter(entry.head)): name for name, entry in files.PUBLISHED.items() if entry.head}
BY_TIMM = [name for name, entry in files.PUBLISHED.items() if not entry.head]


@pytest.mark.parametrize("name", [*BY_TIMM, *DENSE.values()])
def test_every_entry_gives_a_folder(name, tmp_path, monkeypatch):
    folder = folder_of(name, tmp_path, monkeypatch)
    ours, metadata = fastvim.load_model(path=folder / "model.safetensors")
    assert metadata["licence"].lower() == front_matter(folder)["license"]
    if files.PUBLISHED[name].head:
        assert {file.name for file in folder.iterdir()} == {"model.safetensors", "README.md"}
        assert front_matter(folder)["library_name"] == "fastvim"
        return
    theirs = by_timm(folder)
    assert theirs.pretrained_cfg["license"] == metadata["licence"].lower()
    config = resolve_model_data_config(theirs)
    images = torch.randn(1, *config["input_size"])
    assert config["input_size"][0] == files.PUBLISHED[name].images["in_chans"]
    torch.testing.assert_close(output(theirs, images), output(ours.eval(), images), rtol=0, atol=0)
    assert theirs.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_timm_predicts_as_the_command(mode, tmp_path):
    told = {"img_size": [40, 32], "mean": [0.4], "std": [0.3], "crop_pct": 0.8}
    told |= {"interpolation": "bilinear", "class_names": ["a", "b", "a b"]}
    write(tmp_path / "run", told=told, in_chans=len(mode))
    paths = draw(tmp_path, mode)
    model = by_timm(tmp_path / "run")
    names = model.pretrained_cfg["label_names"]
    prepare = create_transform(**resolve_model_data_config(model))
    for path, expected in zip(paths, predicted(tmp_path / "run", paths, tmp_path), strict=True):
        with Image.open(path) as image:
            found = output(model, prepare(image)[None]).softmax(-1)[0]
        assert dict(zip(names, found.tolist(), strict=True)) == pytest.approx(expected, abs=1e-6)


@recent
def test_timm_adapts_it(tmp_path):
    trained = write(tmp_path, in_chans=1)
    assert by_timm(tmp_path, num_classes=7).head.out_features == 7
    coloured = by_timm(tmp_path, in_chans=3)
    grey = torch.randn(1, 1, 32, 32)
    # timm repeats a grey filter and divides it by the number of colours.
    expected = output(trained, grey)
    torch.testing.assert_close(output(coloured, grey.expand(-1, 3, -1, -1)), expected)
    (maps,) = by_timm(tmp_path, features_only=True, out_indices=[1])(grey)
    assert maps.shape == (1, 16, 4, 4)


def test_a_grey_model_takes_rgb_where_it_is_told(tmp_path):
    """As transformers' pipeline makes every image RGB."""
    trained, loaded = write(tmp_path, in_chans=1), by_timm(tmp_path)
    grey = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(output(loaded, grey.expand(-1, 3, -1, -1)), output(trained, grey))
    colours = torch.rand(2, 3, 32, 32)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    mixed = (luma * colours).sum(1, keepdim=True)
    torch.testing.assert_close(output(loaded, colours), output(trained, mixed), rtol=0, atol=1e-4)
    with pytest.raises(fastvim.UserError, match="expected \\(batch, 1, height, width\\)"):
        trained(colours)


def test_a_name_with_a_tag_keeps_the_options_of_the_tag(tmp_path):
    name = "fastvim_base_patch16_224.mae_in1k_ft_in1k"
    trained = write(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "fastvim_base_patch16_224"
    assert "url" not in config["pretrained_cfg"]
    loaded = by_timm(tmp_path)
    assert loaded.blocks[0].mixer.pool_scale == trained.blocks[0].mixer.pool_scale == 0.25


def test_other_models_need_no_fastvim(tmp_path):
    torch.manual_seed(0)
    options = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_classes": 2}
    model = create_model("vit_tiny_patch16_224", **options).eval()
    metadata = {"model": "vit_tiny_patch16_224", "model_args": options, "img_size": 32}
    save_folder(tmp_path, model.state_dict(), metadata, model)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(output(by_timm(tmp_path), images), output(model, images))
    assert "import fastvim, timm" not in (tmp_path / "README.md").read_text()


def test_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    """`hf-hub:` without network, as the hub's client lays a repository down."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "models--me--photos"
    expected = write(place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    model = timm.create_model("hf-hub:me/photos", pretrained=True, cache_dir=tmp_path).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(output(model, images), output(expected, images))


@recent
def test_timm_uploads_it(tmp_path, monkeypatch):
    """`push_to_hf_hub`, as the README says; the upload is a copy."""
    names = ["ant", "bee", "cat"]
    write(tmp_path / "run", told={"class_names": names, "img_size": 32})

    class Hub:
        def __init__(self, **unused) -> None:
            pass

        def create_repo(self, repo_id, **unused):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def file_exists(self, **unused):
            return False

        def upload_folder(self, *, folder_path, **unused):
            shutil.copytree(folder_path, tmp_path / "uploaded")

    monkeypatch.setattr("timm.models._hub.HfApi", Hub)
    model = by_timm(tmp_path / "run")
    timm.models.push_to_hf_hub(
        model, "me/photos", model_config={"label_names": model.pretrained_cfg["label_names"]}
    )
    uploaded = by_timm(tmp_path / "uploaded")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(output(uploaded, images), output(model, images))
    assert list(uploaded.pretrained_cfg["label_names"]) == names


@pytest.mark.slow
def test_without_fastvim_timm_does_not_know_the_model(tmp_path):
    write(tmp_path)
    program = f"import timm; timm.create_model('local-dir:{tmp_path}')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"Unknown model ({TINY})" in done.stderr
    program = f"import fastvim, {program.removeprefix('import ')}"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# The card.


def test_the_card_says_what_is_known(tmp_path):
    told = {"licence": "CC-BY-NC-SA-4.0", "started_from": f"{TINY}.in1k", "weights": "EMA"}
    told |= {"metrics": ["val acc1 96.40%"], "class_names": ["a|b", "two\nlines", "```"]}
    recipe = {
        "data": {"class_path": "Data", "init_args": {"root": "/home/me/photos", "seed": None}}
    }
    torch.manual_seed(0)
    options = {**SMALL, "num_classes": 3}
    model = create_model(TINY, **options)
    metadata = {"model": TINY, "model_args": options, **told}
    save_folder(tmp_path, model.state_dict(), metadata, model, recipe)
    card = (tmp_path / "README.md").read_text()
    assert front_matter(tmp_path) == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "fastvim", "mamba", "state-space-model"],
        "license": "cc-by-nc-sa-4.0",
    }
    for line in ("- val acc1 96.40%", '"a|b"', '"two\\nlines"', '"```"', "averaged over"):
        assert line in card
    assert f"weights that the training started from: `{TINY}.in1k`" in card
    assert "photos" in card
    assert "/home/me" not in card
    assert "seed" not in card
    assert read(tmp_path / "model.safetensors").metadata == metadata


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        (None, {}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("ask me: first", {"license": "other", "license_name": "ask me: first"}),
    ],
)
def test_the_licence_as_the_hub_has_it(licence, fields, tmp_path):
    write(tmp_path, told={} if licence is None else {"licence": licence})
    found = front_matter(tmp_path)
    assert {name: found[name] for name in found if name.startswith("license")} == fields


def test_names_of_many_classes_and_odd_ones(tmp_path):
    names = [f"{i} é \udce9 \" ' \\ \n # {{}}" for i in range(SHOWN + 2)]
    write(tmp_path, told={"class_names": names}, num_classes=len(names))
    assert by_timm(tmp_path).pretrained_cfg["label_names"] == names
    assert "and 2 more" in (tmp_path / "README.md").read_text()


def test_files_of_others_stay(tmp_path, caplog):
    write(tmp_path)
    write(tmp_path)  # its own are written anew
    assert not caplog.text
    (tmp_path / "README.md").write_text("# My own notes\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    write(tmp_path, num_classes=5)
    assert (tmp_path / "README.md").read_text() == "# My own notes\n"
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "bert"}
    for name in ("README.md", "config.json"):
        assert f"{tmp_path / name} is not of fastvim: left as it is" in caplog.text


@pytest.mark.parametrize("call", [1, 2, 3])
def test_on_a_full_disk_all_files_stay_as_they_were(call, tmp_path, monkeypatch):
    write(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    calls, synchronise = [], os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        synchronise(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(MachineError, match="the disk is full"):
        write(tmp_path, num_classes=9)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_command_converts_to_a_folder(tmp_path, monkeypatch, capsys):
    write(tmp_path / "run", in_chans=1)
    source, target = tmp_path / "run" / "model.safetensors", tmp_path / "again"
    assert main(["convert", str(source), str(target)]) == 0
    assert f"written to {target}" in capsys.readouterr().out
    for name in ("config.json", "README.md"):
        assert (target / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    images = torch.randn(1, 1, 32, 32)
    assert torch.equal(output(by_timm(target), images), output(by_timm(tmp_path / "run"), images))


def test_what_timm_says_of_a_model_is_of_these_weights():
    model = create_model("vim_tiny_patch16_224.midcls_in1k", **SMALL)
    metadata = {"model": "vim_tiny_patch16_224", "model_args": SMALL, "in_chans": 3}
    config = timm_config(model, metadata)
    assert config is not None
    assert not {"url", "license", "tag"} & config["pretrained_cfg"].keys()
