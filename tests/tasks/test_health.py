"""What is not finite stops the run at its step, and the module is named by running again."""

from __future__ import annotations

import pytest
import torch
from harness import MODEL_ARGS, last, trainer
from stops import Poison

from fastvim.errors import UserError
from fastvim.tasks import Classification
from fastvim.tasks.callbacks.health import Finite, _health, _parts
from fastvim_cli import main

POISONS = {
    "loss": "the loss is not finite at step 9",
    "gradient": "a gradient is not finite at step 9",
    "module": "the loss is not finite at step 8",  # of the first of two batches
    "weight": "a weight is not finite at step 9",
}
NAMED = {
    "gradient": "the gradient of model.head.bias is not finite, though the loss is",
    "module": "the result of model.blocks.1.mixer.in_proj (Linear) is not finite (after 8",
    "weight": "model.head.bias is not finite after the update, though its gradient is",
}


@pytest.mark.parametrize("poison", POISONS)
def test_the_run_stops_at_the_first_step(write_recipe, poison, capsys):
    # 6 steps an epoch, a checkpoint every 2: the damage is in the second epoch.
    changes = {"trainer.callbacks": [{"class_path": "stops.Poison", "init_args": {"what": poison}}]}
    config = write_recipe(changes)
    assert main(["fit", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastvim: error: {POISONS[poison]} (epoch 1"), error
    assert error.count("\n") == 1
    assert "checkpoints/last.ckpt" in error
    assert "with --ckpt_path last --name_modules true names the module" in error
    saved = last(config)
    assert saved["global_step"] == 8
    assert all(weight.isfinite().all() for weight in saved["current_model_state"].values())
    if poison in NAMED:
        again = ["--ckpt_path", "last", "--name_modules", "true"]
        assert main(["fit", "--config", str(config), *again]) == 2
        assert NAMED[poison] in capsys.readouterr().err


def test_read_late_it_is_the_same_step(tmp_path, data, device):
    """On a GPU the steps are replayed and the flags read at the end of the epoch."""
    args = {**MODEL_ARGS, "drop_path_rate": 0.2}
    task = Classification("fastvim_tiny_patch16_224", args, warmup_epochs=0, ema_decay=None)
    run = trainer(tmp_path, Poison("gradient"), Finite(), accelerator=device, devices=1)
    with pytest.raises(UserError, match=r"^a gradient is not finite at step 9 .* batch 8\)"):
        run.fit(task, data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(device, value):
    tensors = [torch.randn(5, device=device), torch.randn(70000, device=device).double(), None]
    tensors += [torch.zeros(0, device=device), torch.ones(3, dtype=torch.int64, device=device)]
    before = [None if each is None else each.clone() for each in tensors]
    assert _health(_parts(tensors)) == 0
    assert all(a is b or torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    tensors[1][40000] = value
    assert not _health(_parts(tensors)).isfinite()
    assert _health(_parts([None])) is None
