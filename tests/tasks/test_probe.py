"""The linear probe: what is frozen, what is trained, what is exported."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from harness import MODEL_ARGS, trainer
from torch.optim import SGD

from fastvim.errors import UserError
from fastvim.models import create_model
from fastvim.tasks import LinearProbe
from fastvim.weights import save

MODEL = "fastvim_tiny_patch16_224"


def task(model: str = MODEL, **settings) -> LinearProbe:
    defaults = {"model_args": {**MODEL_ARGS, "drop_path_rate": 0.5}, "warmup_epochs": 0}
    return LinearProbe(model, **{**defaults, **settings})


class Steps(L.Callback):
    """The head's weights before every step, its gradients, and the modes of the modules."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.modes: set[tuple[bool, bool]] = set()

    def on_train_batch_start(self, trainer, pl_module, *args) -> None:
        if not self.weights:
            self.start = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        head = dict(pl_module.head.named_parameters())
        self.weights.append({name: weight.detach().clone() for name, weight in head.items()})
        self.gradients.append({name: weight.grad.clone() for name, weight in head.items()})
        backbone = any(module.training for module in pl_module.model.modules())
        self.modes.add((backbone, pl_module.norm.training))


def test_only_the_head_is_trained(tmp_path, data):
    probe, steps = task(), Steps()
    fit = trainer(tmp_path, steps, max_epochs=2)
    fit.fit(probe, datamodule=data)
    (optimizer,) = fit.optimizers
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert {id(weight) for weight in trained} == {id(weight) for weight in probe.head.parameters()}
    assert steps.modes == {(False, True)}  # after a validation too
    for name, weight in probe.state_dict().items():
        moved = name.startswith(("norm.", "model.head."))
        assert torch.equal(weight, steps.start[name]) != moved, name


def test_the_optimiser_is_the_published_one(tmp_path, data):
    probe, steps = task(lr=3.2), Steps()
    fit = trainer(tmp_path, steps, limit_train_batches=4)
    fit.fit(probe, datamodule=data)
    assert isinstance(fit.optimizers[0], SGD)
    assert probe.peak_lr == 3.2 * 8 / 256

    deviation = steps.weights[0]["weight"].std().item()
    assert deviation == pytest.approx(0.01, rel=0.3)  # truncated far beyond this deviation
    momentum = {"weight": 0.0, "bias": 0.0}
    for step in range(3):
        rate = probe.peak_lr * (1 + math.cos(math.pi * step / 4)) / 2
        for name, gradient in steps.gradients[step].items():
            weight = steps.weights[step][name]
            momentum[name] = 0.9 * momentum[name] + gradient
            expected = weight - rate * momentum[name]
            torch.testing.assert_close(steps.weights[step + 1][name], expected)


def test_what_is_written_is_an_ordinary_classifier(tmp_path, data):
    probe = task(lr=100.0)
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(probe, datamodule=data)
    classifier = create_model(MODEL, **MODEL_ARGS, num_classes=6)
    classifier.load_state_dict(probe.exported_weights())
    images = torch.randn(5, 3, 32, 32)
    probe.eval()
    assert probe.norm.running_var.std() > 0
    torch.testing.assert_close(classifier.eval()(images), probe(images), rtol=1e-4, atol=1e-5)

    file = tmp_path / "model.safetensors"
    save(file, probe.exported_weights(), {})
    before = fit.callback_metrics["val/acc1"]
    evaluation = trainer(tmp_path)
    evaluation.validate(task(checkpoint=str(file)), datamodule=data, verbose=False)
    assert evaluation.callback_metrics["val/acc1"] == before


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (MODEL, {"model_args": {**MODEL_ARGS, "global_pool": "max_logit"}}, "are not pooled"),
        (
            "levit_128s",
            {"model_args": {}},
            "levit_128s cannot be probed: its head is not one linear",
        ),
    ],
)
def test_not_every_model_can_be_probed(tmp_path, data, model, settings, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(task(model, **settings), datamodule=data)
