"""Validations whose results are not finite: counted, never right, and the run goes on."""

from __future__ import annotations

import math

import pytest
import torch
from coco_sets import write_set
from harness import trainer
from segmentation_sets import write_set as write_segments

from fastvim.data.detection import DetectionData
from fastvim.data.segmentation import SegmentationData
from fastvim.errors import NotFiniteError
from fastvim.tasks import Classification, Detection
from fastvim.tasks.segmentation import Segmentation

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_classifier_that_overflows_is_never_right(tmp_path, data, caplog, monkeypatch, value):
    task = Classification("fastvim_tiny_patch16_224", ARGS, ema_decay=None)
    run = trainer(tmp_path, limit_train_batches=1)
    forward = Classification.forward

    def overflow(self, images):
        logits = forward(self, images)
        return logits if self.training else torch.full_like(logits, value)

    monkeypatch.setattr(Classification, "forward", overflow)
    run.fit(task, datamodule=data)
    assert run.callback_metrics["val/acc1"] == 0  # NaN is the largest value of any
    assert run.callback_metrics["val/acc5"] == 0
    assert math.isnan(run.callback_metrics["val/loss"])
    assert "images whose results are not finite, none right: 36" in caplog.text


def test_a_segmentor_that_overflows_is_never_right(tmp_path, caplog, monkeypatch):
    heads = {"channels": 24, "aux_channels": 12, "window": 32, "stride": 16}
    options = {**heads, "out_indices": (0, 1, 2, 3), "warmup_steps": 0}
    args = {**ARGS, "depth": 4, "norm": "layer"}
    task = Segmentation("fastvim_tiny_patch16_224", args, **options)
    root = write_segments(tmp_path / "scenes")
    sizes = {"num_classes": 3, "img_size": 32, "base_size": (64, 40)}
    data = SegmentationData(str(root), **sizes, batch_size=2, num_workers=0)
    forward = Segmentation.forward
    monkeypatch.setattr(Segmentation, "forward", lambda *given: forward(*given) * math.nan)
    run = trainer(tmp_path, limit_train_batches=1)
    run.fit(task, datamodule=data)
    assert run.callback_metrics["val/miou"] == 0
    assert run.callback_metrics["val/acc"] == 0
    assert "images whose results are not finite, none right: " in caplog.text


def test_a_detector_that_overflows_goes_on(tmp_path, caplog, monkeypatch):
    heads = {"channels": 16, "pad_to": 64, "proposals": 32, "hidden_dim": 16, "samples": 16}
    args = {**ARGS, "img_size": 64, "norm": "layer"}
    task = Detection("fastvim_tiny_patch16_224", args, **heads, warmup_steps=0)
    root = write_set(tmp_path / "coco")
    data = DetectionData(str(root), img_size=64, batch_size=2, num_workers=0)
    run = trainer(tmp_path, limit_train_batches=1)
    detect, calls = None, []

    def overflow(images):
        calls.append(len(images))
        if len(calls) == 1:
            raise NotFiniteError("the model's result is not finite")
        return detect(images)

    configure = Detection.configure_model

    def configured(self):
        nonlocal detect
        configure(self)
        if detect is None:
            detect = self.model.detect
            monkeypatch.setattr(self.model, "detect", overflow)

    monkeypatch.setattr(Detection, "configure_model", configured)
    run.fit(task, datamodule=data)
    assert len(calls) > 1
    assert "images whose results are not finite, none right: 1" in caplog.text
    calls.clear()
    with pytest.raises(NotFiniteError):
        run.validate(task, datamodule=data)
