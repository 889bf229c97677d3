"""Published segmentors and detectors: their backbone is loaded, strictly."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvim.errors import UserError
from fastvim.models import FeatureMaps, create_model
from fastvim.tasks.dense_task import load_backbone
from fastvim.weights import convert, from_published, load_model, read
from fastvim_cli import main

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("fastvim_dense", "vim_dense")
# What lies beside the backbone in files of a segmentor and a detector that are not ours.
SEGMENTOR = ("decode_head.conv_seg.weight", "decode_head.convs.0.conv.weight")
DETECTOR = ("neck.simfp.0.weight", "rpn_head.rpn_cls.bias", "roi_head.bbox_head.fc_cls.weight")


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The configuration and arrays of a case."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    config = json.loads(str(arrays.pop("cfg")))
    return config, {key: torch.from_numpy(value) for key, value in arrays.items()}


def square(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published names and weights, with a square grid of positions, as real files have it."""
    state = {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
    position = torch.randn(1, 16, state["pos_embed"].shape[2])
    return {**state, "pos_embed": position}


def whole(state: dict[str, torch.Tensor], beside: tuple[str, ...], **more) -> dict:
    """A file as mmengine saves it: the backbone's weights within a model's, and other things."""
    inside = {f"backbone.{name}": tensor for name, tensor in state.items()}
    heads = {name: torch.randn(3, 2) for name in beside}
    return {"meta": {"epoch": 1, "classes": ("a", "b")}, "state_dict": {**inside, **heads}, **more}


def maps_of(config: dict, state: dict[str, torch.Tensor]) -> FeatureMaps:
    """The model of a case for images of 32 pixels, with its weights loaded by hand."""
    vim = config["model"] == "vim"
    sizes = {name: config[name] for name in ("embed_dim", "depth", "norm", "patch_size")}
    name = "vim_tiny_patch16_224" if vim else "fastvim_tiny_patch16_224"
    untold = {"class_token": False, "global_pool": "avg"} if vim else {}
    backbone = create_model(name, img_size=32, num_classes=0, **sizes, **untold)
    model = FeatureMaps(backbone, config["out_indices"])
    weights = from_published(state)
    model.load_state_dict(
        {n if n.startswith("norms.") else f"backbone.{n}": t for n, t in weights.items()}
    )
    return model.eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beside", [(), SEGMENTOR, DETECTOR], ids=["alone", "semantic", "boxes"])
def test_a_whole_models_file(case, beside, tmp_path, caplog):
    config, arrays = golden(case)
    state = square(arrays)
    file = tmp_path / "epoch_1.pth"
    torch.save(whole(state, beside), file)
    pooling = {"pooling": "none"} if config["model"] == "vim" else {}
    found = convert(file, tmp_path / "ours.safetensors", model_args=pooling)
    assert found["features"] == {"out_indices": config["out_indices"], "source": "mixer"}
    for name in {part.partition(".")[0] for part in beside}:
        assert name in caplog.text
    assert ("backbone's weights alone are taken" in caplog.text) == bool(beside)

    expected = maps_of(config, state)
    image = torch.randn(1, 3, 40, 24)
    for path in (tmp_path / "ours.safetensors", file):
        model, metadata = load_model(path=path, **pooling)
        assert isinstance(model, FeatureMaps)
        assert metadata["model_args"]["img_size"] == 32
        with torch.no_grad():
            for one, other in zip(model.eval()(image), expected(image), strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", CASES)
def test_back_to_published_names(case, tmp_path):
    state = square(golden(case)[1])
    torch.save(whole(state, SEGMENTOR), tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "back.ckpt")
    back = read(tmp_path / "back.ckpt").state
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_nothing_may_be_missing_or_left_over(tmp_path):
    state = square(golden("fastvim_dense")[1])
    broken = {
        "missing": {n: t for n, t in state.items() if n != "layers.2.mixer.in_proj.weight"},
        "unexpected": {**state, "layers.1.mixer.other": torch.ones(1)},
        "norms.1.bias": {n: t for n, t in state.items() if n != "outnorm_1.bias"},
    }
    for words, weights in broken.items():
        torch.save(whole(weights, SEGMENTOR), tmp_path / "broken.pth")
        with pytest.raises(UserError, match=words):
            load_model(path=tmp_path / "broken.pth")


def test_other_maps(tmp_path):
    state = square(golden("fastvim_dense")[1])
    torch.save(whole(state, ()), tmp_path / "theirs.pth")
    words = [str(tmp_path / "theirs.pth"), str(tmp_path / "ours.safetensors")]
    assert main(["convert", *words, "--out-indices", "1", "2", "3"]) == 0
    model, _ = load_model(path=words[1])
    assert list(model.out_indices) == [1, 2, 3]
    with pytest.raises(UserError, match=r"out_indices \[1, 3\]: the weights are for 3 maps"):
        convert(*words, model_args={"out_indices": [1, 3]})


@pytest.mark.parametrize("case", CASES)
def test_a_task_starts_from_it(case, tmp_path):
    """Before and after conversion: all of the backbone, none of the rest."""
    config, arrays = golden(case)
    state = square(arrays)
    torch.save(whole(state, SEGMENTOR), tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors")
    expected = maps_of(config, state).backbone.state_dict()
    for name in ("theirs.pth", "ours.safetensors"):
        backbone = create_model(
            "fastvim_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=20,
            depth=4,
            norm="layer",
        )
        load_backbone(backbone, read(tmp_path / name))
        own = backbone.state_dict()
        assert all(torch.equal(own[key], tensor) for key, tensor in expected.items())


def test_records_of_losses_are_left_aside(tmp_path, monkeypatch):
    """A file saved during training holds mmengine's objects: read without importing mmengine."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.array([0.5, 0.25])
            self._count_history = np.array([1, 2])
            self._max_length = 1000

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging", module.__name__):
            patch.setitem(sys.modules, name, module)
        hub = {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"iter": 2}}
        content = whole(square(golden("fastvim_dense")[1]), SEGMENTOR, message_hub=hub)
        torch.save(content, tmp_path / "iter_2.pth")
    assert "mmengine" not in sys.modules
    model, _ = load_model(path=tmp_path / "iter_2.pth")
    assert isinstance(model, FeatureMaps)
