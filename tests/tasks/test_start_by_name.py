"""`model.checkpoint` of the dense tasks by name: a whole model, or the backbone of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coco_sets
import pytest
import segmentation_sets
import torch
from harness import trainer
from small_published import publish, use_folders
from torch import nn

import fastvim
from fastvim.data.detection import DetectionData
from fastvim.data.segmentation import SegmentationData
from fastvim.errors import UserError
from fastvim.models import create_model
from fastvim.tasks import Detection
from fastvim.tasks.dense_task import DenseTask, load_backbone
from fastvim.tasks.segmentation import Segmentation
from fastvim.weights import Checkpoint
from fastvim.weights.table import ENTRIES

MODEL = "fastvim_tiny_patch16_224"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
SEGMENTOR = "upernet_fastvim_tiny_patch16_512.ade20k"
SCENES = {"num_classes": 3, "out_indices": (0, 1), "channels": 12, "aux_channels": 8, "window": 32}
DETECTOR = "cascade_mask_rcnn_fastvim_tiny_patch16_1024.coco"
OBJECTS = {"channels": 16, "pad_to": 64, "proposals": 32}
BOXES = {"hidden_dim": 16, "samples": 16}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_folders(tmp_path, monkeypatch)
    return tmp_path


def started(home: Path, kind: str, checkpoint: str, stage: str = "fit") -> DenseTask:
    """A task of three (segmentation) or two classes, after a step at a rate of 0."""
    options: dict[str, Any] = {"model_args": {**SIZES, "norm": "layer"}, "checkpoint": checkpoint}
    options |= {"lr": 0.0, "warmup_lr": 0.0, "warmup_steps": 0}
    sizes: dict[str, Any] = {"img_size": 32, "batch_size": 2, "num_workers": 0}
    task: DenseTask
    if kind == "segmentation":
        segmentation_sets.write_set(home / stage, training=2, validation=1)
        data: Any = SegmentationData(stage, num_classes=3, base_size=(64, 40), **sizes)
        task = Segmentation(MODEL, **options, **SCENES)
    else:
        coco_sets.write_set(home / stage, train=3, val=1)
        data = DetectionData(stage, **sizes)
        task = Detection(MODEL, **options, **OBJECTS, **BOXES)
    run = trainer(home, limit_train_batches=1, limit_val_batches=0)
    (run.fit if stage == "fit" else run.test)(task, datamodule=data)
    return task


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_a_whole_model(home: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sizes = (SEGMENTOR, SCENES) if kind == "segmentation" else (DETECTOR, OBJECTS)
    head = {**ENTRIES[name].head[kind], **sizes}
    if kind == "detection":
        head |= {"num_classes": 2, "heads": {**head["heads"], **BOXES}}
    publish(monkeypatch, name, SIZES, head={kind: head})
    published, _ = fastvim.load_model(name)
    task = started(home, kind, name)
    assert task.origin == {"started_from": name, "licence": "CC-BY-NC-SA-4.0"}
    assert task.model is not None
    torch.testing.assert_close(parameters(task.model), parameters(published), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_other_classes(home: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """The layers whose size is the number of classes start anew, all others as published."""
    name, sizes = (SEGMENTOR, SCENES) if kind == "segmentation" else (DETECTOR, OBJECTS)
    head = {**ENTRIES[name].head[kind], **sizes, "num_classes": 5}
    if kind == "detection":
        head |= {"heads": {**head["heads"], **BOXES}}
    publish(monkeypatch, name, SIZES, head={kind: head})
    theirs = parameters(fastvim.load_model(name)[0])
    task = started(home, kind, name)
    assert task.model is not None
    ours = parameters(task.model)
    assert ours.keys() == theirs.keys()
    new = {n for n, weight in ours.items() if weight.shape != theirs[n].shape}
    assert len(new) == (4 if kind == "segmentation" else 18)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours.keys() - new)
    assert "is of other classes: " in caplog.text
    # COCO's categories have names; those of the scenes are told by nothing.
    message = "does not fit the model: other shapes" if kind == "segmentation" else "other classes"
    with pytest.raises(UserError, match=message):
        started(home, kind, name, stage="test")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("segmentation", f"{MODEL}.in1k"),
        ("segmentation", DETECTOR),
        ("detection", f"{MODEL}.in1k"),
        ("detection", SEGMENTOR),
    ],
)
def test_the_backbone_of_other_weights(
    home: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a classifier, and of a dense model of the other kind."""
    head = {k: {**v} for k, v in ENTRIES[name].head.items()}
    if "segmentation" in head:
        head["segmentation"] |= SCENES
    if "detection" in head:
        head["detection"] |= {**OBJECTS, "heads": {**head["detection"]["heads"], **BOXES}}
    published = publish(monkeypatch, name, SIZES, head=head)
    task = started(home, kind, name)
    assert task.origin["started_from"] == name
    assert task.model is not None
    theirs = {n.rpartition("backbone.")[2]: w for n, w in published.named_parameters()}
    ours = {n.rpartition("backbone.")[2]: w for n, w in task.model.named_parameters()}
    shared = [n for n in theirs if n.startswith(("blocks.", "patch_embed.", "pos_embed"))]
    assert len(shared) > 20
    for each in shared:
        assert torch.equal(ours[each], theirs[each]), each


def test_a_classifier_is_not_evaluated_as_a_segmentor(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, f"{MODEL}.in1k", SIZES)
    with pytest.raises(UserError, match="holds no segmentation head"):
        started(home, "segmentation", f"{MODEL}.in1k", stage="test")


def test_a_vim_leaves_its_class_token_behind(caplog):
    """As the published detector over the original Vim's classifier started."""
    sizes = {**SIZES, "num_classes": 5}
    classifier = create_model("vim_tiny_patch16_224", **sizes, norm_after_ssm=False)
    options = {"norm": "layer", "class_token": False, "global_pool": "avg"}
    backbone = create_model("vim_tiny_patch16_224", **SIZES, **options)
    new = [name for name in backbone.state_dict() if ".mixer.norm." in name]
    before = {name: backbone.get_parameter(name).detach().clone() for name in new}
    load_backbone(backbone, Checkpoint(Path("vim.pth"), classifier.state_dict(), "raw"))
    assert "vim.pth: the class token is left out" in caplog.text
    assert "vim.pth has no norms after the scan: they are new" in caplog.text
    middle = 4 * 4 // 2
    kept = torch.cat([classifier.pos_embed[:, :middle], classifier.pos_embed[:, middle + 1 :]], 1)
    assert torch.equal(backbone.pos_embed, kept)
    weight = "blocks.1.mixer.in_proj.weight"
    assert torch.equal(backbone.get_parameter(weight), classifier.get_parameter(weight))
    assert all(torch.equal(backbone.get_parameter(name), before[name]) for name in new)
