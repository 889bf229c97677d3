"""Every option out of its range: one line with its name as it is written, value and expectation."""

from __future__ import annotations

import inspect
import math
import re
from typing import Union

import lightning as L
import pytest
import yaml
from jsonargparse import ArgumentParser

from fastvim.data.channels import ChannelData
from fastvim.data.detection import DetectionData
from fastvim.data.images import ImageData
from fastvim.data.jumpcp import CellData
from fastvim.data.segmentation import SegmentationData
from fastvim.errors import OptionError
from fastvim.tasks import Classification, Detection, LinearProbe, Pretraining, Segmentation
from fastvim_cli import main
from fastvim_cli.train.trainer_options import read_integers_first

NAN, INF = math.nan, math.inf
COUNT = (0, -1, None, 2.5, "two", 10**21)
COUNT_OR_NONE = (0, -1, 2.5, "two", -(10**400))
COUNT_OR_0 = (-1, None, 2.5)
SEED = (-1, 2**70, None, 1.5)
NOT_NEGATIVE = (-1.0, NAN, INF, None, "much")
SHARE = (-0.1, 5.0, NAN, None)
SHARE_BELOW_1 = (-0.1, 1.0, 1.5, NAN)
PAIR = ([1.0, 0.5], [0.0, 0.5], [0.5, NAN], [0.5], None)
MEAN = ([0.5, 0.5], [NAN], [], None)
STD = (*MEAN, [0.0], [1.0, -1.0, 1.0], [INF])

LOADING = {
    "batch_size": COUNT,
    "eval_batch_size": COUNT_OR_NONE,
    "num_workers": (*COUNT_OR_0, 10**6),
    "seed": SEED,
    "value_range": ([1.0, 0.0], [5.0, 5.0], [0.0, NAN], [1.0]),
    "max_pixels": COUNT_OR_NONE,
    "timeout": NOT_NEGATIVE,
}
CHANNELS = {
    **LOADING,
    "in_chans": (0, -1, 2.5, "two", 10**9),
    "mean": MEAN[:-1],
    "std": ([0.5, 0.5], [NAN], [0.0], [INF]),
    "split_seed": SEED,
    "img_size": (*COUNT, 10**7, [16, 0], [16, 16, 16]),
    "on_error": ("ignore", None),
    "attempts": COUNT,
    "wait": NOT_NEGATIVE,
}
SCHEDULE = {
    "lr": NOT_NEGATIVE,
    "lr_batch": COUNT,
    "min_lr": NOT_NEGATIVE,
    "warmup_lr": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
}
EPOCHS = {**SCHEDULE, "warmup_epochs": NOT_NEGATIVE}
DENSE = {
    **SCHEDULE,
    "num_classes": COUNT_OR_NONE,
    "warmup_steps": COUNT_OR_0,
    "lr_scales": ({"*": -1.0}, {"*": NAN}, [1.0]),
    "betas": ([1.0, 0.9], [0.9, NAN], [0.9], None),
    "channels": COUNT,
    "source": ("middle", None),
}
LAYERS = {"layer_decay": (0.0, 1.5, NAN), "blocks_per_decay": COUNT}

# Wrong values of each option with a range, by the class that takes it.
WRONG: dict[type, dict[str, tuple]] = {
    ImageData: {
        **LOADING,
        "train_images": COUNT_OR_NONE,
        "num_classes": COUNT_OR_NONE,
        "img_size": (*COUNT, 10**7, [32, 0], [32, 32, 32]),
        "in_chans": (0, 2, 4, None),
        "mean": MEAN,
        "std": STD,
        "interpolation": ("cubic", None),
        "crop_pct": (0.0, 1.5, NAN, None),
        "scale": (*PAIR, [0.5, 3.0]),
        "ratio": PAIR,
        "hflip": SHARE,
        "vflip": SHARE,
        "color_jitter": NOT_NEGATIVE,
        "re_prob": SHARE,
        "re_mode": ("noise", None),
        "auto_augment": (
            "rand-m99",
            "rand-mx",
            "rand-",
            "rand-m9-p2",
            "augmix-w0",
            "v9",
            "rand-tz",
        ),
        "dataset": ("folder/a",),
    },
    SegmentationData: {
        **{name: values for name, values in LOADING.items() if name != "eval_batch_size"},
        "num_classes": (*COUNT, 256),
        "img_size": (*COUNT, 10**7, [32, 0], [32, 32, 32]),
        "base_size": ([512, 2048], [512, 0], [512]),
        "ratio": PAIR,
        "max_share": (0.0, 1.5, NAN, None),
        "hflip": SHARE,
        "distortion": SHARE,
        "mean": MEAN,
        "std": STD,
    },
    DetectionData: {
        **LOADING,
        "img_size": (*COUNT, 10**7),
        "eval_size": COUNT_OR_NONE,
        "scale": PAIR,
        "hflip": SHARE,
    },
    ChannelData: CHANNELS,
    CellData: CHANNELS,
    Classification: {
        **EPOCHS,
        **LAYERS,
        "num_classes": COUNT_OR_NONE,
        "weight_decay_end": (-1.0, NAN, INF),
        "lr_scales": DENSE["lr_scales"],
        "betas": DENSE["betas"],
        "ema_decay": SHARE_BELOW_1,
        "mixup": NOT_NEGATIVE,
        "cutmix": NOT_NEGATIVE,
        "switch_prob": SHARE,
        "label_smoothing": (*SHARE_BELOW_1, 2.0),
    },
    Pretraining: {
        **EPOCHS,
        "betas": DENSE["betas"],
        "ema_decay": SHARE_BELOW_1,
        "pictures_every_n_epochs": COUNT_OR_NONE,
    },
    LinearProbe: {**EPOCHS, "num_classes": COUNT_OR_NONE, "momentum": SHARE_BELOW_1},
    Segmentation: {
        **DENSE,
        "aux_channels": COUNT,
        "aux_weight": NOT_NEGATIVE,
        "drop_rate": SHARE_BELOW_1,
        "window": COUNT_OR_NONE,
        "stride": COUNT,
        "scales": ([0.0], [], [NAN], [1.0, -1.0], None),
        "out_indices": ("all", None),
    },
    Detection: {
        **DENSE,
        **LAYERS,
        "pad_to": COUNT_OR_0,
        "image_mean": MEAN,
        "image_std": STD,
        "proposals": COUNT,
        "hidden_dim": COUNT,
        "samples": COUNT,
        "score_thresh": SHARE,
        "nms_thresh": SHARE,
        "detections": COUNT,
        "drops": ([0.0], [1.5], [0.9, 0.5], [NAN], None),
    },
}
del WRONG[Detection]["min_lr"]  # the rate ends where the drops leave it
TRAINER = {
    "max_epochs": (0, -5, 2.5),
    "max_steps": (0, -5),
    "min_epochs": (-1,),
    "accumulate_grad_batches": (0, -1, 10**21),
    "gradient_clip_val": (-1.0, NAN),
    "gradient_clip_algorithm": ("sum",),
    "log_every_n_steps": (-1,),
    "num_sanity_val_steps": (-2,),
    "check_val_every_n_epoch": (0, -1),
    "val_check_interval": (0, -1, 1.5, "soon"),
    "limit_train_batches": (0, -1, 0.0, 2.5, NAN),
    "limit_val_batches": (-1, 2.5),
    "overfit_batches": (-1, 2.5),
    "fast_dev_run": (-1,),
    "devices": (0, -2, "many", 10**6),
    "num_nodes": (0, 10**8),
    "accelerator": ("abacus",),
    "precision": ("8-bit",),
    "max_time": ("long",),
}
NEEDED = {
    ChannelData: {"in_chans": 3, "mean": [0.5], "std": [0.5]},
    CellData: {"cells": "a.csv", "plate_map": "b.csv", "metadata": "c.csv"},
}
MODEL = {
    "class_path": "fastvim.tasks.Classification",
    "init_args": {"model": "fastvim_tiny_patch16_224"},
}
DATA = {"class_path": "fastvim.data.images.ImageData", "init_args": {"root": "nowhere"}}


def options_of(cls: type) -> dict[str, str]:
    """The annotations of the options of a class, and of its bases where it passes them on."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if not base.__module__.startswith("fastvim.") or "__init__" not in vars(base):
            continue
        own = inspect.signature(base.__init__).parameters.values()
        found = {**{each.name: str(each.annotation) for each in own}, **found}
        if not any(each.kind is each.VAR_KEYWORD for each in own):
            break
    return found


@pytest.mark.parametrize("cls", WRONG, ids=lambda cls: cls.__name__)
def test_every_option_that_takes_numbers_is_tried(cls):
    fixed = {*getattr(cls, "fixed_options", ()), "categories"}
    if cls is SegmentationData:
        fixed.add("eval_batch_size")  # its images have sizes of their own
    numeric = re.compile(r"\b(int|float)\b")
    numbers = {name for name, kind in options_of(cls).items() if numeric.search(kind)}
    assert numbers - fixed == {name for name in WRONG[cls] if numeric.search(options_of(cls)[name])}


def section_of(cls: type) -> str:
    return "data" if cls.__module__.startswith("fastvim.data") else "model"


def recipe_with(section: str, changes: dict) -> str:
    return yaml.safe_dump({"model": MODEL, "data": DATA, "trainer": {}, section: changes})


def error_of(capsys, *words: str) -> str:
    """The one line on standard error."""
    assert main(["fit", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastvim: error: ")
    assert error.count("\n") == 1
    return error.removeprefix("fastvim: error: ")


def assert_named(error: str, key: str, value: object) -> None:
    """The line says the option, its value and what was expected, in the user's words."""
    assert error.startswith(f"{key} "), error
    found, _, expected = error.removeprefix(f"{key} ").partition(": expected ")
    assert expected.strip(), error
    assert "Union" not in error
    assert "validate" not in error
    assert yaml.safe_load(found) == value or found == str(value), error


def wrong_values() -> list:
    """Two values of each option, in turns; `make test-faults` tries the others too."""
    cases = []
    every = [(cls, *each) for cls, options in WRONG.items() for each in options.items()]
    for number, (cls, option, values) in enumerate(every):
        first = number % len(values)
        turned = [*values[first:], *values[:first]]
        name = f"{cls.__name__}-{option}"
        cases.append(pytest.param(cls, option, turned[:2], id=name))
        if others := turned[2:]:
            mark = pytest.mark.faults
            cases.append(pytest.param(cls, option, others, id=f"{name}-others", marks=mark))
    return cases


@pytest.mark.parametrize(("cls", "option", "values"), wrong_values())
def test_a_wrong_value_in_a_recipe(tmp_path, capsys, cls, option, values):
    section, file = section_of(cls), tmp_path / "recipe.yaml"
    needed = {"root": "nowhere"} if section == "data" else {"model": "fastvim_tiny_patch16_224"}
    for value in values:
        arguments = {**needed, **NEEDED.get(cls, {}), option: value}
        class_path = f"{cls.__module__}.{cls.__name__}"
        file.write_text(recipe_with(section, {"class_path": class_path, "init_args": arguments}))
        assert_named(error_of(capsys, "--config", str(file)), f"{section}.{option}", value)


def test_the_trainer_and_the_run(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    for option, values in TRAINER.items():
        for value in values:
            file.write_text(recipe_with("trainer", {"accelerator": "cpu", option: value}))
            error = error_of(capsys, "--config", str(file))
            assert error.startswith("trainer"), error
            assert option in error
            assert "Union" not in error


def test_one_batch_is_not_all_batches(monkeypatch):
    hints = inspect.unwrap(L.Trainer.__init__).__annotations__
    for name in ("limit_train_batches", "overfit_batches"):  # as where a package asked first
        monkeypatch.setitem(hints, name, Union[float, int, None])  # noqa: UP007
    read_integers_first(L.Trainer.__init__)
    parser = ArgumentParser()
    parser.add_class_arguments(L.Trainer, "trainer")
    words = ["--trainer.limit_train_batches=1", "--trainer.overfit_batches=0.5"]
    trainer = parser.parse_args(words).trainer
    assert isinstance(trainer.limit_train_batches, int)
    assert trainer.overfit_batches == 0.5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed_everything", "-1"),
        ("checkpoint_every_n_steps", "0"),
        ("data.batch_size", "0"),
        ("data.hflip", "5.0"),
        ("model.lr", ".nan"),
        ("trainer.accumulate_grad_batches", "0"),
        ("trainer.devices", "1000000"),
        ("trainer.val_check_interval", "100"),
        ("trainer.limit_train_batches", "0.01"),
        ("trainer.overfit_batches", "0.01"),
        ("data.train_images", "97"),
        ("data.batch_size", "97"),
        ("model.num_classes", "5"),
        ("data.num_classes", "5"),
        ("model.model_args.drop_path_rate", "2"),
        ("model.model_args.img_size", "0"),
        ("model.model_args.depth", "two"),
        ("model.sample_channels", "True"),
    ],
)
def test_on_the_command_line(tmp_path, image_folder, capsys, key, value):
    file = tmp_path / "recipe.yaml"
    model_args = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}
    model = {**MODEL["init_args"], "model_args": model_args}
    data = {"root": str(image_folder), "img_size": 32, "num_workers": 0, "batch_size": 8}
    trainer = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(tmp_path / "run")}
    sections = {"model": {**MODEL, "init_args": model}, "data": {**DATA, "init_args": data}}
    file.write_text(yaml.safe_dump({**sections, "trainer": trainer}))
    shown = value.removeprefix(".").strip()
    error = error_of(capsys, "--config", str(file), f"--{key}", value)
    assert re.match(rf"{re.escape(key)} '?{re.escape(shown)}'?: expected \S", error), error


def test_an_option_of_an_augmentation(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    arguments = {"root": "nowhere", **NEEDED[ChannelData], "augment": {"defocus": 1.5}}
    class_path = "fastvim.data.channels.ChannelData"
    file.write_text(recipe_with("data", {"class_path": class_path, "init_args": arguments}))
    error = error_of(capsys, "--config", str(file))
    assert_named(error, "data.augment.defocus", 1.5)


def test_policies_of_timm(image_folder):
    for policy in (
        *("rand-m9-mstd0.5-inc1", "rand-m15-mmax20-n3-p0.5", "rand-t3a", "rand", "3a", "v0"),
        *("original-mstd0.5", "augmix-m5-w4-d2", "augmix-b1", None, ""),
    ):
        ImageData(str(image_folder), auto_augment=policy)


def test_the_library_names_the_option_alone():
    with pytest.raises(OptionError, match=r"^batch_size 0: expected 1 or more$"):
        ImageData("nowhere", batch_size=0)
