"""Every value of every published configuration stands in our recipe of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
VALUES = json.loads((ROOT / "tests" / "golden" / "training" / "values.json").read_text())
TRAINER = {"epochs": "max_epochs", "steps": "max_steps", "clip": "gradient_clip_val"}
GPUS = 8  # that the batch of a recipe is for


def value(recipe: dict[str, Any], key: str) -> Any:
    """What a recipe says of a published value; None if it does not."""
    task, data = (recipe[section]["init_args"] for section in ("model", "data"))
    batch = GPUS * data["batch_size"] * recipe["trainer"].get("accumulate_grad_batches", 1)
    if key == "global_batch":
        return batch
    if key == "rate_of_64":
        return task["lr"] * 64 / task["lr_batch"]
    if key in TRAINER:
        return recipe["trainer"].get(TRAINER[key])
    for section in (task, task.get("model_args", {}), data):
        if key in section:
            return section[key]
    return None


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    found = {key: value(recipe, key) for key in VALUES[name]}
    assert found == {
        key: pytest.approx(want) if isinstance(want, float) else want
        for key, want in VALUES[name].items()
    }
