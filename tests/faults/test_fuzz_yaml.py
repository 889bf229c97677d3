"""Drawn configurations that are wrong: one line at most, nothing run, nothing fetched."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml
from fuzzing import groups
from PIL import Image
from small_weights import SMALL, TINY

DRAWS, IN_ALL_RUNS = 1000, 40
# Modules of a user: what is no class of a training, and what is.
TRAP = "open('ran', 'w')\n\n\nclass Thing:\n    def __init__(self, **options): pass\n"
OWN = (
    "import lightning as L\nfrom fastvim.data.images import ImageData\n\n\n"
    "class Say(L.Callback):\n    def on_train_start(self, *_): print('said')\n\n\n"
    "class Data(ImageData):\n    pass\n"
)
CLASSES = [
    "trap.Thing",
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "trap",
    "torch.load",
    "x.Y",
]
ADDRESSES = ["http://127.0.0.1:9/x.yaml", "s3://bucket/x.yaml", "file:///etc/passwd", "/dev/zero"]
SPECS: list[Any] = [{"class_path": name, "init_args": {"command": "touch ran"}} for name in CLASSES]
VALUES: list[Any] = [*SPECS, *ADDRESSES, *CLASSES, [SPECS[0]], {"a": [SPECS[0]]}]
VALUES += [None, True, -1, 0, 1.5, 10**9, 10**30, float("nan"), float("inf"), "", "x", "\x1b[1m"]
VALUES += [[], {}, [[]], ["a"], {"": None}, "é" * 2000, list(range(2000)), "${oc.env:HOME}", "*"]
KEYS = ["class_path", "init_args", "dict_kwargs", "model_args", "callbacks", "plugins", "strategy"]
KEYS += ["logger", "profiler", "checkpoint", "root", "depth", "img_size", "num_classes", "norm"]
KEYS += ["pretrained_cfg", "checkpoint_path", "lr", "betas", "$schema", "__path__", "config", "x"]


def bombs() -> list[str]:
    """Texts that are small, and large once they are read."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(12)]
    deep = "[" * 100_000
    return [
        *("\n".join(lines), "a: &a [*a]", "model: &a {class_path: *a}", "&a {? *a : b}"),
        *(f"model: {deep}", f"model: {deep}{']' * 100_000}", "model: " + "{a: " * 5000),
        *(
            "".join(" " * i + "a:\n" for i in range(2000)),
            "a: !!python/object/apply:os.system [ls]",
        ),
        *("", "null", "[1]", "text", "\0", "a: b: c", "- a\nb: c", "%YAML 9.9\n---\na", "a: *b"),
    ]


@pytest.fixture(scope="module")
def place(warm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("yaml")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / "data" / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{number}.png")
    (warm.modules / "trap.py").write_text(TRAP)
    (warm.modules / "own.py").write_text(OWN)
    return folder


def recipe() -> dict[str, Any]:
    task = {"model": TINY, "model_args": dict(SMALL), "warmup_epochs": 0}
    data = {"root": "data", "img_size": 32, "batch_size": 2, "num_workers": 0}
    trainer = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": "run"}
    return {
        "model": {"class_path": "fastvim.tasks.Classification", "init_args": task},
        "data": {"class_path": "fastvim.data.images.ImageData", "init_args": data},
        "trainer": {**trainer, "fast_dev_run": True, "callbacks": []},
    }


@pytest.mark.parametrize("seeds", groups(DRAWS, IN_ALL_RUNS))
def test_drawn_configurations(seeds, warm, place):
    wrong = []
    for seed in seeds:
        draw = Random(seed)
        text = draw_text(draw)
        (place / "recipe.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
        words = ("fit",) if draw.random() < 0.2 else ("data", "check")
        ended = warm.run(*words, "--config=recipe.yaml", cwd=place)
        problems = ended.problems + ["it ran"] * (place / "ran").exists()
        (place / "ran").unlink(missing_ok=True)
        if problems:
            wrong.append((seed, problems, ended.stderr[-300:]))
    assert not wrong


def draw_text(draw: Random) -> str:
    """A configuration that is wrong in a few values, or in its text."""
    if draw.random() < 0.1:
        return draw.choice(bombs())
    config = recipe()
    for _ in range(draw.choice((1, 1, 2, 3))):
        change(draw, config)
    text = yaml.safe_dump(config, allow_unicode=True)
    if draw.random() < 0.15:
        at = draw.randrange(len(text))
        text = draw.choice(
            (text[:at], text[:at] + draw.choice("\t{}[]&*!|>%@`\0:") + text[at + 1 :])
        )
    return text


def change(draw: Random, config: dict[str, Any]) -> None:
    """Replace, add or remove one entry, at any depth."""
    group = config
    while inner := [each for each in group.values() if isinstance(each, dict) and each]:
        if draw.random() < 0.25:
            break
        group = draw.choice(inner)
    key = draw.choice(list(group) or KEYS)
    if draw.random() < 0.15:
        group.pop(key, None)
        return
    group[draw.choice(KEYS) if draw.random() < 0.4 else key] = copy.deepcopy(draw.choice(VALUES))


SECTIONS = ["model", "data", "trainer.callbacks", "trainer.logger", "trainer.strategy"]
SECTIONS += ["model.init_args.model_args", "model.init_args.model_args.norm"]


@pytest.mark.parametrize("path", ["trap.Thing", "os.system", "subprocess.run"])
@pytest.mark.parametrize("section", SECTIONS)
def test_a_refused_class_is_not_imported(section, path, warm, place):
    config = recipe()
    *groups_, last = section.split(".")
    group = config
    for name in groups_:
        group = group[name]
    spec = {"class_path": path, "init_args": {"command": "touch ran", "args": ["touch", "ran"]}}
    group[last] = [spec] if last == "callbacks" else spec
    (place / "recipe.yaml").write_text(yaml.safe_dump(config))
    ended = warm.run("fit", "--config=recipe.yaml", cwd=place)
    assert (ended.code, ended.problems) == (2, []), ended.stderr
    assert path in ended.stderr
    assert not (place / "ran").exists()


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("option", ["--config", "--data", "--model", "--trainer"])
def test_no_configuration_is_fetched(option, address, warm, place):
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe()))
    ended = warm.run("fit", "--config=recipe.yaml", option, address, cwd=place)
    assert (ended.code, ended.problems) == (2, []), ended.stderr


def test_classes_of_the_user_are_used(warm, place):
    config = recipe()
    config["data"]["class_path"] = "own.Data"
    config["trainer"]["callbacks"] = [{"class_path": "own.Say"}]
    (place / "recipe.yaml").write_text(yaml.safe_dump(config))
    ended = warm.run("fit", "--config=recipe.yaml", cwd=place)
    assert (ended.code, ended.problems) == (0, []), ended.stderr
    assert "said" in ended.stdout


# How a file comes to be read as a configuration.
PLACES = ["--config", "--data", "--model", "--trainer", "--trainer.callbacks", "within"]


def given(place: Path, where: str, name: str) -> list[str]:
    """The words of a command that reads the file of that name as a configuration."""
    config = recipe()
    words = [] if where == "within" else [where, name]
    if where == "within":
        config["data"] = name
    (place / "recipe.yaml").write_text(yaml.safe_dump(config))
    return ["data", "check", "--config=recipe.yaml", *words]


@pytest.mark.parametrize("text", [*bombs()[:8], "a: " + repr("[*a, *a]" + "[" * 100_000)])
@pytest.mark.parametrize("where", PLACES)
def test_small_texts_that_are_large_once_read(where, text, warm, place):
    (place / "other.yaml").write_text(text)
    ended = warm.run(*given(place, where, "other.yaml"), cwd=place, seconds=20)
    assert (ended.code, ended.problems) == (2, []), ended.stderr
    assert ended.memory < 2**30


@pytest.mark.parametrize("text", ["{a: &a [*a]}", "[" * 100_000])
def test_such_a_text_as_a_value(text, warm, place):
    words = given(place, "--model.model_args", text)
    ended = warm.run(*words, cwd=place, seconds=20)
    assert (ended.code, ended.problems) == (2, []), ended.stderr
    assert ended.memory < 2**30


@pytest.mark.parametrize("where", PLACES)
def test_a_configuration_is_a_file_of_text(where, warm, place):
    """No pipe, which waits for ever; not more than anyone writes; UTF-8."""
    for name in ("pipe.yaml", "large.yaml", "latin.yaml"):
        (place / name).unlink(missing_ok=True)
    os.mkfifo(place / "pipe.yaml")
    (place / "latin.yaml").write_text("root: é", encoding="latin-1")
    with (place / "large.yaml").open("wb") as file:
        file.truncate(2**40)
    said = {"pipe": "a pipe, expected a file", "large": "1,099,511,627,776 bytes", "latin": "UTF-8"}
    for name, words in said.items():
        ended = warm.run(*given(place, where, f"{name}.yaml"), cwd=place, seconds=20)
        assert (ended.code, ended.problems) == (2, []), ended.stderr
        assert words in ended.stderr
        assert f"{name}.yaml" in ended.stderr


def test_own_classes_of_a_file_within(warm, place):
    """What a file within names is trusted or extends such, as what the first one names."""
    for name, code in (("own.Data", 0), ("trap.Thing", 2)):
        (place / "other.yaml").write_text(yaml.safe_dump(recipe()["data"] | {"class_path": name}))
        ended = warm.run(*given(place, "within", "other.yaml"), cwd=place)
        assert (ended.code, ended.problems) == (code, []), ended.stderr
        assert not (place / "ran").exists()
