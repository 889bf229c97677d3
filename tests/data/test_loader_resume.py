"""A run interrupted anywhere and resumed sees the same batches as a whole run, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fastvim.data.images import ImageData

BATCH = 2
PER_EPOCH = 6  # 12 images

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Probe(L.LightningModule):
    """Learns a little, and keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3 * 8 * 8, 3)
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, targets = batch
        self.seen.append((batch_idx, images.clone(), targets.clone()))
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), targets)

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        assert not self.layer.training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(
    root: Path, workers: int = 0, resume: Path | None = None, decode: str = "cpu", **settings: Any
) -> Probe:
    how = {"batch_size": BATCH, "num_workers": workers, "img_size": 8, "seed": 3}
    data = ImageData(str(root), decode=decode, **how)
    module = Probe()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": 3, "limit_val_batches": 0, **settings}
    checkpoints = "callbacks" in settings
    trainer = L.Trainer(accelerator="cpu", enable_checkpointing=checkpoints, **quiet, **settings)
    trainer.fit(module, data, ckpt_path=resume)
    return module


def assert_resumes(root: Path, folder: Path, saving: dict, workers: int, **settings: Any) -> None:
    """Resume from every checkpoint that a whole run saves, and compare with the whole run."""
    saver = ModelCheckpoint(folder, save_top_k=-1, **saving)
    whole = fit(root, workers, callbacks=[saver], **settings)
    checkpoints = sorted(folder.glob("*.ckpt"))
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints:
        state = torch.load(checkpoint, weights_only=False)
        progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        resumed = fit(root, workers, checkpoint, **settings)
        expected = whole.seen[progress["total"]["processed"] :]
        assert len(resumed.seen) == len(expected)
        torch.testing.assert_close(resumed.seen, expected, rtol=0, atol=0)
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.parametrize(("workers", "decode"), [(0, "cpu"), (2, "cpu"), (1, "gpu")])
def test_resumed_from_steps(image_root: Path, tmp_path: Path, workers: int, decode: str) -> None:
    # Steps 4, 8, 12, 16: two in the middle of an epoch, one at the end of one.
    assert_resumes(image_root, tmp_path, {"every_n_train_steps": 4}, workers, decode=decode)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("after_training", [True, False], ids=["epoch-end", "validation-end"])
def test_resumed_from_epochs(
    image_root: Path, tmp_path: Path, after_training: bool, workers: int
) -> None:
    saving = {"every_n_epochs": 1, "save_on_train_epoch_end": after_training}
    assert_resumes(image_root, tmp_path, saving, workers, limit_val_batches=2)


def test_resumed_from_validation_inside_an_epoch(image_root: Path, tmp_path: Path) -> None:
    saving = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    often = {"limit_val_batches": 2, "val_check_interval": 2, "max_epochs": 2}
    assert_resumes(image_root, tmp_path, saving, 0, **often)


@pytest.mark.parametrize(
    ("steps", "settings"),
    [(3, {"accumulate_grad_batches": 4}), (4, {"limit_train_batches": 5}), (6, {"max_steps": 14})],
    ids=["accumulate", "limit", "max-steps"],
)
def test_resumed_under_settings(
    image_root: Path, tmp_path: Path, steps: int, settings: dict
) -> None:
    assert_resumes(image_root, tmp_path, {"every_n_train_steps": steps}, 0, **settings)


def test_workers_change_nothing(image_root: Path) -> None:
    alone, helped = fit(image_root, 0), fit(image_root, 2)
    assert len(alone.seen) == 3 * PER_EPOCH
    torch.testing.assert_close(helped.seen, alone.seen, rtol=0, atol=0)
    epochs = [torch.stack([s[1] for s in alone.seen[i * 6 : i * 6 + 6]]) for i in range(3)]
    assert not torch.equal(epochs[0], epochs[1])


def test_a_loader_that_lightning_builds_again_finishes_its_batches(image_root: Path) -> None:
    ((_, images, _),) = fit(image_root, overfit_batches=1, max_epochs=1).seen
    assert images.dtype == torch.float32


def test_no_warning_of_an_inexact_resumption(image_root: Path, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    fit(image_root, callbacks=[saver], max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dataloader is not resumable")
        fit(image_root, resume=Path(saver.best_model_path), max_epochs=2)


def test_the_same_trainer_fits_again_from_its_next_epoch(image_root: Path) -> None:
    whole = fit(image_root, max_epochs=2)
    data = ImageData(str(image_root), batch_size=BATCH, num_workers=0, img_size=8, seed=3)
    module = Probe()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    torch.testing.assert_close(module.seen, whole.seen, rtol=0, atol=0)
