"""Detection: schedule, learning rates of the layers, initial weights, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from coco_sets import write_set, write_split
from harness import trainer

from fastvim.data.detection import DetectionData
from fastvim.errors import UserError
from fastvim.models import CascadeMaskRCNN, create_model
from fastvim.tasks import Detection
from fastvim.tasks.schedules import Schedule, drops_by_steps
from fastvim.weights import load_model, save

MODEL = "fastvim_tiny_patch16_224"
ARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 3, "norm": "layer"}
SMALL = {"channels": 16, "pad_to": 64, "proposals": 32, "hidden_dim": 16, "samples": 16}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("shapes"))


def data(root: Path, **options) -> DetectionData:
    defaults = {"img_size": 64, "scale": (0.8, 1.25), "batch_size": 3, "num_workers": 0}
    return DetectionData(str(root), **{**defaults, **options})


def task(**options) -> Detection:
    return Detection(MODEL, **{"model_args": ARGS, "warmup_steps": 0, **SMALL, **options})


def fitted(tmp_path: Path, root: Path, **options) -> Detection:
    """After one step at a rate of 0."""
    detection = task(lr=0.0, warmup_lr=0.0, **options)
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(detection, datamodule=data(root))
    return detection


# Training.


@pytest.mark.slow
def test_it_reproduces_eight_images(tmp_path):
    """The exported file is as good. About 15 s on two free cores."""
    content = write_split(tmp_path, "train2017", 9, seed=1)  # the ninth has no objects
    assert len(content["annotations"]) == 16
    same = {"val_folder": "train2017", "val_file": "annotations/instances_train2017.json"}
    module = data(tmp_path, **same)
    torch.manual_seed(0)
    sizes = {"channels": 32, "proposals": 32, "hidden_dim": 64, "samples": 24}
    options = {"model_args": {**ARGS, "embed_dim": 64, "depth": 2}, "layer_decay": None, **sizes}
    steps = {"warmup_steps": 20, "warmup_lr": 1e-5, "drops": (0.7, 0.9)}
    detection = task(lr=3e-3, lr_batch=3, **steps, **options)
    run = trainer(tmp_path, max_epochs=60, check_val_every_n_epoch=60, gradient_clip_val=5.0)
    run.fit(detection, datamodule=module)
    scores = run.callback_metrics
    assert scores["val/box_ap50"] > 0.9
    assert scores["val/mask_ap50"] > 0.9
    assert scores["val/box_ap"] > 0.6
    assert scores["val/mask_ap"] > 0.6

    exported = tmp_path / "model.safetensors"
    save(exported, detection.exported_weights(), detection.exported_metadata())
    test = trainer(tmp_path)
    again = task(checkpoint=str(exported), **options)
    test.test(again, datamodule=module, verbose=False)
    for name in ("box_ap", "mask_ap75"):
        assert test.callback_metrics[f"test/{name}"] == scores[f"val/{name}"]
    of_classes = again.class_scores()
    assert list(of_classes["box_ap"]) == ["box", "disc"]
    mean = sum(of_classes["mask_ap"].values()) / 2
    assert mean == pytest.approx(float(scores["val/mask_ap"]))

    model, metadata = load_model(path=exported)
    assert isinstance(model, CascadeMaskRCNN)
    assert (metadata["class_names"], metadata["category_ids"]) == (["box", "disc"], [3, 7])
    assert metadata["detection"]["num_classes"] == 2
    assert metadata["detection"]["heads"]["hidden_dim"] == 64
    module.setup("validate")
    images, _ = next(iter(module.val_dataloader()))
    with torch.inference_mode():
        (one,), (other,) = model.eval()(images), detection.eval()(images)
    assert len(one["boxes"]) >= 2
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_images_without_objects_train(tmp_path):
    write_set(tmp_path, train=1, val=1)
    run = trainer(tmp_path, max_epochs=2)
    detection = task()
    run.fit(detection, datamodule=data(tmp_path, batch_size=1, train_all=True))
    assert run.global_step == 2
    assert all(weight.isfinite().all() for weight in detection.parameters())
    assert math.isnan(run.callback_metrics["val/box_ap"])


class Rates(L.Callback):
    """The rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append(max(group["lr"] for group in optimizer.param_groups))


def test_the_rate_rises_and_drops_by_steps(tmp_path, shapes):
    rates = Rates()
    run = trainer(tmp_path, rates, max_epochs=-1, max_steps=9, limit_val_batches=0)
    schedule = {"warmup_lr": 0.004, "warmup_steps": 3, "drops": (5 / 9, 7 / 9)}
    run.fit(task(lr=0.01, lr_batch=3, **schedule), datamodule=data(shapes))
    assert rates.rates == pytest.approx([0.004, 0.007, *[0.01] * 3, *[1e-3] * 2, *[1e-4] * 2])


@pytest.mark.parametrize("per_decay", [1, 2])
def test_each_block_learns_at_its_own_rate(tmp_path, shapes, per_decay):
    """In the optimiser of a whole model, during the whole schedule."""
    detection = task(layer_decay=0.5, blocks_per_decay=per_decay, lr_scales={})
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(detection, datamodule=data(shapes))
    optimizer = run.optimizers[0]
    names = {id(p): name for name, p in detection.model.named_parameters()}
    curve = drops_by_steps(detection.peak_lr, 90, 11, 0.0, (8 / 9,))
    scheduler = Schedule(optimizer, curve)
    for step, rate in ((5, 0.5), (10, 1.0), (79, 1.0), (80, 0.1)):
        scheduler.step_update(step)
        seen = {
            names[id(p)]: group["lr"] / (rate * detection.peak_lr)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert seen.keys() == set(names.values())
        for name, factor in seen.items():
            layers_above = 0
            if name.startswith("backbone.backbone.blocks."):
                layers_above = 3 - int(name.split(".")[3])
            elif name.startswith(("backbone.backbone.patch_embed", "backbone.backbone.pos_embed")):
                layers_above = 4
            assert factor == pytest.approx(0.5 ** math.ceil(layers_above / per_decay)), name
    heads = [name for name, factor in seen.items() if factor == pytest.approx(1.0)]
    parts = {name.split(".")[0] for name in heads}
    assert parts == {
        "backbone",
        "pyramid",
        "rpn",
        "heads",
    }  # the maps have a norm
    assert [n for n in heads if n.startswith("backbone.")] == [
        "backbone.norms.0.weight",
        "backbone.norms.0.bias",
    ]


# Weights to start from.


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_it_starts_from_a_classifier(tmp_path, shapes, norm, caplog):
    options = {**ARGS, "norm": norm, "num_classes": 7, "img_size": 24}
    classifier = create_model(MODEL, **options)
    file = tmp_path / "classifier.safetensors"
    save(file, classifier.state_dict(), {"model": MODEL, "model_args": options})
    own = fitted(tmp_path, shapes, checkpoint=str(file)).model.backbone.backbone.state_dict()
    assert own["pos_embed"].shape[1] == 64
    for name, weight in classifier.state_dict().items():
        if name.startswith(("norm.", "head.")):
            assert name not in own
        elif name != "pos_embed":
            assert torch.equal(own[name], weight), name
    assert ("RMS norms" in caplog.text) == (norm == "rms")


def test_it_starts_from_a_masked_autoencoder(tmp_path, shapes):
    sizes = {key: ARGS[key] for key in ("img_size", "patch_size", "embed_dim", "depth")}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1}
    encoder = create_model(f"mae_{MODEL}", **sizes, **decoder).state_dict()
    file = tmp_path / "mae.safetensors"
    save(file, encoder, {"model": f"mae_{MODEL}", "model_args": sizes})
    own = fitted(tmp_path, shapes, checkpoint=str(file)).model.backbone.backbone.state_dict()
    for name in ("blocks.2.mixer.in_proj.weight", "pos_embed", "patch_embed.proj.bias"):
        assert torch.equal(own[name], encoder[f"encoder.{name}"]), name


def test_evaluation_needs_a_whole_model(tmp_path, shapes):
    file = tmp_path / "classifier.safetensors"
    save(file, create_model(MODEL, **ARGS).state_dict(), {})
    with pytest.raises(UserError, match="no detection head"):
        trainer(tmp_path).test(task(checkpoint=str(file)), datamodule=data(shapes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet10t", "model_args": {}}, "model resnet10t: expected a fastvim"),
        ({"checkpoint": "nowhere.ckpt"}, "no checkpoint at nowhere.ckpt"),
        ({"drops": (0.9, 0.5)}, r"drops \[0.9, 0.5\]"),
        ({"drops": (100.0,)}, r"drops \[100.0\]: expected more than 0 and less than 1"),
        ({"num_classes": 1}, "num_classes 1: expected 2; data.categories"),
        ({"num_classes": 3}, "num_classes 3: expected 2; data.categories"),
        ({"model_args": {**ARGS, "patch_size": 14}}, "stride=14"),
    ],
)
def test_mistakes_are_named(tmp_path, shapes, options, message):
    options = {"model": MODEL, "model_args": ARGS, "warmup_steps": 0, **SMALL, **options}
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(Detection(**options), datamodule=data(shapes))
