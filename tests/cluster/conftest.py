"""Small runs in several processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))  # for harness.py and stops.py
sys.path.insert(0, str(Path(__file__).parent))

from harness import recipe_writer


@pytest.fixture
def write_recipe(tmp_path, image_folder):
    """Writes the small recipe with changes, as in `write_recipe({"trainer.max_epochs": 1})`."""
    return recipe_writer(tmp_path, image_folder)


@pytest.fixture
def slurm(tmp_path) -> Path:
    """A folder with a program `scontrol` that writes down what it is asked."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    program.chmod(0o755)
    return folder
