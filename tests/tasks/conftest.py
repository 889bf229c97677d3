"""A small run of the command line that exercises the whole recipe."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastvim.data.images import ImageData

sys.path.insert(0, str(Path(__file__).parent))  # for the callbacks in stops.py, and harness.py

from harness import recipe_writer


@pytest.fixture
def data(image_folder) -> ImageData:
    """96 training and 36 validation images, in batches of 8."""
    return ImageData(str(image_folder), img_size=32, batch_size=8, num_workers=0)


@pytest.fixture
def write_recipe(tmp_path, image_folder):
    """Writes the small recipe with changes, as in `write_recipe({"trainer.max_epochs": 1})`."""

    return recipe_writer(tmp_path, image_folder)
