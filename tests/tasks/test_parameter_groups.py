"""Rate and decay of every parameter under every recipe, as the published optimisers had them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import optim

from fastvim.tasks import Classification, Detection, LinearProbe, Pretraining, Segmentation
from fastvim.weights import dense_names, head_of, to_published

ROOT = Path(__file__).parents[2]
RECIPES = json.loads((ROOT / "tests" / "golden" / "training" / "parameters.json").read_text())
TASKS = {task.__name__: task for task in (Classification, Detection, LinearProbe)}
TASKS |= {"Pretraining": Pretraining, "Segmentation": Segmentation}


class Trainer:
    """What the optimiser asks of Lightning's trainer; `batch` images a step."""

    world_size, accumulate_grad_batches, precision = 1, 1, "32-true"
    strategy = SimpleNamespace(root_device=torch.device("cpu"))

    def __init__(self, batch: int) -> None:
        self.datamodule = self
        self.batch_size, self.num_classes = batch, 7

    class state:
        fn = None


def build(recipe: dict):
    """The task of a recipe over a narrow model."""
    settings = yaml.safe_load((ROOT / "recipes" / f"{recipe['recipe']}.yaml").read_text())["model"]
    options = settings["init_args"]
    sizes = {"embed_dim": recipe["embed_dim"], "depth": recipe["depth"], "img_size": 224}
    options["model_args"] = {**options.get("model_args", {}), **sizes}
    options["checkpoint"] = None
    return TASKS[settings["class_path"].rpartition(".")[2]](**options)


def published(state: dict[str, torch.Tensor]) -> dict[str, float]:
    """A value of each published name, from tensors of ours that are filled with it."""
    values = {}
    convert = dense_names.to_published if head_of(state) else to_published
    for name, tensor in convert(state).items():
        assert tensor.min() == tensor.max(), name
        values[name] = tensor.flatten()[0].item()
    return values


@pytest.mark.parametrize("name", RECIPES)
def test_groups(name):
    golden = RECIPES[name]
    task = build(golden)
    if name == "mae/probe_vim":
        task.model_name = "vim_base_patch16_224"
        del task.model_args["pool_scale"]
    task._trainer = Trainer(task.lr_batch)
    task.configure_model()
    optimizer = task.make_optimizer()
    assert isinstance(optimizer, getattr(optim, golden["optimizer"]))
    for option, value in golden["defaults"].items():
        assert optimizer.defaults[option] == (tuple(value) if isinstance(value, list) else value)

    names = {parameter: name for name, parameter in task.model.named_parameters()}
    scales, decays = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(parameter)
            filled = torch.ones_like(parameter, dtype=torch.float64)
            scales[name] = group.get("lr_scale", 1.0) * filled
            decays[name] = group["weight_decay"] * filled
    assert not any(parameter.requires_grad for parameter in names)
    found = published(scales), published(decays)
    wanted = {re.sub(r"^head\.1\.", "head.", n): pair for n, pair in golden["parameters"].items()}
    assert {name: [found[0][name], found[1][name]] for name in found[0]} == {
        name: pytest.approx(pair, rel=1e-12, abs=0) for name, pair in wanted.items()
    }
