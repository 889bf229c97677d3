"""Names of the published data sets' classes, against those that other libraries keep."""

from __future__ import annotations

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from fastvim.labels import ADE20K_CLASSES, COCO_CATEGORIES


def test_categories_of_coco_are_torchvisions():
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # at the place of their id
    named = {i: name for i, name in enumerate(names) if name not in ("__background__", "N/A")}
    assert named == COCO_CATEGORIES
    assert len(COCO_CATEGORIES) == 80
    assert list(COCO_CATEGORIES) == sorted(COCO_CATEGORIES)


def test_classes_of_ade20k():
    assert len(ADE20K_CLASSES) == len(set(ADE20K_CLASSES)) == 150
    assert (ADE20K_CLASSES[0], ADE20K_CLASSES[149]) == ("wall", "flag")
    places = {"person": 12, "chest of drawers": 44, "chandelier": 85, "crt screen": 141}
    assert {name: ADE20K_CLASSES.index(name) for name in places} == places
