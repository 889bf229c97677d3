"""How fast a run trains, and what it says of a slow loader."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest
import torch
from harness import MODEL_ARGS, trainer
from rich.console import Console

from fastvim.data.sampler import Seeded
from fastvim.tasks import Classification
from fastvim.tasks.callbacks import pace as module
from fastvim.tasks.callbacks.pace import FIRST, WINDOW, Pace
from fastvim.tasks.callbacks.run_log import RunLog


class Run:
    """A run of batches of 32 on two processes, by a clock of its own; 0.1 s a batch."""

    def __init__(self, monkeypatch, workers: int = 4, device: str = "cuda") -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "cores", lambda: 16)
        self.loader = SimpleNamespace(waited=0.0, num_workers=workers)
        self.trainer = SimpleNamespace(
            datamodule=SimpleNamespace(batch_size=32),
            train_dataloader=self.loader,
            strategy=SimpleNamespace(root_device=torch.device(device)),
            world_size=2,
            num_devices=2,
            is_global_zero=True,
            is_last_batch=False,
        )
        self.pace = Pace()
        self.pace.on_train_epoch_start(self.trainer, None)

    def batches(self, count: int, waited: float) -> None:
        for _ in range(count):
            self.now += 0.1
            self.loader.waited += waited
            self.pace.on_train_batch_end(self.trainer)


def test_the_last_batches_count_and_validations_do_not(monkeypatch):
    run = Run(monkeypatch)
    run.batches(FIRST - 1, waited=0.1)
    assert run.pace.describe() == ""
    run.batches(WINDOW, waited=0.01)
    run.pace.on_validation_start(run.trainer, None)
    run.now += 1000
    run.pace.on_validation_end(run.trainer, None)
    run.batches(WINDOW // 2, waited=0.03)
    assert run.pace.rate == pytest.approx(640)
    assert run.pace.waiting == pytest.approx(0.2)
    assert run.pace.describe() == "   640 images/s, waiting 20 %"


@pytest.mark.parametrize(
    ("workers", "advice"),
    [(4, "data.num_workers 8 would use all cores"), (8, "smaller files or more cores would help")],
)
def test_a_gpu_that_waits_is_told_once(monkeypatch, caplog, workers, advice):
    run = Run(monkeypatch, workers)
    run.batches(FIRST + WINDOW - 1, waited=0.05)
    assert not caplog.records  # the window is not full
    run.batches(3 * WINDOW, waited=0.05)
    (record,) = caplog.records
    assert record.getMessage() == (
        "50 % of the time the training waits for images (640 images/s): "
        f"{workers} processes load them, and there are 8 cores for each GPU; {advice}"
    )


@pytest.mark.parametrize(("device", "waited"), [("cpu", 0.05), ("cuda", 0.01)])
def test_nothing_is_said_on_a_cpu_or_of_short_waits(monkeypatch, caplog, device, waited):
    Run(monkeypatch, device=device).batches(3 * WINDOW, waited)
    assert not caplog.records


def test_a_loader_that_does_not_tell(monkeypatch, caplog):
    run = Run(monkeypatch)
    run.trainer.train_dataloader = object()
    run.batches(2 * WINDOW, waited=0.05)
    assert run.pace.describe() == "   640 images/s"
    assert not caplog.records


def test_a_slow_loader(data, tmp_path, monkeypatch, caplog):
    read = Seeded.__getitem__

    def slowly(self, key):
        time.sleep(0.02)
        return read(self, key)

    monkeypatch.setattr(Seeded, "__getitem__", slowly)
    monkeypatch.setattr(module, "FIRST", 1)
    monkeypatch.setattr(module, "WINDOW", 4)
    monkeypatch.setattr(Pace, "devices", ("cpu",))
    pace, output = Pace(), io.StringIO()
    log = RunLog(Console(file=output, width=200), pace)
    task = Classification("fastvim_tiny_patch16_224", MODEL_ARGS, warmup_epochs=0)
    short = {"limit_train_batches": 7, "limit_val_batches": 0}
    trainer(tmp_path, pace, log, **short).fit(task, datamodule=data)
    assert pace.waiting > 0.2
    assert 0 < pace.rate < 50  # 20 ms an image
    assert [r.name for r in caplog.records].count(module.__name__) == 1
    assert " images/s, waiting " in output.getvalue()
