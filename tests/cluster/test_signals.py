"""Runs that a signal ends lose nothing, and go on with the very weights of one left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from harness import assert_same_training_state, last, recipe_writer
from processes import environments, start, wait_until

from fastvim.tasks.cluster.signals import REQUEUE, Signals


def callback(kind: str, **arguments) -> dict:
    return {"class_path": f"stops.{kind}", "init_args": arguments}


def run(write_recipe, name: str, *callbacks: dict, **changes) -> Path:
    settings = {"trainer.logger": False, "trainer.callbacks": list(callbacks)}
    return write_recipe({**settings, "trainer.max_epochs": 2, **changes}, name)


def finish(config: Path, *arguments: str, **options) -> list[int]:
    runs = start(config, *arguments, **options)
    codes = [each.end() for each in runs]
    return codes


def step_of(config: Path) -> int:
    file = config.with_suffix("") / "checkpoints" / "last.ckpt"
    return last(config)["global_step"] if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "validation", "step"),
    [
        # In the middle of a step: after the whole of it.
        pytest.param(3, False, 2, marks=pytest.mark.cluster),
        # At an epoch's last batch: its validation is to do.
        pytest.param(12, False, 6, marks=pytest.mark.cluster),
        (12, True, 6),  # in its validation, with the averages in place of the weights
    ],
)
def test_nothing_is_lost(write_recipe, batch, validation, step):
    """What a signal ends goes on bit for bit, with the numbers of its validation."""
    whole = run(write_recipe, "whole")
    assert finish(whole) == [0]
    sent = callback("SignalAt", signal=int(signal.SIGTERM), batch=batch, validation=validation)
    config = run(write_recipe, "run", sent, checkpoint_every_n_steps=None)
    (ended,) = start(config)
    assert ended.end() == 143
    assert step_of(config) == step
    where = "checkpoints/last.ckpt"
    assert ended.errors()[-1].endswith(
        f"{where} holds step {step}: start all again with --ckpt_path last"
    )
    resumed = run(write_recipe, "run", checkpoint_every_n_steps=None)
    assert finish(resumed, "--ckpt_path=last") == [0]
    assert_same_training_state(last(whole), last(config))
    best = [
        torch.load(each.with_suffix("") / "checkpoints/best.ckpt", weights_only=True)
        for each in (whole, config)
    ]
    assert best[0]["global_step"] == best[1]["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "both"),
    [
        pytest.param(1, False, marks=pytest.mark.cluster),
        pytest.param(1, True, marks=pytest.mark.cluster),
        pytest.param(2, False, marks=pytest.mark.cluster),
        (2, True),
    ],
)
def test_a_job_of_slurm_is_put_back_and_goes_on(write_recipe, slurm, processes, both):
    slow = callback("Slow", seconds=0.1)
    config = run(write_recipe, "run", slow, **{"trainer.max_epochs": 9})
    runs = start(config, f"--trainer.devices={processes}", processes=processes, slurm=slurm)
    wait_until((config.with_suffix("") / "checkpoints" / "last.ckpt").exists)
    for each in runs:
        each.signal(signal.SIGUSR1)
    for each in runs if both else ():
        each.signal(signal.SIGTERM)
    assert [each.end(60) for each in runs] == [143] * processes
    assert (slurm / "asked").read_text() == "requeue 41\n"
    (line,) = [line for each in runs for line in each.errors()]
    step = step_of(config)
    assert "; SLURM starts the job again; " in line
    assert f"holds step {step}" in line
    again = run(write_recipe, "run", **{"trainer.max_epochs": 1 + 6 * processes})
    words = (f"--trainer.devices={processes}", f"--trainer.max_steps={step + 2}")
    ended = start(again, *words, processes=processes, slurm=slurm)
    assert [each.end() for each in ended] == [0] * processes
    assert f"resumed after {step:,}\n" in ended[0].text()
    assert step_of(config) == step + 2


DRAWS = int(os.environ.get("FASTVIM_DRAWS", "5"))  # of each kind
KINDS = {
    "SIGTERM": [signal.SIGTERM],
    "SIGUSR1": [signal.SIGUSR1],
    "both": [signal.SIGUSR1, signal.SIGTERM],
}


@pytest.mark.cluster
def test_signals_change_nothing_once_the_run_ends(write_recipe, slurm):
    """Nor while Python itself ends."""
    config = run(write_recipe, "run", callback("SignalAt", signal=int(signal.SIGUSR1), batch=4))
    paths = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    (variables,) = environments(1, slurm=slurm, PYTHONPATH=paths)
    words = [sys.executable, "-m", "fastvim_cli", "fit", "--config", str(config)]
    with subprocess.Popen(words, env={**os.environ, **variables}) as ended:
        wait_until((slurm / "asked").exists)
        while ended.poll() is None:
            ended.send_signal(signal.SIGTERM)
            time.sleep(0.005)
    assert ended.returncode == 143


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, image_folder):
    """The last checkpoint of a run of four epochs in some processes, which nothing ends."""

    @cache
    def train(processes: int) -> dict:
        write = recipe_writer(tmp_path_factory.mktemp("whole"), image_folder)
        whole = run(write, "whole", **{"trainer.max_epochs": 4})
        options = (f"--trainer.devices={processes}",)
        assert finish(whole, *options, processes=processes) == [0] * processes
        return last(whole)

    return train


@pytest.mark.cluster
@pytest.mark.parametrize("draw", range(DRAWS))
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_signals_at_any_moment(write_recipe, slurm, left_alone, kind, processes, draw):
    """In steps and validations: ended, nothing lost, and the job goes on to the same weights."""
    chance = random.Random(f"{kind} {processes} {draw}")
    options = (f"--trainer.devices={processes}",)
    slow = callback("Slow", seconds=0.1)
    config = run(write_recipe, "run", slow, **{"trainer.max_epochs": 4})
    runs = start(config, *options, processes=processes, slurm=slurm)
    wait_until(lambda: "parameters" in runs[0].text())
    time.sleep(chance.uniform(0, 4))
    for number in KINDS[kind]:
        for each in runs:
            each.signal(number)
        time.sleep(chance.uniform(0, 0.5))
    codes = [each.end(60) for each in runs]
    assert codes in ([143] * processes, [0] * processes)  # or it had ended
    stopped = codes[0] == 143
    assert (slurm / "asked").exists() == (stopped and kind != "SIGTERM")
    resumed = run(write_recipe, "run", **{"trainer.max_epochs": 4})
    words = ("--ckpt_path=last",) if kind == "SIGTERM" else ()
    if stopped:
        ended = start(resumed, *options, *words, processes=processes, slurm=slurm)
        assert [each.end() for each in ended] == [0] * processes
    assert_same_training_state(left_alone(processes), last(config))


def test_what_a_signal_does(monkeypatch):
    """It is noted, and a second one ends the process, but what a launcher or SLURM sends along."""
    ended, now = [], [0.0]
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    signals = Signals()
    signals.saving = True
    for seconds, number, reason in (
        (0.0, signal.SIGUSR1, REQUEUE),
        (30.0, signal.SIGTERM, REQUEUE),
        (30.9, signal.SIGTERM, REQUEUE),  # the launcher has passed it on
    ):
        now[0] = seconds
        signals._note(number, None)
        assert (signals.reason, ended) == (reason, [])
    now[0] = 31.5
    signals._note(signal.SIGINT, None)
    assert ended == [130]
    signals._note(signal.SIGTERM, None)
    assert ended == [130, 143]
    signals.over = True
    signals._note(signal.SIGTERM, None)
    assert ended == [130, 143]


def test_the_handlers_are_given_back_or_ignore():
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    signals.install()
    signals.ignore()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.cluster
def test_a_second_signal_ends_at_once(write_recipe):
    """In a step that takes long the first one waits for its end."""
    slow = callback("Slow", seconds=60)
    config = run(write_recipe, "run", slow, **{"trainer.num_sanity_val_steps": 0})
    (ended,) = start(config)
    wait_until(lambda: " 12 steps" in ended.text())
    time.sleep(2)  # until it is in the first step
    ended.signal(signal.SIGTERM, gap=1.5)
    ended.signal(signal.SIGTERM)
    assert ended.end(30) == 143
    assert step_of(config) == 0
