"""Tasks that train through captured graphs: the same weights as without."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from harness import DECODER, MODEL_ARGS, trainer

import fastvim.tasks.task as task_module
from fastvim.tasks import Classification, LinearProbe, Pretraining, Segmentation, Task
from fastvim.tasks.callbacks.run_log import SeedSteps

DROP = {"drop_path_rate": 0.5}


def classification(**settings) -> Classification:
    name, args = "fastvim_tiny_patch16_224", {**MODEL_ARGS, **DROP}
    return Classification(name, args, warmup_epochs=0, lr=0.05, ema_decay=0.9, **settings)


def pretraining(**settings) -> Pretraining:
    name, args = "mae_fastvim_tiny_patch16_224", {**MODEL_ARGS, **DECODER, **DROP}
    options = {"warmup_epochs": 0, "lr": 0.02, "pictures_every_n_epochs": None}
    return Pretraining(name, args, **options, **settings)


class Captured(L.Callback):
    """Whether the last batch was a replay."""

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.last = pl_module._captured is not None and pl_module._captured.__self__.captured


def fit(task: Task, folder, data, device: str, **settings) -> tuple[list[torch.Tensor], bool]:
    """The weights after an epoch from the same initial ones; whether its steps were captured."""
    torch.manual_seed(0)
    captured = Captured()
    callbacks = (SeedSteps(3), captured)
    trainer(folder, *callbacks, accelerator=device, devices=1, **settings).fit(task, data)
    assert task._captured is None
    return [parameter.detach().cpu() for parameter in task.parameters()], captured.last


@pytest.mark.parametrize("make", [classification, pretraining])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
        {"strategy": "ddp", "max_epochs": 2},
    ],
    ids=["plain", "amp", "ddp"],
)
def test_weights_are_those_without_capture(tmp_path, data, device, make, settings):
    task, twin = make(), make(capture=False)
    ours, captured = fit(task, tmp_path / "ours", data, device, **settings)
    expected, without = fit(twin, tmp_path / "expected", data, device, **settings)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert captured == (device == "cuda")
    assert not without
    assert task.state_dict().keys() == twin.state_dict().keys()


@pytest.mark.gpu
def test_recomputed_blocks_are_not_captured(tmp_path, data):
    _, captured = fit(classification(grad_checkpointing=True), tmp_path, data, "cuda")
    assert not captured


def test_a_forward_of_its_own_is_trained(tmp_path, data, device):
    """A probe normalises the features: it does not call the model as a whole."""
    task = LinearProbe("fastvim_tiny_patch16_224", MODEL_ARGS, warmup_epochs=0)
    _, captured = fit(task, tmp_path, data, device)
    assert not captured
    assert task.norm.num_batches_tracked == 12


class Random(L.LightningDataModule):
    """Images of random numbers, with random classes of their pixels."""

    batch_size, num_classes, class_names = 4, 3, ("a", "b", "c")

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(24, 3, 32, 32, generator=generator)
        classes = torch.randint(3, (24, 32, 32), generator=generator)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, classes), 4)


@pytest.mark.gpu
def test_segmentation(tmp_path):
    """To a tolerance: gradients of its interpolations are sums without an order on a GPU."""

    def task(**settings) -> Segmentation:
        sizes = {"channels": 24, "aux_channels": 12, "out_indices": (0, 1), "window": 32}
        return Segmentation(
            "fastvim_tiny_patch16_224",
            {**MODEL_ARGS, "norm": "layer"},
            lr=1e-3,
            warmup_steps=0,
            stride=16,
            **sizes,
            **settings,
        )

    ours, expected = task(), task(capture=False)
    mine, captured = fit(ours, tmp_path / "ours", Random(), "cuda")
    theirs, _ = fit(expected, tmp_path / "expected", Random(), "cuda")
    assert captured
    moved = sum((a - b).norm() for a, b in zip(mine, theirs, strict=True))
    assert moved < 0.02 * sum(b.norm() for b in theirs)
    counts = [
        buffer.item()
        for name, buffer in ours.named_buffers()
        if name.endswith("num_batches_tracked")
    ]
    assert set(counts) == {6}


class OnGPU:
    """Stands for images."""

    is_cuda = True


@pytest.mark.parametrize("captured", [True, False])
def test_kernels_are_compiled_before_the_first_call_of_each_kind(captured, monkeypatch):
    seen = []
    monkeypatch.setattr(task_module, "compile_for", lambda model, images: seen.append(model.mode))

    class Model:
        mode, training = "training", True

        def __call__(self, images: object, **options: object) -> str:
            return "eager"

    task = SimpleNamespace(model=Model(), _captured=None, _compiled=set())
    if captured:
        task._captured = lambda images: "captured"
    expected = "captured" if captured else "eager"
    for _ in range(2):
        assert Task.call_model(task, OnGPU()) == expected
    assert seen == ([] if captured else ["training"])  # a capture does so itself
    task.model.mode, task.model.training = "evaluation", False
    assert Task.call_model(task, OnGPU(), generator=None) == "eager"
    assert Task.call_model(task, OnGPU()) == expected
    assert seen[-1:] == ["evaluation"]
    assert seen.count("evaluation") == 1
