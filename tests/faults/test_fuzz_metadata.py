"""Drawn weights with wrong metadata or a wrong header: one line, nothing run, nothing fetched."""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import small_weights
import timm
import torch
from fuzzing import groups
from PIL import Image

from fastvim.weights import METADATA_KEY, read, save

DRAWS, IN_ALL_RUNS = 1000, 60
TRAP = "snare"  # a module that leaves a file behind where it is imported

# The command that uses each kind of weights.
USES = {
    "classifier": ("predict", "--model", "WEIGHTS", "photo.png"),
    "autoencoder": ("reconstruct", "--model", "WEIGHTS", "--out", "out", "photo.png"),
    "channels": ("predict", "--model", "WEIGHTS", "cells.npy"),
    "segmenter": ("segment", "WEIGHTS", "photo.png"),
    "detector": ("detect", "WEIGHTS", "photo.png"),
}
CONVERSION = ("convert", "WEIGHTS", "converted.safetensors")
NUMBERS = [0, -1, 1, 2, 3, 7, 10**4, 10**7, 10**9, 2**31, 2**63, 10**30, 0.5, 1e-9, 1e300, -0.0]
NUMBERS += [float("nan"), float("inf"), True, False]
TEXTS = [
    "",
    "x",
    "mean",
    "../../x",
    "\x1b[31m",
    "[bold]",
    "é\n",
    "x" * 5000,
    "http://127.0.0.1:9/x",
]
TEXTS += ["os.system", "resnet18", "local-dir:.", "hf-hub:timm/resnet18", "vit_tiny_patch16_224"]
CLASS = {"class_path": f"{TRAP}.Thing", "init_args": {"command": "touch ran"}}
SOURCE = {"url": "http://127.0.0.1:9/x.pth", "file": "evil.pth", "hf_hub_id": "timm/resnet18"}
OTHERS: list[Any] = [None, [], {}, [None], [[]], {"": {}}, [1, 2], [1, 2, 3], ["a"], CLASS, SOURCE]
VALUES = [*NUMBERS, *TEXTS, *OTHERS, list(range(3000))]
# Names that mean something to timm or to a constructor.
NAMES = ["pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"]
NAMES += ["features_only", "scriptable", "traversals", "self", "name", "model", "variant", "kwargs"]
NAMES += ["depth", "img_size", "embed_dim", "num_classes", "in_chans", "decoder_depth", "expand"]
NAMES += ["mean", "std", "crop_pct", "value_range", "base_size", "eval_size", "class_names"]
NAMES += ["segmentation", "detection", "features", "heads", "window", "out_indices", "hidden_dim"]


@pytest.fixture(scope="module")
def place(warm, tmp_path_factory) -> Path:
    """A folder with weights of each kind, images and a trap."""
    folder = tmp_path_factory.mktemp("metadata")
    _write_classifier(folder / "classifier.safetensors")
    small_weights.write_autoencoder(folder / "autoencoder.safetensors")
    small_weights.write_channel_model(folder / "channels.safetensors")
    small_weights.write_segmenter(folder / "segmenter.safetensors")
    small_weights.write_detector(folder / "detector.safetensors")
    Image.linear_gradient("L").convert("RGB").resize((40, 40)).save(folder / "photo.png")
    np.save(folder / "cells.npy", np.zeros((8, 32, 32), dtype=np.uint8))
    (warm.modules / f"{TRAP}.py").write_text("open('ran', 'w')\n")
    return folder


def _write_classifier(path: Path) -> None:
    options = {**small_weights.SMALL, "num_classes": 3}
    told = {"mean": [0.5] * 3, "std": [0.2] * 3, "img_size": 32, "in_chans": 3, "crop_pct": 0.9}
    told |= {"interpolation": "bicubic", "class_names": ["a", "b", "c"]}
    weights = timm.create_model(small_weights.TINY, **options).state_dict()
    save(path, weights, {"model": small_weights.TINY, "model_args": options, **told})


@pytest.mark.parametrize("seeds", groups(DRAWS, IN_ALL_RUNS))
def test_drawn_metadata(seeds, warm, place):
    wrong = []
    for seed in seeds:
        draw = Random(seed)
        kind = draw.choice(list(USES))
        file = draw_weights(draw, place, kind)
        words = USES[kind] if draw.random() < 0.9 else CONVERSION
        ended = warm.run(*(str(file) if word == "WEIGHTS" else word for word in words), cwd=place)
        problems = ended.problems + ["it ran"] * (place / "ran").exists()
        if problems:
            wrong.append((seed, words[0], problems, ended.stderr[-300:]))
    assert not wrong


@pytest.mark.parametrize("kind", USES)
def test_sound_metadata(kind, warm, place):
    words = [f"{kind}.safetensors" if word == "WEIGHTS" else word for word in USES[kind]]
    ended = warm.run(*words, cwd=place)
    assert (ended.code, ended.problems) == (0, []), ended.stderr


def draw_weights(draw: Random, place: Path, kind: str) -> Path:
    """A file of weights of which something is wrong, as drawn."""
    source = place / f"{kind}.safetensors"
    metadata = read(source).metadata
    for _ in range(draw.choice((1, 1, 2, 3))):
        change(draw, metadata)
    if draw.random() < 0.2:
        file = place / "drawn.ckpt"
        torch.save({"state_dict": read(source).state, METADATA_KEY: metadata}, file)
        return file
    file = place / "drawn.safetensors"
    text = json.dumps(metadata)
    if draw.random() < 0.15:
        text = damage_text(draw, text)
    header, content = _parts(source.read_bytes())
    header["__metadata__"] = {METADATA_KEY: text}  # without the checksum
    if draw.random() < 0.15:
        damage_header(draw, header)
    encoded = json.dumps(header).encode()
    length = len(encoded) if draw.random() < 0.97 else draw.choice((0, 7, 2**31, 2**40, 2**63))
    file.write_bytes(struct.pack("<Q", length) + encoded + content)
    return file


def _parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a file of safetensors, and what follows."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def change(draw: Random, metadata: dict[str, Any]) -> None:
    """Replace, add or remove one entry, at any depth."""
    group = metadata
    while inner := [each for each in group.values() if isinstance(each, dict) and each]:
        if draw.random() < 0.4:
            break
        group = draw.choice(inner)
    if draw.random() < 0.1 and group:
        del group[draw.choice(list(group))]
    elif draw.random() < 0.4 or not group:
        group[draw.choice(NAMES)] = deepcopy(draw.choice(VALUES))
    else:
        group[draw.choice(list(group))] = deepcopy(draw.choice(VALUES))


def damage_text(draw: Random, text: str) -> str:
    """JSON that is cut, changed in a character, or nested."""
    at = draw.randrange(len(text))
    deep = draw.choice((100, 1000, 100_000))
    kinds = [text[:at], text[:at] + chr(draw.randrange(1, 0x300)) + text[at + 1 :], ""]
    kinds += ["[" * deep + "]" * deep, '{"model_args":' * deep, "null", "[]", "5", '"x"', "NaN"]
    kinds += [text[:-1] + ', "x": ' + "9" * 5000 + "}"]
    return draw.choice(kinds)


def damage_header(draw: Random, header: dict[str, Any]) -> None:
    """Offsets, a shape or a type that the content does not have."""
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    field = draw.choice(("data_offsets", "shape", "dtype"))
    first, last = entry["data_offsets"]
    values = {
        "data_offsets": [[0, 2**62], [first, last + 4], [last, first], [-1, 3], [0, 4], []],
        "shape": [[2**40, 2**40], [0], [-1], [], [1.5], "x", [10**30]],
        "dtype": ["F64", "X", 5, None, "BF16", "I8"],
    }
    entry[field] = draw.choice(values[field])
