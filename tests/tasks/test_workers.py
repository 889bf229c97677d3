"""A worker of a loader that dies or hangs is one line, in time."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from harness import PROCESSES

from fastvim_cli import main

TIMEOUT = {"SIGKILL": 80, "SIGSTOP": 15}  # longer than a worker takes to start on a busy machine
KILLED = r"(a worker of the loader was lost|worker 0 of .* was killed \(SIGKILL\))"
STOPPED = rf"worker 0 of the loader \(process \d+\) is stopped: no batch for {TIMEOUT['SIGSTOP']} s"


def fit(config: Path, file: Path) -> None:
    """Run the command line with its errors in a file."""
    with file.open("w") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    sys.exit(main(["fit", "--config", str(config)]))


@pytest.mark.slow
@pytest.mark.parametrize("role", ["train", "val"])
@pytest.mark.parametrize(("name", "message"), [("SIGKILL", KILLED), ("SIGSTOP", STOPPED)])
def test_a_lost_worker_is_named(write_recipe, image_folder, tmp_path, name, message, role):
    data = {"root": str(image_folder), "img_size": 32, "batch_size": 8, "num_workers": 1}
    lost = {"name": name, "role": role, "timeout": TIMEOUT[name]}
    changes = {
        "data.class_path": "lost_workers.SignalledData",
        "data.init_args": {**data, **lost},
        "trainer.num_sanity_val_steps": 0,
        "model.init_args.ema_decay": None,
    }
    errors = tmp_path / "errors"
    # A process of its own: where it is as its worker dies, an exception arises.
    process = PROCESSES.Process(target=fit, args=(write_recipe(changes), errors))
    process.start()
    process.join(90)
    assert process.exitcode == 1, "it hangs, or ended otherwise"
    assert re.fullmatch(f"fastvim: error: {message}.*\n", errors.read_text()), errors.read_text()


def test_no_limit_is_an_option(write_recipe):
    changes = {"data.init_args.num_workers": 1, "data.init_args.timeout": 0}
    changes |= {"trainer.max_epochs": 1, "model.init_args.warmup_epochs": 0}
    assert main(["fit", "--config", str(write_recipe(changes))]) == 0
