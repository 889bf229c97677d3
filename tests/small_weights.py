"""Weights of small models, one for each command, for the tests of the README and of the wheel.

Run as a program it writes what `wheel_commands.py` needs into the current folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image
from torch import nn

from fastvim.models import FeatureMaps
from fastvim.models.heads.cascade import build_detector
from fastvim.models.heads.upernet import UPerNet
from fastvim.weights import save

TINY = "fastvim_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}


def write_classifier(path: Path) -> None:
    """Of the published size, so that it can be converted to a published file and back."""
    save(path, timm.create_model(TINY).state_dict(), {"model": TINY, "model_args": {}})


def write_small_classifier(path: Path) -> None:
    _write(path, timm.create_model(TINY, **SMALL))


def write_autoencoder(path: Path) -> None:
    name = "mae_fastvim_tiny_patch16_224"
    _write(path, timm.create_model(name, **SMALL), name)


def write_channel_model(path: Path) -> None:
    name = "fastchannelvim_small_patch16_224"
    _write(path, timm.create_model(name, **SMALL), name)


def write_segmenter(path: Path) -> None:
    head: dict[str, Any] = {"num_classes": 3, "channels": 12, "aux_channels": 8}
    maps: dict[str, Any] = {"out_indices": [0, 1], "source": "mixer"}
    model = UPerNet(FeatureMaps(timm.create_model(TINY, **SMALL), **maps), **head)
    images: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.2] * 3, "base_size": [64, 48]}
    images["class_names"] = ["background", "cat", "dog"]
    _write(path, model, segmentation={**head, **maps, "window": 32, "stride": 24}, **images)


def write_detector(path: Path) -> None:
    heads = {"hidden_dim": 16, "samples": 16, "score_thresh": 0.0, "detections": 5}
    head: dict[str, Any] = {"num_classes": 2, "channels": 16, "pad_to": 0, "proposals": 50}
    model = build_detector(timm.create_model(TINY, **SMALL), **head, heads=heads)
    told = {"class_names": ["box", "disc"], "category_ids": [3, 7], "img_size": 32}
    _write(path, model, detection={**head, "heads": heads}, **told)


def _write(path: Path, model: nn.Module, name: str = TINY, **metadata: Any) -> None:
    save(path, model.state_dict(), {"model": name, "model_args": SMALL, **metadata})


def main() -> None:
    write_classifier(Path("classifier.safetensors"))
    write_autoencoder(Path("autoencoder.safetensors"))
    write_channel_model(Path("channels.safetensors"))
    write_segmenter(Path("segmenter.safetensors"))
    write_detector(Path("detector.safetensors"))
    photo = Image.linear_gradient("L").convert("RGB")
    photo.save("photo.png")
    Path("photos/train/a").mkdir(parents=True)
    photo.save("photos/train/a/1.png")
    np.save("cells.npy", np.zeros((8, 32, 32), dtype=np.uint8))
    Path("weights").mkdir()
    Path("table.csv").write_text("path,label,split\nphoto.png,a,train\nphoto.png,b,val\n")


if __name__ == "__main__":
    main()
