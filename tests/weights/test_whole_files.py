"""Whole published segmentors and detectors, from the files as their tools wrote them."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_weights import assert_equal
from torch import Tensor
from whole_files import FILES, WHOLE, arrays, close, content, rewritten

from fastvim.errors import UserError
from fastvim.models import CascadeMaskRCNN, FeatureMaps, UPerNet, create_model
from fastvim.models.heads.sliding import sliding_window
from fastvim.tasks.dense_task import load_backbone
from fastvim.weights import convert, load_model, load_state, read, resolve, save
from fastvim_cli import main


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def logits_of(path, name: str, **options) -> Tensor:
    model, _ = load_model(path=path, **options)
    return model.eval()(arrays(name)["tensor"])


# Segmentors and detectors.


def check_segmentor(path, **options) -> dict:
    """All arrays of the golden segmentor; returns the metadata."""
    golden = arrays("segmentor")
    model, metadata = load_model(path=path, **options)
    assert isinstance(model.eval(), UPerNet)
    maps = model.maps(golden["whole/tensor"])
    for i, found in enumerate(maps):
        close(found, golden[f"whole/map{i}"])
    close(model.head(maps), golden["whole/logits_grid"])
    close(model.aux_head(maps[model.aux_map]), golden["whole/aux_logits_grid"])
    logits = model(golden["whole/tensor"])
    close(logits, golden["whole/logits"])
    assert torch.equal(logits.argmax(dim=1), golden["whole/labels"].long())
    sides = metadata["segmentation"]["window"], metadata["segmentation"]["stride"]
    logits = sliding_window(model, golden["slide/tensor"], *sides)
    close(logits, golden["slide/logits"])
    assert torch.equal(logits.argmax(dim=1), golden["slide/labels"].long())
    return metadata


def check_detector(path, **options) -> dict:
    """The golden detections, one to one; returns the metadata."""
    golden = arrays("detector")
    model, metadata = load_model(path=path, **options)
    assert isinstance(model.eval(), CascadeMaskRCNN)
    image = golden["padded_bgr"].flip(-1).movedim(-1, 0) / 255
    with torch.backends.mkldnn.flags(enabled=False):  # whose convolutions are good to 1e-4 alone
        (found,) = model([image])
    boxes, labels = golden["padded/boxes"], golden["padded/labels"]
    assert len(found["boxes"]) == len(boxes)
    apart = (boxes[:, None] - found["boxes"]).abs().amax(dim=2)
    apart[labels[:, None] + 1 != found["labels"]] = torch.inf
    place = apart.argmin(dim=1)
    assert len(set(place.tolist())) == len(boxes)
    assert apart.amin(dim=1).max() < 0.02
    assert (golden["padded/scores"] - found["scores"][place]).abs().max() < 2e-4
    return metadata


CHECKS = {"segmentor.pth": check_segmentor, "detector.pth": check_detector}


def test_a_segmentor():
    metadata = check_segmentor(WHOLE / "segmentor.pth")
    assert metadata["segmentation"] == {
        "num_classes": 5,
        "out_indices": [1, 3, 5, 7],
        "source": "mixer",
        "channels": 12,
        "aux_channels": 8,
        "window": 64,
        "stride": 43,
    }
    assert metadata["class_names"] == ["wall", "sky", "tree", "road", "door"]
    assert metadata["reduce_zero_label"] is True
    assert metadata["antialias"] is False
    assert metadata["base_size"] == [256, 64]
    assert metadata["mean"] == [0.485, 0.456, 0.406]


def test_a_detector():
    metadata = check_detector(WHOLE / "detector.pth")
    assert metadata["detection"]["pad_to"] == metadata["eval_size"] == 128
    assert metadata["detection"]["heads"]["hidden_dim"] == 16
    assert metadata["class_names"] == ["cat", "cup", "key"]
    assert metadata["category_ids"] == [1, 2, 3]
    assert metadata["antialias"] is False


def test_a_files_own_configuration_needs_no_assumption(caplog):
    for file in CHECKS:
        load_model(path=WHOLE / file)
    assert not caplog.records


@pytest.mark.parametrize("file", CHECKS)
@pytest.mark.parametrize("zipped", [True, False])
def test_without_optimiser_and_records(file, zipped, tmp_path):
    """As the publishing tools leave it, in both formats of torch."""
    path = tmp_path / "published.pth"
    CHECKS[file](rewritten(file, path, lambda all: all, zipped=zipped))


@pytest.mark.parametrize("file", CHECKS)
def test_a_bare_state_dict(file, tmp_path, caplog):
    """Nothing tells maps, windows and classes: assumed and said."""
    path = rewritten(file, tmp_path / "bare.pth", lambda all: all["state_dict"])
    metadata = CHECKS[file](path)
    (record,) = caplog.records
    for words in ("a FastVim", "class_names='numbers'", "pool_scale=1.0"):
        assert words in record.message
    if file == "segmentor.pth":
        for words in ("out_indices=[1, 3, 5, 7]", "window=64", "stride=43", "base_size=[256, 64]"):
            assert words in record.message
        assert metadata["class_names"] == ["0", "1", "2", "3", "4"]
    else:
        assert "pad_to=128" in record.message


@pytest.mark.parametrize("file", CHECKS)
def test_averages_of_a_hook(file, tmp_path):
    """The averaged weights lie in `state_dict`, the raw ones beside, with a count of steps."""

    def averaged(all: dict) -> dict:
        raw = {f"module.{n}": torch.zeros_like(t) for n, t in all["state_dict"].items()}
        return {**all, "ema_state_dict": {**raw, "steps": torch.tensor(7)}}

    path = rewritten(file, tmp_path / "hook.pth", averaged)
    assert CHECKS[file](path)["weights"] == "EMA"
    raw = read(path, ema=False)
    assert raw.weights == "raw"
    assert raw.state.keys() == content(file)["state_dict"].keys()
    assert not any(tensor.any() for tensor in raw.state.values())


@pytest.mark.parametrize("spelling", ["MM_Vim", "MM_ViM", "mmdet.MM_VIM", "VisionMamba_Vim"])
def test_a_vim_is_told_by_the_configuration_alone(spelling, tmp_path, caplog):
    def as_vim(all: dict) -> dict:
        text = all["meta"]["cfg"].replace("MM_FastVim", spelling)
        return {**all, "meta": {**all["meta"], "cfg": text}}

    path = rewritten("segmentor.pth", tmp_path / "vim.pth", as_vim)
    image = arrays("segmentor")["whole/tensor"]
    model, metadata = load_model(path=path)
    assert metadata["model"].startswith("vim_")
    assert len(model.maps.backbone.traversals) == 1
    assert not caplog.records
    expected, _ = load_model(path=WHOLE / "segmentor.pth", pooling="none")
    found = model.eval()(image)
    assert torch.equal(found, expected.eval()(image))
    assert not torch.allclose(found, arrays("segmentor")["whole/logits"], atol=1e-2)
    convert(path, tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    for file in ("ours.safetensors", "back.pth"):
        model, _ = load_model(path=tmp_path / file)
        assert torch.equal(model.eval()(image), found)


def test_other_maps(tmp_path, caplog):
    """Of a configuration; blocks after the last map are left out, and said."""

    def earlier(all: dict) -> dict:
        text = all["meta"]["cfg"].replace("            7,\n", "            6,\n")
        assert text != all["meta"]["cfg"]
        return {**all, "meta": {**all["meta"], "cfg": text}}

    path = rewritten("segmentor.pth", tmp_path / "other.pth", earlier)
    model, metadata = load_model(path=path)
    assert metadata["segmentation"]["out_indices"] == [1, 3, 5, 6]
    assert len(model.maps.backbone.blocks) == 7
    assert "blocks from 7 on are left out" in caplog.text
    model, _ = load_model(path=WHOLE / "segmentor.pth", out_indices=[0, 1, 2, 7])
    assert list(model.maps.out_indices) == [0, 1, 2, 7]
    with pytest.raises(UserError, match=r"out_indices \[0, 7\]: the weights are for 4 maps"):
        load_model(path=WHOLE / "segmentor.pth", out_indices=[0, 7])


@pytest.mark.parametrize("file", FILES)
def test_there_and_back(file, tmp_path):
    """Published names, shapes and values are the same, and what is read again computes the same."""
    options = {"pool_scale": 0.25} if file == "finetuned.ckpt" else {}
    ours, back = tmp_path / "ours.safetensors", tmp_path / f"back.{file.partition('.')[2]}"
    convert(WHOLE / file, ours, model_args=options)
    convert(ours, back)
    assert_equal(read(back).state, read(WHOLE / file).state)
    if file in CHECKS:
        assert_equal(content_of(back), content(file)["state_dict"])
        metadata, again = (CHECKS[file](path) for path in (ours, back))
        assert again == metadata
    elif file != "mae.ckpt":
        name = file.partition(".")[0]
        found = logits_of(back, name, **options)
        assert torch.equal(found, logits_of(ours, name))


def content_of(path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("file", CHECKS)
@pytest.mark.parametrize("converted", [False, True])
def test_the_backbone_alone(file, converted, tmp_path, capsys, caplog):
    source = WHOLE / file
    if converted:
        source = tmp_path / "whole.safetensors"
        convert(WHOLE / file, source)
    target = tmp_path / "backbone.safetensors"
    assert main(["convert", str(source), str(target), "--backbone"]) == 0
    assert "the backbone of a segmentor or detector" in capsys.readouterr().out
    assert "the backbone's weights alone are taken, not" in caplog.text
    model, metadata = load_model(path=target)
    assert isinstance(model.eval(), FeatureMaps)
    assert "class_names" not in metadata
    if file == "segmentor.pth":
        golden = arrays("segmentor")
        for i, found in enumerate(model(golden["whole/tensor"])):
            close(found, golden[f"whole/map{i}"])


def test_conversion_says_that_it_is_whole(tmp_path, capsys):
    words = ["convert", str(WHOLE / "segmentor.pth"), str(tmp_path / "ours.safetensors")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "a whole segmentor over fastvim_tiny_patch16_224 (--backbone: that alone)" in out


@pytest.mark.parametrize("file", CHECKS)
def test_a_model_that_exists_takes_a_whole_file(file):
    """The whole file into a whole model, and its backbone alone into a backbone."""
    model, metadata = load_model(path=WHOLE / file)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.state_dict().values():
        tensor.zero_()
    load_state(model, read(WHOLE / file))
    assert_equal(model.state_dict(), expected)
    backbone = create_model(metadata["model"], **metadata["model_args"])
    load_backbone(backbone, read(WHOLE / file))
    inner = model.maps if isinstance(model, UPerNet) else model.backbone
    own = backbone.state_dict()
    for name, tensor in inner.backbone.state_dict().items():
        assert torch.equal(own[name], tensor)


@pytest.mark.parametrize("file", CHECKS)
def test_nothing_may_be_missing_or_left_over(file, tmp_path):
    last = list(content(file)["state_dict"])[-1]

    def without(all: dict) -> dict:
        return {n: t for n, t in all["state_dict"].items() if n != last}

    def more(all: dict) -> dict:
        return {**all["state_dict"], "decode_head.more.weight": torch.ones(1)}

    for change, words in ((without, "missing "), (more, r"unexpected decode_head\.more\.weight")):
        path = rewritten(file, tmp_path / "broken.pth", change)
        with pytest.raises(UserError, match=words):
            load_model(path=path)
        with pytest.raises(UserError, match=words):
            convert(path, tmp_path / "ours.safetensors")


def test_the_name_of_a_vim_says_what_a_bare_file_cannot(tmp_path):
    path = rewritten("detector.pth", tmp_path / "bare.pth", lambda all: all["state_dict"])
    _, metadata = resolve(read(path), model="vim_small_patch16_224")
    assert metadata["model_args"]["pooling"] == "none"
    shutil.copy(path, tmp_path / "Vim_small_transferfromgithub_iter_184375.pth")
    _, metadata = load_model(path=tmp_path / "Vim_small_transferfromgithub_iter_184375.pth")
    assert metadata["model_args"]["pooling"] == "none"
    assert metadata["model"] == "vim_small_patch16_224"


def test_sides_that_differ(tmp_path):
    """The configuration tells the shape of a grid that is not square."""
    options = {"embed_dim": 20, "depth": 2, "norm": "layer", "num_classes": 0, "patch_size": 16}
    shape = {"img_size": [32, 96], "scan_path": "column", **options}
    backbone = create_model("fastvim_tiny_patch16_224", **shape)
    model = UPerNet(FeatureMaps(backbone, [0, 1]), 3, channels=8, aux_channels=4).eval()
    head = {"num_classes": 3, "out_indices": [0, 1], "source": "mixer"}
    sizes = {"channels": 8, "aux_channels": 4, "window": [32, 96], "stride": [16, 48]}
    metadata = {
        "model": "fastvim_tiny_patch16_224",
        "model_args": shape,
        "segmentation": {**head, **sizes},
        "class_names": ["a", "b", "c"],
    }
    save(tmp_path / "ours.safetensors", model.state_dict(), metadata)
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.pth")
    again, found = load_model(path=tmp_path / "theirs.pth")
    assert found["segmentation"] == metadata["segmentation"]
    assert_equal(again.state_dict(), model.state_dict())
    image = torch.randn(1, 3, 32, 96)
    assert torch.equal(again.eval()(image), model(image))


def test_one_mask_head_is_published_as_three(tmp_path, caplog):
    """A detector of an earlier version of this library."""
    convert(WHOLE / "detector.pth", tmp_path / "ours.safetensors")
    checkpoint = read(tmp_path / "ours.safetensors")
    old = {
        name.replace("mask_stages.0.head", "mask_head").replace(
            "mask_stages.0.predictor", "mask_predictor"
        ): tensor
        for name, tensor in checkpoint.state.items()
        if not name.startswith(("heads.mask_stages.1.", "heads.mask_stages.2."))
    }
    save(tmp_path / "old.safetensors", old, checkpoint.metadata)
    convert(tmp_path / "old.safetensors", tmp_path / "back.pth")
    assert "one mask head" in caplog.text
    back, published = content_of(tmp_path / "back.pth"), content("detector.pth")["state_dict"]
    assert back.keys() == published.keys()
    first = "roi_head.mask_head.0.conv_logits.weight"
    for stage in range(3):
        assert torch.equal(back[first.replace(".0.", f".{stage}.")], published[first])


def test_maps_that_no_published_model_takes(tmp_path):
    convert(WHOLE / "segmentor.pth", tmp_path / "ours.safetensors")
    checkpoint = read(tmp_path / "ours.safetensors")
    metadata = dict(checkpoint.metadata)
    metadata["segmentation"] = {**metadata["segmentation"], "source": "residual"}
    save(tmp_path / "other.safetensors", checkpoint.state, metadata)
    with pytest.raises(UserError, match="residual stream"):
        convert(tmp_path / "other.safetensors", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize("file", ["segmentor.pth", "finetuned.ckpt"])
def test_the_licence_goes_there_and_back(file, tmp_path):
    names = {"segmentor.pth": "FastVim_tiny_iter_160000.pth"}
    published = tmp_path / names.get(file, "finetune_FastVim_base.ckpt")
    shutil.copy(WHOLE / file, published)
    paths = [tmp_path / name for name in ("a.safetensors", "b.ckpt", "c.safetensors")]
    for source, target in zip([published, *paths[:2]], paths, strict=True):
        assert convert(source, target)["licence"] == "CC-BY-NC-SA-4.0"
