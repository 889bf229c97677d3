"""A small run of the command line that exercises the whole recipe."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from fastvim.data.images import ImageData

sys.path.insert(0, str(Path(__file__).parent))  # for the callbacks in stops.py, and harness.py


@pytest.fixture
def data(image_folder) -> ImageData:
    """96 training and 36 validation images, in batches of 8."""
    return ImageData(str(image_folder), img_size=32, batch_size=8, num_workers=0)


def recipe(root: Path, images: Path) -> dict:
    """96 training images in batches of 8, two batches a step: 6 steps an epoch."""
    return {
        "model": {
            "class_path": "fastvim.tasks.Classification",
            "init_args": {
                "model": "fastvim_tiny_patch16_224",
                "model_args": {
                    "img_size": 32,
                    "patch_size": 8,
                    "embed_dim": 32,
                    "depth": 2,
                    "drop_path_rate": 0.2,
                },
                "lr": 0.05,
                "warmup_epochs": 1,
                "layer_decay": 0.8,
                "ema_decay": 0.9,
            },
        },
        "data": {
            "class_path": "fastvim.data.images.ImageData",
            "init_args": {
                "root": str(images),
                "img_size": 32,
                "batch_size": 8,
                "num_workers": 0,
            },
        },
        "trainer": {
            "default_root_dir": str(root),
            "accelerator": "cpu",
            "max_epochs": 3,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
        },
        "checkpoint_every_n_steps": 2,
    }


@pytest.fixture
def write_recipe(tmp_path, image_folder):
    """Writes the small recipe with changes, as in `write_recipe({"trainer.max_epochs": 1})`."""

    def write(changes: dict | None = None, name: str = "run") -> Path:
        config = recipe(tmp_path / name, image_folder)
        for key, value in (changes or {}).items():
            *path, last = key.split(".")
            section = config
            for part in path:
                section = section[part]
            section[last] = value
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    return write
