"""Segmentation: metrics, schedule, initial weights, and that it learns."""

from __future__ import annotations

import json
import math

import lightning as L
import pytest
import torch
from harness import trainer
from PIL import Image
from segmentation_sets import write_set
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from fastvim.data.segmentation import SegmentationData
from fastvim.errors import UserError
from fastvim.models import FastVim, create_model
from fastvim.models.heads.upernet import UPerNet
from fastvim.tasks.callbacks.run_log import describe
from fastvim.tasks.metrics import SegmentationMetrics
from fastvim.tasks.segmentation import Segmentation, _cross_entropy
from fastvim.weights import read, save
from fastvim_cli import main

MODEL = "fastvim_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "norm": "layer"}
SMALL = {"out_indices": (0, 1, 2, 3), "channels": 24, "aux_channels": 12, "window": 32}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("shapes"))


def data(root, **options) -> SegmentationData:
    sizes = {"num_classes": 3, "img_size": 32, "base_size": (64, 40), "ratio": (0.8, 1.25)}
    return SegmentationData(str(root), **{**sizes, "batch_size": 4, "num_workers": 0, **options})


def task(**options) -> Segmentation:
    defaults = {"model_args": ARGS, "stride": 16, "warmup_steps": 0, **SMALL}
    return Segmentation(MODEL, **{**defaults, **options})


# Metrics.


@pytest.mark.parametrize("target", [0, 255])
def test_a_mean_over_one_class_or_none_says_nothing(target):
    metrics = SegmentationMetrics(2)
    metrics.update(torch.zeros(4, 5, dtype=torch.int64), torch.full((4, 5), target))
    scores = metrics.compute()
    assert math.isnan(scores["miou"])
    assert math.isnan(scores["acc"])
    metrics.update(torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    metrics.update(torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    assert 0 < metrics.compute()["miou"] < 1


def test_images_without_a_counted_pixel_have_no_loss(tmp_path):
    """Validation masks that are all ignored: no loss of 0 and no score of 100 %."""
    root = write_set(tmp_path / "set")
    for file in (root / "annotations" / "validation").iterdir():
        Image.new("L", Image.open(file).size, 255).save(file)
    run = trainer(tmp_path, limit_train_batches=1)
    run.fit(task(), datamodule=data(root))
    for name in ("val/loss", "val/miou", "val/acc"):
        assert math.isnan(run.callback_metrics[name])
    assert describe("val/miou", math.nan) == "val miou -"


@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_are_those_of_torchmetrics(classes):
    generator = torch.Generator().manual_seed(classes)
    metrics = SegmentationMetrics(classes)
    same = {
        "iou": MulticlassJaccardIndex(classes, average="none", ignore_index=255),
        "miou": MulticlassJaccardIndex(classes, ignore_index=255),
        "acc": MulticlassAccuracy(classes, average="micro", ignore_index=255),
    }
    for _ in range(3):
        predicted = torch.randint(classes, (2, 9, 7), generator=generator)
        target = torch.where(
            torch.rand(predicted.shape, generator=generator) < 0.4,
            predicted,
            torch.randint(classes, predicted.shape, generator=generator),
        )
        target[torch.rand(target.shape, generator=generator) < 0.1] = 255
        for metric in (metrics, *same.values()):
            metric.update(predicted, target)
    scores = metrics.compute()
    for name, metric in same.items():
        torch.testing.assert_close(scores[name], metric.compute())


def test_absent_classes_do_not_count():
    metrics = SegmentationMetrics(5)
    #  Class 0 is right in two of three, 2 is never right, 1 never predicted, 3 and 4 are absent.
    metrics.update(torch.tensor([0, 0, 2, 0, 4]), torch.tensor([0, 0, 1, 1, 255]))
    scores = metrics.compute()
    expected = [2 / 3, 0, 0, math.nan, math.nan]
    torch.testing.assert_close(scores["iou"], torch.tensor(expected), equal_nan=True)
    assert scores["miou"].item() == pytest.approx(2 / 9)
    assert scores["acc"].item() == pytest.approx(0.5)


def test_loss_is_over_the_pixels_that_count():
    logits, classes = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    classes[0, :2] = 255
    counted = classes != 255
    expected = torch.nn.functional.cross_entropy(logits.movedim(1, -1)[counted], classes[counted])
    share = counted.float().mean()  # an ignored pixel counts as a loss of 0
    torch.testing.assert_close(_cross_entropy(logits, classes), share * expected)
    assert _cross_entropy(logits, torch.full_like(classes, 255)) == 0


# Training.


def test_it_learns(tmp_path, shapes):
    """It segments unseen shapes, in windows and as a whole image."""
    torch.manual_seed(0)
    run = trainer(tmp_path, max_epochs=30, check_val_every_n_epoch=30)
    segmentation, module = task(lr=3e-3, lr_batch=4), data(shapes)
    run.fit(segmentation, datamodule=module)
    assert run.callback_metrics["val/miou"] > 0.8
    assert run.callback_metrics["val/acc"] > 0.9

    exported = tmp_path / "model.safetensors"
    save(exported, segmentation.exported_weights(), segmentation.exported_metadata())
    metadata = read(exported).metadata
    assert metadata["class_names"] == ["0", "1", "2"]
    assert metadata["segmentation"]["num_classes"] == 3
    test = trainer(tmp_path)
    test.test(task(checkpoint=str(exported)), datamodule=module, verbose=False)
    assert test.callback_metrics["test/miou"] == run.callback_metrics["val/miou"]
    whole = task(checkpoint=str(exported), window=None)
    test.test(whole, datamodule=module, verbose=False)
    assert test.callback_metrics["test/miou"] > 0.8


def test_several_scales_and_the_mirror_image(tmp_path, shapes):
    """They change the result of a test, and the probabilities still sum to one."""
    torch.manual_seed(0)
    run = trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=4)
    segmentation, module = task(lr=3e-3, lr_batch=4), data(shapes)
    run.fit(segmentation, datamodule=module)
    exported = tmp_path / "model.safetensors"
    save(exported, segmentation.exported_weights(), segmentation.exported_metadata())
    losses = {}
    for options in ({}, {"flip": True}, {"scales": (0.75, 1.0, 1.5), "flip": True}):
        test = trainer(tmp_path)
        given = task(checkpoint=str(exported), **options)
        test.test(given, datamodule=module, verbose=False)
        losses[len(options)] = test.callback_metrics["test/loss"].item()
    assert losses[0] == pytest.approx(run.callback_metrics["val/loss"].item(), rel=1e-5)
    assert len(set(losses.values())) == 3
    assert 0 < losses[2] < 1.2 * losses[0]


def test_the_report_names_the_classes(write_recipe, shapes, capsys):
    """A table of the IoU of each class, the same in metrics.json, and a picture."""
    (shapes / "names.txt").write_text("noise\nsquare\ndisc\nunicorn\n")
    module = {"root": str(shapes), "num_classes": 4, "class_file": "names.txt", "img_size": 32}
    loading = {"base_size": [64, 40], "antialias": False, "batch_size": 4, "num_workers": 0}
    recipe = {
        "model": {
            "class_path": "fastvim.tasks.segmentation.Segmentation",
            "init_args": {"model": MODEL, "model_args": ARGS, **SMALL, "warmup_steps": 0},
        },
        "data": {
            "class_path": "fastvim.data.segmentation.SegmentationData",
            "init_args": {**module, **loading},
        },
        "trainer.max_epochs": 1,
    }
    recipe["model"]["init_args"] |= {"out_indices": [0, 1, 2, 3], "stride": 16, "lr": 0.0}
    config = write_recipe(recipe, name="report")
    assert main(["fit", "--config", str(config)]) == 0
    assert "unicorn" not in capsys.readouterr().out
    words = ["test", "--config", str(config), "--ckpt_path", "last"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    folder = config.with_suffix("")
    metrics = json.loads((folder / "metrics.json").read_text())
    iou = metrics["classes"]["iou"]
    assert list(iou) == ["noise", "square", "disc", "unicorn"]
    occurring = [value for value in iou.values() if value is not None]
    assert metrics["test/miou"] == pytest.approx(sum(occurring) / len(occurring))
    for name, value in iou.items():
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.split()[1] == ("-" if value is None else f"{value:.2%}")
    # Its weights are all that another image needs.
    assert read(folder / "model.safetensors").metadata["antialias"] is False
    photo = shapes / "images" / "validation" / "0.png"
    words = ["segment", str(folder / "model.safetensors"), str(photo), "--out", str(folder)]
    assert main(words) == 0
    assert (folder / "0_overlay.png").is_file()
    # Images, labels, predictions, mistakes, enlarged.
    with Image.open(folder / "predictions.png") as picture:
        assert picture.width > 4 * 48 * 9
        assert picture.height > 4 * 40 * 9


class Rates(L.Callback):
    """The rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_rate_rises_and_falls_by_steps(tmp_path, shapes):
    rates = Rates()
    run = trainer(tmp_path, rates, max_epochs=-1, max_steps=8, limit_val_batches=0)
    run.fit(task(lr=0.01, lr_batch=4, warmup_lr=0.002, warmup_steps=4), datamodule=data(shapes))
    expected = [0.002, 0.014 / 3, 0.022 / 3, 0.01, 0.01, 0.02 / 3, 0.01 / 3, 0.0]
    assert rates.rates == pytest.approx(expected, abs=1e-12)


# Weights to start from.


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_it_starts_from_a_classifier(tmp_path, shapes, norm, caplog):
    options = {**ARGS, "norm": norm, "num_classes": 7, "img_size": 24}
    classifier = create_model(MODEL, **options)
    assert isinstance(classifier, FastVim)
    file = tmp_path / "classifier.safetensors"
    save(file, classifier.state_dict(), {"model": MODEL, "model_args": options})
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    segmentation = task(checkpoint=str(file), lr=0.0)
    run.fit(segmentation, datamodule=data(shapes))
    assert isinstance(segmentation.model, UPerNet)
    own = segmentation.model.maps.backbone.state_dict()
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
    pretrained = create_model(f"mae_{MODEL}", **sizes, **decoder)
    file = tmp_path / "mae.safetensors"
    save(file, pretrained.state_dict(), {"model": f"mae_{MODEL}", "model_args": sizes})
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    segmentation = task(checkpoint=str(file), lr=0.0)
    run.fit(segmentation, datamodule=data(shapes))
    assert isinstance(segmentation.model, UPerNet)
    own = segmentation.model.maps.backbone.state_dict()
    encoder = pretrained.state_dict()
    for name in ("blocks.3.mixer.in_proj.weight", "pos_embed", "patch_embed.proj.bias"):
        assert torch.equal(own[name], encoder[f"encoder.{name}"]), name


def test_evaluation_needs_a_whole_model(tmp_path, shapes):
    file = tmp_path / "classifier.safetensors"
    save(file, create_model(MODEL, **ARGS).state_dict(), {})
    with pytest.raises(UserError, match="no segmentation head"):
        trainer(tmp_path).test(task(checkpoint=str(file)), datamodule=data(shapes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (0, 4)}, r"out_indices \[0, 4\]: expected two or more of the 4 blocks"),
        ({"out_indices": (1,)}, "expected two or more"),
        ({"model": "resnet10t", "model_args": {}}, "model resnet10t: expected a fastvim"),
        ({"scales": (1.0, 0.0)}, r"scales \[1.0, 0.0\]: expected more than 0"),
        ({"scales": ()}, r"scales \[\]: expected"),
        ({"checkpoint": "nowhere.ckpt"}, "no checkpoint at nowhere.ckpt"),
        ({"data": {"batch_size": 1}}, "batch_size 1: expected 2 or more"),
    ],
)
def test_mistakes_are_named(tmp_path, shapes, options, message):
    options = {
        "model": MODEL,
        "model_args": ARGS,
        "warmup_steps": 0,
        "data": {},
        **SMALL,
        **options,
    }
    module = data(shapes, **options.pop("data"))
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(Segmentation(**options), datamodule=module)
