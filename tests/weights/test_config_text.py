"""The configuration in a published file: read as syntax, never run."""

from __future__ import annotations

import pytest

from fastvim.weights.config_text import compose, family_of, parse, tell


def test_plain_values():
    text = """
side = 64
crop_size = (side, side)
nothing = None
model = dict(a=-1.5, b=[1, 2], c={'d': 'e', 1: 2}, f=dict(g=crop_size), **dict(h=True))
"""
    assert parse(text) == {
        "side": 64,
        "crop_size": (64, 64),
        "nothing": None,
        "model": {"a": -1.5, "b": [1, 2], "c": {"d": "e"}, "f": {"g": (64, 64)}, "h": True},
    }


def test_what_is_no_plain_value_is_left_out(tmp_path):
    target = tmp_path / "owned"
    text = f"""
import os
os.system('touch {target}')
open({str(target)!r}, 'w')
_base_ = ['x.py']
model = dict(a=open({str(target)!r}, 'w'), b=1, c=[__import__('os')], d=2 ** 10 ** 10, e='a' 'b')
other = dict.fromkeys('ab')
x.y = 1
first, second = 1, 2
for i in range(3):
    later = i
dict = 5
"""
    assert parse(text) == {"_base_": ["x.py"], "model": {"b": 1, "e": "ab"}, "dict": 5}
    assert not target.exists()


@pytest.mark.parametrize("text", ["model = (", "\x00", "(" * 10_000, "x = " + "-" * 100_000 + "1"])
def test_text_that_is_no_configuration(text):
    assert parse(text) == {}
    assert tell({"meta": {"cfg": text}}) == tell({"meta": {}}) == tell({}) == {}


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("MM_FastVim", "fastvim"),
        ("MM_Vim", "vim"),
        ("MM_ViM", "vim"),
        ("mmseg.mm_fast_vim", "fastvim"),
        ("ResNet", None),
        (None, None),
    ],
)
def test_families(kind, family):
    assert family_of(kind) == family


def test_values_of_other_kinds_tell_nothing():
    """A hostile or strange file may hold anything where a number is expected."""
    told = tell(
        {
            "meta": {
                "cfg": "model = dict(backbone=dict(type=3, img_size='x', out_indices=[1, 'a']), "
                "decode_head=[], test_cfg=dict(mode='slide', crop_size=True, stride=None), "
                "data_preprocessor=dict(mean=[1, 'a', 2]))\ntest_pipeline = 3",
                "dataset_meta": {"classes": [1, 2], "reduce_zero_label": "yes"},
            }
        }
    )
    assert told == {"head": "segmentation", "padded": 0}


def test_older_files_name_it_otherwise():
    meta = {"config": "model = dict(backbone=dict(type='MM_Vim'))", "CLASSES": ("a", "b")}
    told = tell({"meta": meta})
    assert told["family"] == "vim"
    assert told["class_names"] == ["a", "b"]


def test_the_tests_pipeline_comes_before_the_trainings():
    resize = "[dict(type='Resize', scale=({0}, {0}), keep_ratio=True)]"
    train = f"train_dataloader = dict(dataset=dict(pipeline={resize.format(7)}))\n"
    for test in (
        f"test_pipeline = {resize.format(9)}",
        f"p = {resize.format(9)}\ntest_dataloader = dict(dataset=dict(pipeline=p))",
    ):
        assert tell({"meta": {"cfg": train + test}})["scale"] == [9, 9]
    assert tell({"meta": {"cfg": train}})["scale"] == [7, 7]


SEGMENTATION = {
    "num_classes": 3,
    "out_indices": [0, 2],
    "source": "mixer",
    "channels": 8,
    "aux_channels": 4,
    "window": [48, 64],
    "stride": 32,
}


@pytest.mark.parametrize("options", [{"scan_path": "column"}, {"pool_scale": 0.5}, {}])
@pytest.mark.parametrize("name", ["fastvim_tiny_patch16_224", "vim_tiny_patch16_224"])
def test_what_is_composed_is_told_again(name, options):
    metadata = {
        "model": name,
        "model_args": {"img_size": 64, **options},
        "segmentation": SEGMENTATION,
        "class_names": ["a", "b", "c"],
        "reduce_zero_label": False,
        "base_size": [256, 64],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.5, 0.25],
    }
    told = tell({"meta": compose(metadata)})
    assert told["family"] == name.partition("_")[0]
    assert told["window"] == [48, 64]
    for key in ("class_names", "reduce_zero_label"):
        assert told[key] == metadata[key]
    assert (told["stride"], told["img_size"], told["scale"]) == (32, 64, [256, 64])
    assert told["mean"] == pytest.approx(metadata["mean"])
    assert told["model_args"]["scan_path"] == options.get("scan_path", "row")
    if name.startswith("fast"):
        assert told["model_args"]["pool_scale"] == options.get("pool_scale", 1.0)
