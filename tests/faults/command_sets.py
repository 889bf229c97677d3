"""Sound files for every command, and command lines drawn at random: good, odd and bad words."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import yaml
from fault_sets import draw, recipe
from PIL import Image
from small_weights import SMALL, TINY, write_autoencoder, write_detector, write_segmenter

from fastvim.weights import save

CHANNELS = "fastchannelvim_small_patch16_224"
SIDE = 16
LAYOUTS = ("folders", "tables", "masks", "coco")
# What is no number, no name and no file; what a terminal, a format or a shell would act upon.
ODD = (
    *(
        "",
        " ",
        "-",
        "--",
        ".",
        "..",
        "/dev/null",
        "~",
        "~nobody/x",
        "*",
        "**/*",
        "[",
        "[a-",
        "a" * 300,
    ),
    *(
        "0",
        "-1",
        "1",
        "-0",
        "+1",
        "1.0",
        "0.5",
        "1e400",
        "nan",
        "inf",
        "-inf",
        "9" * 20,
        "9" * 5000,
    ),
    *("0x10", "1_0", "\u0663", "\u00bd", "1,2", "1 2", "1e9", "True", "true", "null", "None"),
    *(
        "[]",
        "{}",
        "[1, 2",
        '{"a": 1}',
        '{"a":',
        "[[[[1]]]]",
        "!!python/object:os.system",
        "&a [*a]",
    ),
    *("[bold]x[/bold]", "[/]", "\x1b[31mred", "a\nb", "a\rb", "\u202egnp.exe", "\U0001f4a5"),
    *(
        "%s",
        "%(x)s",
        "{0}",
        "{x!r}",
        "$HOME",
        "`id`",
        "'",
        '"',
        "\\",
        "a=b",
        "=",
        "\udcff.png",
        "\u00e9",
    ),
)
# A large number of these asks for a long time.
SLOW = {"repeats", "warmup", "attempts", "scales", "trainer.max_epochs", "trainer.max_time"}
SMALL_VALUES = ("1", "2", "0", "-1", "nan", "", "x", "0.5", "\u0663")


class Scene:
    """A folder with weights, images and recipes that are right.

    Args:
        root: of the folder, which is made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        write_autoencoder(root / "autoencoder.safetensors")
        write_segmenter(root / "segmenter.safetensors")
        write_detector(root / "detector.safetensors")
        for seed, layout in enumerate(LAYOUTS):
            told = recipe(draw(root / layout, seed, layout), layout)
            told["trainer"] |= {"default_root_dir": "run", "limit_train_batches": 1}
            (root / f"{layout}.yaml").write_text(yaml.safe_dump(told))
        classes = sorted(path.name for path in (root / "folders" / "train").iterdir())
        _write_classifier(root / "classifier.safetensors", TINY, classes, 0.5, 3)
        classes = sorted({path.stem[6:9] for path in (root / "tables").glob("train-*")})
        _write_classifier(root / "channels.safetensors", CHANNELS, classes, 128.0, 2)
        _write_classifier(root / "spectra.safetensors", TINY, classes, 128.0, 2)
        noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "photo.png")
        Image.fromarray(noise).save(root / "photo.jpg")
        np.save(root / "cells.npy", noise[..., :2].transpose(2, 0, 1))

    def paths(self) -> list[str]:
        return [str(self.root), *(str(path) for path in sorted(self.root.iterdir()))]

    def sound(self, command: str) -> list[str]:
        """The words of a command that works, after its name; short."""
        at = self.root
        photo = [f"{at}/photo.png"]
        return {
            "predict": ["--model", f"{at}/classifier.safetensors", *photo],
            "reconstruct": ["--model", f"{at}/autoencoder.safetensors", *photo, "--size", "32"],
            "segment": ["--model", f"{at}/segmenter.safetensors", *photo],
            "detect": ["--model", f"{at}/detector.safetensors", *photo],
            "channels": [f"{at}/channels.safetensors", "--root", f"{at}/tables"],
            "data check": [f"--config={at}/folders.yaml"],
            "data stats": [f"{at}/tables/table.csv"],
            "convert": [f"{at}/segmenter.safetensors", "out.safetensors"],
            "benchmark": [TINY, "--size", "32", "--batch", "1", "--warmup", "1", "--repeats", "1"],
            "models": ["--pretrained"],
            "fit": [f"--config={at}/folders.yaml"],
            "validate": [
                f"--config={at}/folders.yaml",
                f"--model.checkpoint={at}/classifier.safetensors",
            ],
            "test": [f"--config={at}/tables.yaml", f"--model.checkpoint={at}/spectra.safetensors"],
        }[command]


def _write_classifier(
    path: Path, name: str, classes: list[str], mean: float, in_chans: int
) -> None:
    blocks = {**SMALL, "img_size": SIDE, "num_classes": len(classes), "in_chans": in_chans}
    images = {"mean": [mean] * in_chans, "std": [mean / 2] * in_chans, "img_size": SIDE}
    told = {"model": name, "model_args": blocks, "in_chans": in_chans, "class_names": classes}
    save(path, timm.create_model(name, **blocks).state_dict(), {**told, **images})


COMMANDS = ("predict", "reconstruct", "segment", "detect", "channels", "data check", "data stats")
COMMANDS += ("convert", "benchmark", "models", "validate", "test", "fit")
TRAINING = ("fit", "validate", "test", "data check")


class Option(argparse.Namespace):
    """An option of a command: its flags, its name, its choices, and whether it takes a value."""

    flag: str
    name: str
    choices: Sequence[str]
    takes: bool


@cache
def options(command: str, scene: Scene) -> list[Option]:
    """Those of a command's own parser."""
    name, _, sub = command.partition(" ")
    if command in TRAINING:
        keys = _keys(scene.root / "folders.yaml")
        return [Option(flag=f"--{key}", name=key, choices=(), takes=True) for key in keys]
    parser = importlib.import_module(f"fastvim_cli.{name}")._parser()
    if sub:
        parser = parser._subparsers._group_actions[0].choices[sub]
    return [
        Option(
            flag=action.option_strings[0],
            name=action.dest,
            choices=[str(each) for each in action.choices or ()],
            takes=action.nargs != 0,
        )
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    ]


@cache
def _keys(file: Path) -> list[str]:
    """The dotted keys of a recipe, set or not."""
    from fastvim_cli.train import TrainingCLI

    class Parsed(TrainingCLI):
        def instantiate_classes(self) -> None:
            pass

    found = Parsed("validate", [f"--config={file}"]).config.keys()
    return [key.replace(".init_args", "") for key in found]


def command_line(seed: int, scene: Scene) -> list[str]:
    """The words of a seed's command line, most of them with something odd in it."""
    rng = np.random.default_rng(seed)
    # A tenth are `fit`, which takes longest.
    command = "fit" if rng.random() < 0.1 else COMMANDS[rng.integers(len(COMMANDS) - 1)]
    words = scene.sound(command)
    for _ in range(rng.integers(0, 4)):
        change: Callable[..., list[str]] = rng.choice(np.array(CHANGES, dtype=object))
        words = change(rng, command, words, scene)
    return [*command.split(), *words]


def _value(rng: np.random.Generator, option: Option, scene: Scene) -> str:
    """A value for an option: one that exists, a path, a number, or an odd one."""
    kind = rng.random()
    if option.name in SLOW:
        return str(rng.choice(SMALL_VALUES))
    if option.choices and kind < 0.4:
        return str(rng.choice(option.choices))
    if kind < 0.2:
        return str(rng.choice(scene.paths()))
    if kind < 0.5:
        return str(rng.choice(["1", "2", "0.5", "32", "48", "cpu", "val", "results", "a b"]))
    return ODD[rng.integers(len(ODD))]


def _add_option(rng: Any, command: str, words: list[str], scene: Scene) -> list[str]:
    found = options(command, scene)
    if not found:
        return [*words, ODD[rng.integers(len(ODD))]]
    option = found[rng.integers(len(found))]
    if not option.takes:
        return [*words, option.flag]
    value = _value(rng, option, scene)
    if rng.random() < 0.1:
        return [*words, option.flag]  # without its value
    glued = rng.random() < 0.5
    return [*words, f"{option.flag}={value}"] if glued else [*words, option.flag, value]


def _repeat_a_word(rng: Any, command: str, words: list[str], scene: Scene) -> list[str]:
    return [*words, words[rng.integers(len(words))]] if words else words


def _drop_a_word(rng: Any, command: str, words: list[str], scene: Scene) -> list[str]:
    place = rng.integers(len(words) + 1)
    return words[:place] + words[place + 1 :]


def _odd_word(rng: Any, command: str, words: list[str], scene: Scene) -> list[str]:
    place = rng.integers(len(words) + 1)
    return [*words[:place], ODD[rng.integers(len(ODD))], *words[place + rng.integers(2) :]]


def _damaged_word(rng: Any, command: str, words: list[str], scene: Scene) -> list[str]:
    if not words:
        return words
    place = rng.integers(len(words))
    word = words[place]
    cut = rng.integers(len(word) + 1)
    changed = rng.choice([word[:cut], word[cut:], word[:cut] + "\u00fc" + word[cut:], word.upper()])
    return [*words[:place], str(changed), *words[place + 1 :]]


def _another_path(rng: Any, command: str, words: list[str], scene: Scene) -> list[str]:
    return [*words, str(rng.choice(scene.paths()))]


CHANGES = (_add_option, _add_option, _add_option, _repeat_a_word, _drop_a_word, _odd_word)
CHANGES += (_damaged_word, _another_path)
