"""What a configuration or the caller says of a whole model's head."""

from __future__ import annotations

import pytest
from whole_files import WHOLE, rewritten

from fastvim.errors import UserError
from fastvim.weights import convert, load_model


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("segmentor.pth", "align_corners=False", "align_corners=True", "align_corners=True"),
        ("segmentor.pth", "bgr_to_rgb=True", "bgr_to_rgb=False", "bgr_to_rgb=False"),
        ("detector.pth", "0.067", "0.1", "bbox_head.2.bbox_coder.target_stds=[0.033, 0.033, 0.1"),
        ("detector.pth", "min_bbox_size=0", "min_bbox_size=4", "min_bbox_size=4"),
        ("detector.pth", "sampling_ratio=0", "sampling_ratio=2", "roi_layer.sampling_ratio=2"),
        ("detector.pth", "type='nms'", "type='soft_nms'", "nms.type='soft_nms'"),
        (
            "segmentor.pth",
            "            2,\n            3,\n        ]",
            "            3,\n            2,\n        ]",
            "decode_head.in_index=[0, 1, 3, 2]",
        ),
    ],
)
def test_a_configuration_that_is_not_computed_is_refused(file, old, new, named, tmp_path):
    def other(all: dict) -> dict:
        assert old in all["meta"]["cfg"]
        return {**all, "meta": {**all["meta"], "cfg": all["meta"]["cfg"].replace(old, new)}}

    path = rewritten(file, tmp_path / "other.pth", other)
    with pytest.raises(UserError) as caught:
        load_model(path=path)
    assert named in str(caught.value)
    convert(path, tmp_path / "backbone.safetensors", backbone=True)


@pytest.mark.parametrize("converted", [False, True])
def test_the_caller_says_what_a_head_takes(converted, tmp_path):
    paths = {"segmentation": WHOLE / "segmentor.pth", "detection": WHOLE / "detector.pth"}
    if converted:
        for kind, path in paths.items():
            paths[kind] = tmp_path / f"{kind}.safetensors"
            convert(path, paths[kind])
    options = {"window": 32, "stride": 16, "out_indices": [0, 2, 4, 6], "base_size": [90, 40]}
    model, metadata = load_model(path=paths["segmentation"], **options)
    assert metadata["base_size"] == options.pop("base_size")
    assert options.items() <= metadata["segmentation"].items()
    assert list(model.maps.out_indices) == [0, 2, 4, 6]
    _, metadata = load_model(path=paths["detection"], pad_to=64, eval_size=96, proposals=7)
    assert {"pad_to": 64, "proposals": 7}.items() <= metadata["detection"].items()
    assert metadata["eval_size"] == 96
    for kind, blocks in (("segmentation", [1]), ("segmentation", [0, 1, 2, 8]), ("detection", [0])):
        with pytest.raises(UserError, match="out_indices"):
            load_model(path=paths[kind], out_indices=blocks)


@pytest.mark.parametrize("converted", [False, True])
def test_candidates_of_each_level_are_the_configurations(converted, tmp_path):
    """They are not the proposals of an image, where its configuration sets two numbers."""

    def fewer(all: dict) -> dict:
        text = all["meta"]["cfg"].replace("max_per_img=1000", "max_per_img=20")
        return {**all, "meta": {**all["meta"], "cfg": text}}

    path = rewritten("detector.pth", tmp_path / "detector.pth", fewer)
    if converted:
        for name in ("ours.safetensors", "back.pth"):
            convert(path, tmp_path / name)
            path = tmp_path / name
    model, _ = load_model(path=path)
    assert model.rpn.eval().pre_nms_top_n() == 1000
    assert model.rpn.post_nms_top_n() == 20
    model, _ = load_model(path=path, proposals=7)
    assert model.rpn.eval().pre_nms_top_n() == 7
