"""The published weights by name: every entry of the table, in small, out of its true layout."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import published_files as files
import pytest
import timm
import torch
from PIL import Image

import fastvim
from fastvim.errors import MachineError, UserError
from fastvim.models import CascadeMaskRCNN, FastVim, MaskedAutoencoder, UPerNet
from fastvim.weights import fetch, find, is_file_name, published, published_file, read
from fastvim.weights.table import APACHE, ENTRIES, NON_COMMERCIAL, Entry

TINY = "fastvim_tiny_patch16_224.in1k"
MIDCLS = "vim_tiny_patch16_224.midcls_in1k"
CLASSIFIERS = {
    "fastvim": "fastvim_small_patch16_224.in1k",
    "vim": "vim_base_patch16_224.in1k",
    "original": "vim_small_patch16_stride8_224.midcls_ft_in1k",
}


@pytest.fixture
def serve(server, monkeypatch):
    """Serves an entry in small, in the table's place."""

    def served(name: str, content: bytes | None = None) -> Entry:
        entry = files.small(files.PUBLISHED[name], server.address)
        monkeypatch.setitem(ENTRIES, name, entry)
        server.files[files.path_of(entry)] = files.write(entry) if content is None else content
        return entry

    return served


def gets(server) -> list[str]:
    return [path for method, path, _ in server.requests if method == "GET" and path in server.files]


def assert_equal(state, expected) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


KINDS = {"segmentation": UPerNet, "detection": CascadeMaskRCNN}


@pytest.mark.parametrize("name", files.PUBLISHED)
def test_every_entry_by_name(name, serve, server, monkeypatch):
    entry = serve(name)
    model, metadata = fastvim.load_model(name)
    kind = MaskedAutoencoder if name.startswith("mae_") else FastVim
    assert isinstance(model, next((KINDS[head] for head in entry.head), kind))
    assert_equal(model.state_dict(), files.weights(entry))
    assert metadata["published"] == name
    assert metadata["licence"] == (APACHE if "midcls" in name else NON_COMMERCIAL)
    assert metadata["number"] == entry.number
    assert metadata["weights"] == {True: "EMA", False: metadata["weights"]}[entry.averaged]
    for setting, value in entry.images.items():
        assert metadata[setting] == (list(value) if isinstance(value, tuple) else value)
    names = {"ade20k": files.SCENES, "coco": files.OBJECTS}
    if files.is_bare(entry):  # and the table's names are of other classes
        names["ade20k"] = ["0", "1", "2", "3", "4"]
    assert metadata.get("class_names") == names.get(entry.data)

    assert gets(server) == [files.path_of(entry)]
    monkeypatch.setattr(published, "read", None)  # nothing is read anew
    again, _ = fastvim.load_model(name)
    assert_equal(again.state_dict(), model.state_dict())
    if not entry.head:
        by_timm = timm.create_model(name, pretrained=True)
        assert_equal(by_timm.state_dict(), model.state_dict())
        for cfg in (by_timm.pretrained_cfg, model.pretrained_cfg):
            assert (cfg["url"], cfg["tag"]) == (entry.url, entry.tag)
            assert cfg["license"] == entry.licence.lower()
            assert "file" not in cfg
            assert not any(isinstance(value, dict | torch.Tensor) for value in cfg.values())
    assert gets(server) == [files.path_of(entry)]


def test_the_table_has_what_was_published():
    assert len(files.PUBLISHED) == 26
    assert len({entry.url for entry in files.PUBLISHED.values()}) == 26
    recipes = Path(__file__).parents[2] / "recipes"
    for entry in files.PUBLISHED.values():
        assert not entry.recipe or (recipes / f"{entry.recipe}.yaml").is_file(), entry.recipe


# Options.


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(
    ("name", "option", "value", "default"),
    [
        (MIDCLS, "norm_after_ssm", False, True),
        ("fastvim_base_patch16_224.mae_in1k_ft_in1k", "pool_scale", 0.25, 1.0),
        ("fastchannelvim_small_patch8_224.jumpcp_maxpool", "pooling", "max", "mean"),
    ],
)
def test_the_tag_alone_chooses_the_options(name, option, value, default, pretrained, serve):
    entry = serve(name)
    mixers = [
        timm.create_model(name, pretrained=pretrained).blocks[0].mixer,
        timm.create_model(entry.backbone, embed_dim=16, depth=2).blocks[0].mixer,
    ]
    told = {
        "norm_after_ssm": lambda mixer: hasattr(mixer, "norm") and mixer.norm is not None,
        "pool_scale": lambda mixer: mixer.pool_scale,
        "pooling": lambda mixer: mixer.pooling,
    }
    assert [told[option](mixer) for mixer in mixers] == [value, default]
    configuration = timm.create_model(entry.backbone, depth=1).pretrained_cfg
    assert "tag" not in configuration  # initial weights are nobody's


def test_a_name_without_a_tag_means_the_first_one(serve, caplog):
    entry = serve(MIDCLS)
    model = timm.create_model(entry.backbone, pretrained=True)
    assert_equal(model.state_dict(), files.weights(entry))
    assert model.pretrained_cfg["tag"] == "midcls_in1k"
    again = timm.create_model(entry.backbone, pretrained_cfg=model.pretrained_cfg, pretrained=True)
    assert_equal(again.state_dict(), model.state_dict())
    loaded, metadata = fastvim.load_model(entry.backbone)
    assert_equal(loaded.state_dict(), model.state_dict())
    assert metadata["published"] == MIDCLS
    caplog.clear()
    model, metadata = fastvim.load_model("mae_fastvim_tiny_patch16_224", depth=1, decoder_depth=1)
    assert "no published weights" in caplog.text
    assert metadata == {
        "model": "mae_fastvim_tiny_patch16_224",
        "model_args": metadata["model_args"],
    }


def test_the_other_copy_of_the_weights(serve):
    for name, label in ((TINY, "raw"), (MIDCLS, "EMA")):
        entry = serve(name)
        other = files.weights(entry, seed=1)
        file = published_file(name, ema=not entry.averaged)
        assert_equal(read(file).state, other)
        assert read(file).metadata["weights"] == label
        assert_equal(find(name).state, files.weights(entry))
    model, metadata = fastvim.load_model(TINY, ema=False)
    assert_equal(model.state_dict(), files.weights(ENTRIES[TINY], seed=1))
    assert metadata["weights"] == "raw"
    assert_equal(find(TINY, ema=False).state, model.state_dict())


def test_a_word_is_a_name_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("weights").touch()
    assert all(map(is_file_name, ["weights", "a/b.safetensors", "b.ckpt", "~/c.pth", "d.pt"]))
    assert not any(map(is_file_name, [TINY, "fastvim_tiny_patch16_224", "other"]))


# What timm adapts.


@pytest.mark.parametrize("name", CLASSIFIERS.values())
def test_timm_adapts_published_weights(name, serve):
    entry = serve(name)
    expected = files.weights(entry)
    images = torch.randn(1, 3, 224, 224)
    other = timm.create_model(name, pretrained=True, num_classes=10).eval()
    assert other(images).shape == (1, 10)
    assert torch.equal(other.norm.weight, expected["norm.weight"])
    grey = timm.create_model(name, pretrained=True, in_chans=1)
    weight = expected["patch_embed.proj.weight"]
    torch.testing.assert_close(grey.patch_embed.proj.weight, weight.sum(1, keepdim=True))
    assert torch.equal(grey.head.weight, expected["head.weight"])
    maps = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0, 1))
    assert torch.equal(maps.model.patch_embed.proj.weight, weight)
    assert [m.shape[1] for m in maps.eval()(images)] == [16, 16]
    for cfg in (maps.pretrained_cfg, maps.model.pretrained_cfg):
        assert cfg["url"] == entry.url
        assert "file" not in cfg
    model, metadata = fastvim.load_model(name, num_classes=7)
    assert model.eval()(images).shape == (1, 7)
    assert metadata["model_args"]["num_classes"] == 7


CHANNELS = ["fastchannelvim_small_patch16_224.jumpcp", "channelvim_small_patch16_224.jumpcp"]


@pytest.mark.parametrize("name", CHANNELS)
def test_published_channel_models_take_fewer_channels(name, serve, caplog):
    entry = serve(name)
    expected = files.weights(entry)
    model = timm.create_model(name, pretrained=True, num_classes=10, in_chans=3).eval()
    vectors = model.patch_embed.channel_embed.weight
    assert torch.equal(vectors, expected["patch_embed.channel_embed.weight"][:3])
    assert "the first 3 of 8 channels" in caplog.text
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 10)
    one = timm.create_model(name, pretrained=True, in_chans=1, features_only=True, out_indices=[1])
    assert one.eval()(torch.randn(1, 1, 224, 224))[0].shape[1] == 16
    with pytest.raises(UserError, match="in_chans=9: the weights know 8 channels"):
        timm.create_model(name, pretrained=True, in_chans=9)


@pytest.mark.parametrize(
    ("name", "options"),
    [(TINY, {"embed_dim": 24}), ("mae_vim_base_patch16_224.in1k", {"in_chans": 1})],
)
def test_options_that_the_weights_do_not_fit_are_one_line(name, options, serve):
    serve(name)
    for create in (
        lambda: timm.create_model(name, pretrained=True, **options),
        lambda: fastvim.load_model(name, **options),
    ):
        with pytest.raises(UserError, match=f"the weights of {name} do not fit") as error:
            create()
        assert "\n" not in str(error.value)


def test_other_sources_of_weights_stay_the_callers(serve, server, tmp_path):
    entry = serve(MIDCLS)
    source = timm.create_model(entry.backbone, **entry.model_args | {"norm_after_ssm": True})
    torch.save(source.state_dict(), tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth"), "num_classes": 5}
    sizes = {"embed_dim": 16, "depth": 2, "num_classes": 5}
    own = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    model = timm.create_model(entry.backbone, **own, **sizes)
    assert_equal(model.state_dict(), source.state_dict())
    timm.create_model(MIDCLS, pretrained=True, cache_dir=str(tmp_path / "elsewhere"))
    assert len(gets(server)) == 1


# Names and files that are wrong.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fastvim_tiny_patch16_224.in21k", "fastvim_tiny_patch16_224 has the tags in1k"),
        ("vim_base_patch16_224.jumpcp", "has the tags in1k, mae_in1k_ft_in1k, midcls_in1k"),
        ("upernet_fastvim_tiny_patch16_512.coco", "has the tags ade20k"),
        ("upernet_fastvim_tinny_patch16_512", "nearest: upernet_fastvim_tiny_patch16_512.ade20k"),
        ("fastvim_tinny_patch16_224", "nearest: fastvim_tiny_patch16_224"),
    ],
)
def test_wrong_names_are_one_line(name, message):
    for load in (fastvim.load_model, published_file, find):
        with pytest.raises(UserError, match=message) as error:
            load(name)
        assert "\n" not in str(error.value)


def test_an_unknown_tag_is_one_line_for_timm():
    with pytest.raises(UserError, match="has the tags in1k"):
        timm.create_model("fastvim_tiny_patch16_224.in21k")
    with pytest.raises(UserError, match="no published weights"):
        timm.create_model("fastvim_large_patch16_224", pretrained=True)


def test_half_a_file_does_not_stay_in_the_cache(serve, server):
    for name in (TINY, MIDCLS):
        entry = serve(name)
        server.faults[files.path_of(entry)] = [] if name == MIDCLS else ["short"]
        if name == MIDCLS:  # the hub's client would ask for the rest
            server.files[files.path_of(entry)] = files.write(entry)[:2000]
        with pytest.raises(UserError, match="removed from the cache") as error:
            fastvim.load_model(name)
        assert entry.url in str(error.value)
        assert "\n" not in str(error.value)
        assert fetch.here(entry.url) is None
        server.files[files.path_of(entry)] = files.write(entry)
        model, _ = fastvim.load_model(name)
        assert_equal(model.state_dict(), files.weights(entry))


class Runs:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_file_that_wants_to_run_something_is_refused(serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = files._bytes({"state_dict": {"a": torch.ones(1)}, "extra": Runs()})
    entry = serve(TINY, content)
    with pytest.raises(UserError, match="system") as error:
        fastvim.load_model(TINY)
    assert "\n" not in str(error.value)
    assert not Path("executed").exists()
    assert fetch.here(entry.url) is None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's own folder of files."""
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("FASTVIM_WEIGHTS", str(tmp_path / "mine"))
    return tmp_path / "mine"


def test_the_users_file_is_converted_again_when_it_changes(serve, server, folder, monkeypatch):
    entry = serve(TINY)
    file = folder / entry.file
    for seed in (0, 1):
        state = {f"backbone.{n}": t for n, t in files.published_state(entry, seed).items()}
        torch.save({"state_dict": state}, file)
        model, _ = fastvim.load_model(TINY)
        assert_equal(model.state_dict(), files.weights(entry, seed))
    os.utime(file)
    converted = published_file(TINY)
    before = converted.stat().st_mtime_ns
    assert published_file(TINY).stat().st_mtime_ns == before  # the same bytes
    monkeypatch.setitem(ENTRIES, TINY, replace(entry, licence="other"))
    assert read(published_file(TINY)).metadata["licence"] == "other"
    assert not gets(server)


def test_wrong_files_of_the_user_stay_and_are_one_line(serve, folder):
    entry, other = serve(TINY), serve("vim_base_patch16_224.in1k")
    file = folder / entry.file
    with pytest.raises(UserError, match="is missing") as error:
        fastvim.load_model(TINY)
    assert entry.url in str(error.value)
    whole = files.write(entry)
    wrong = {whole[: len(whole) // 2]: "damaged", files.write(other): "fastvim_tiny_patch16_224"}
    for content, message in wrong.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            fastvim.load_model(TINY)
        for part in (str(file), entry.url):
            assert part in str(error.value)
        assert "\n" not in str(error.value)
        assert file.read_bytes() == content
    assert not list(fetch.cache_folder().glob("*.safetensors*"))


def test_other_shapes_are_named_with_the_checksum(serve, folder, monkeypatch):
    entry = serve(TINY)
    (folder / entry.file).write_bytes(files.write(entry))
    monkeypatch.setitem(ENTRIES, TINY, replace(entry, model_args={**entry.model_args, "depth": 3}))
    with pytest.raises(UserError, match="missing blocks") as error:
        fastvim.load_model(TINY)
    for part in (entry.url, "SHA-256", fetch.digest(folder / entry.file)):
        assert part in str(error.value)


@pytest.fixture
def unwritable(monkeypatch) -> Iterator[Path]:
    """A cache that this user cannot write into."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        monkeypatch.setenv("TORCH_HOME", name)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)


def test_a_cache_that_cannot_be_written_and_a_folder_of_files(
    serve, unwritable, caplog, monkeypatch
):
    entry = serve(TINY)
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("FASTVIM_WEIGHTS", folder)
        Path(folder, entry.file).write_bytes(files.write(entry))
        published._temporary_folder.cache_clear()
        for _ in range(2):
            model, _ = fastvim.load_model(TINY)
            assert_equal(model.state_dict(), files.weights(entry))
    assert caplog.text.count("cannot be written") == 1
    assert not list(unwritable.iterdir())


def test_a_full_disk_while_converting_leaves_nothing(serve, folder, monkeypatch):
    entry = serve(TINY)
    (folder / entry.file).write_bytes(files.write(entry))

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastvim.storage.os.fsync", full)
    with pytest.raises(MachineError, match="the disk is full"):
        fastvim.load_model(TINY)
    assert not [f for f in fetch.cache_folder().iterdir() if f.suffix != ".lock"]


def test_the_licence_is_said_once(serve, caplog):
    serve(TINY)
    for _ in range(2):
        fastvim.load_model(TINY)
    assert caplog.text.count("CC-BY-NC-SA-4.0, not for commercial use") == 1


# The commands.


def command(server, caches, *words: str) -> subprocess.CompletedProcess:
    """The real command line over the small entries."""
    script = [sys.executable, files.__file__, server.address]
    hub = {"HF_ENDPOINT": server.address, "HF_HUB_CACHE": str(caches / "hub")}
    environment = {**os.environ, **hub, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [*script, *words], capture_output=True, text=True, env=environment, cwd=caches
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (TINY, ["predict", "photo.png"]),
        (MIDCLS, ["predict", "photo.png"]),
        (CHANNELS[0], ["predict", "cells.npy"]),
        ("mae_vim_base_patch16_224.in1k", ["reconstruct", "photo.png"]),
        ("upernet_fastvim_tiny_patch16_512.ade20k", ["segment", "photo.png"]),
        ("cascade_mask_rcnn_vim_small_patch16_1024.coco", ["detect", "photo.png"]),
    ],
)
def test_the_command_that_fits_takes_a_name(name, words, serve, server, caches):
    serve(name)
    Image.linear_gradient("L").resize((120, 90)).convert("RGB").save(caches / "photo.png")
    np.save(caches / "cells.npy", np.zeros((8, 224, 224), np.float32))
    arguments = (*words, "--model", name, "--device", "cpu", "--out", "out")
    first = command(server, caches, *arguments)
    assert first.returncode == 0, first.stderr
    licence = "Apache-2.0" if name == MIDCLS else "CC-BY-NC-SA-4.0, not for commercial use"
    assert first.stderr.count(f"licence {licence}") == 1
    written = sorted((caches / "out").rglob("*.*"))
    assert written
    shutil.rmtree(caches / "out")
    again = command(server, caches, *arguments)
    assert again.returncode == 0, again.stderr
    assert "licence" not in again.stderr
    assert again.stdout == first.stdout
    assert sorted((caches / "out").rglob("*.*")) == written
    assert len(gets(server)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [TINY, MIDCLS])
def test_a_command_without_its_file_ends_with_one_line(name, serve, server, caches):
    entry = serve(name)
    server.faults[files.path_of(entry)] = [404] * 9
    Image.new("RGB", (32, 32)).save(caches / "photo.png")
    run = command(server, caches, "predict", "photo.png", "--model", name)
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("fastvim: error: cannot fetch")
    for part in (entry.url, "404", entry.file, "FASTVIM_WEIGHTS"):
        assert part in line
