"""Every recipe parses, builds its model and groups its parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvim.cli.train import TrainingCLI
from fastvim.tasks.optim import parameter_groups

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
IMAGENET = [file for file in RECIPES if file.parent.name == "imagenet"]


def build(recipe: Path, command: str = "fit") -> TrainingCLI:
    return TrainingCLI(
        command,
        [f"--config={recipe}", "--data.root=images", "--trainer.accelerator=cpu"],
    )


def test_there_are_recipes():
    assert {file.stem for file in RECIPES} >= {
        "quickstart",
        "fastvim_tiny",
        "fastvim_small",
        "fastvim_base",
        "vim_base",
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_builds(recipe):
    cli = build(recipe)
    task = cli.model
    task.num_classes = task.num_classes or 10  # else the data's
    with torch.device("meta"):
        task.configure_model()
    decaying, exempt = sorted(
        parameter_groups(task.model, task.weight_decay), key=lambda group: -group["weight_decay"]
    )
    assert decaying["weight_decay"] == 0.05
    assert exempt["weight_decay"] == 0
    count = sum(1 for _ in task.model.parameters())
    assert len(decaying["params"]) + len(exempt["params"]) == count


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_says_how_to_run_it_and_what_to_expect(recipe):
    header = recipe.read_text().split("\nmodel:")[0]
    assert f"fastvim fit --config {recipe.relative_to(ROOT)}" in header
    assert "Published:" in header or "Expect" in header


@pytest.mark.parametrize("recipe", IMAGENET, ids=lambda file: file.stem)
def test_imagenet_recipes_are_the_published_one(recipe):
    cli = build(recipe)
    task, data = cli.model, cli.datamodule
    assert data.batch_size * 8 == 1024
    assert task.lr * 1024 / task.lr_batch == pytest.approx(2e-3)
    assert task.model_args["drop_path_rate"] == (0.4 if "base" in recipe.stem else 0.05)
    assert task.ema_decay == 0.9999
    assert cli.trainer.max_epochs == 300
    assert cli.config.trainer.precision == "bf16-mixed"
