"""A run that was killed and resumed ends with the very weights of one left alone."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from harness import PRETRAINING, PROBE, fit, last
from safetensors.torch import load_file

from fastvim.tasks.callbacks.checkpointing import AtomicCheckpointIO
from fastvim.tasks.callbacks.curves import join
from fastvim_cli import main


def stop(kind: str, **init_args) -> dict:
    return {"trainer.callbacks": [{"class_path": f"stops.{kind}", "init_args": init_args}]}


def assert_same_training_state(one: dict, other: dict) -> None:
    """Trained and averaged weights, optimiser, schedule and counters, bit for bit."""
    assert one.keys() == other.keys()
    tensors = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "probe")
    for key in one.keys() & set(tensors):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
    assert one["lr_schedulers"] == other["lr_schedulers"]
    assert (one["epoch"], one["global_step"]) == (other["epoch"], other["global_step"])


CHANNELS = {
    "model.init_args.model": "fastchannelvim_small_patch16_224",
    "model.init_args.model_args.in_chans": 3,
    "model.init_args.sample_channels": True,
    "model.init_args.weight_decay_end": 0.4,
}


@pytest.mark.parametrize(
    "task",
    [{}, {"model": PRETRAINING}, CHANNELS],
    ids=["classifier", "autoencoder", "channels"],
)
def test_killed_twice_and_resumed(write_recipe, task):
    whole = write_recipe(task, name="whole")
    assert main(["fit", "--config", str(whole)]) == 0

    # The first kill is in the middle of an epoch and of an accumulation, the second in a
    # validation, before the epoch's checkpoint.
    killed = write_recipe({**task, **stop("KillAt", batch=7)}, name="killed")
    assert fit(killed) == -signal.SIGKILL
    assert last(killed)["global_step"] == 2
    write_recipe({**task, **stop("KillAt", batch=20, validation=True)}, name="killed")
    assert fit(killed, "--ckpt_path", "last") == -signal.SIGKILL
    assert last(killed)["global_step"] == 10
    write_recipe(task, name="killed")
    assert main(["fit", "--config", str(killed), "--ckpt_path", "last"]) == 0

    assert_same_training_state(last(whole), last(killed))
    assert (killed.with_suffix("") / "curves.png").exists()
    one, other = (load_file(run.with_suffix("") / "model.safetensors") for run in (whole, killed))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_logs_of_all_starts_are_joined():
    def rows(*steps: int, loss: float) -> list[dict[str, float]]:
        return [{"step": step, "train/loss": loss} for step in steps]

    # The second start went on after step 4 and did the steps 5 and 6 again.
    joined = join([rows(2, 4, 5, 6, loss=1), [], rows(5, 6, 7, 8, loss=2)])
    assert [(row["step"], row["train/loss"]) for row in joined] == [
        (2, 1),
        (4, 1),
        (5, 2),
        (6, 2),
        (7, 2),
        (8, 2),
    ]


@pytest.mark.parametrize(("accumulate", "batches"), [(1, (11, 12)), (3, (5, 14))])
def test_resumes_from_any_batch(write_recipe, accumulate, batches):
    """In the middle of an epoch, at its last batch, and between the batches of one step."""
    changes = {
        "trainer.accumulate_grad_batches": accumulate,
        "trainer.max_epochs": 2,
        "checkpoint_every_n_steps": 3,
    }
    whole = write_recipe(changes, name="whole")
    assert main(["fit", "--config", str(whole)]) == 0
    for batch in batches:
        name = f"stopped{batch}"
        stopped = write_recipe({**changes, **stop("StopAt", batch=batch)}, name=name)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            main(["fit", "--config", str(stopped)])
        write_recipe(changes, name=name)
        assert main(["fit", "--config", str(stopped), "--ckpt_path", "last"]) == 0
        assert_same_training_state(last(whole), last(stopped))


def test_a_probe_resumes_with_what_is_folded_into_its_weights(write_recipe):
    whole = write_recipe({"model": PROBE}, name="whole")
    assert main(["fit", "--config", str(whole)]) == 0
    stopped = write_recipe({"model": PROBE, **stop("StopAt", batch=7)}, name="stopped")
    with pytest.raises(RuntimeError, match="stopped by the test"):
        main(["fit", "--config", str(stopped)])
    write_recipe({"model": PROBE}, name="stopped")
    assert main(["fit", "--config", str(stopped), "--ckpt_path", "last"]) == 0
    assert_same_training_state(last(whole), last(stopped))


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": torch.tensor(1)}, path)

    def half(checkpoint, file):
        Path(file).write_bytes(b"half a file")
        raise OSError("killed")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="killed"):
        io.save_checkpoint({"step": torch.tensor(2)}, path)
    assert io.load_checkpoint(path) == {"step": torch.tensor(1)}
