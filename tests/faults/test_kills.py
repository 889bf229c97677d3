"""SIGKILL at drawn moments: what was written is whole, and the same command ends as if unharmed.

Half of the kills hit training runs, one after the other, each resumed by the next: while they
train, validate, write checkpoints or export weights. The others hit commands that write.
`make test-faults` runs all draws.
"""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from fuzzing import groups
from small import COMMANDS, Small, fresh, half_written
from tally import Tally

IN_A_ROW = 5  # kills of one training run
RUNS, RUNS_IN_ALL = 32, 1  # of IN_A_ROW kills each
KILLS, KILLS_IN_ALL = 160, 4  # of other commands


def killed(small: Small, command: str, folder: Path, seconds: float) -> list[str]:
    """Kill a command after some seconds; what is wrong then."""
    ended = small.warm.run(*small.words(command), cwd=folder, seconds=seconds)
    if ended.code == 0:  # it was faster
        return half_written(folder)
    unexpected = [] if ended.code == -signal.SIGKILL else [f"{ended}"]
    return [*unexpected, *half_written(folder)]


@pytest.mark.parametrize("seeds", groups(RUNS, RUNS_IN_ALL, size=1))
def test_training_runs(seeds, small, record_property):
    tally, seconds = Tally(), small.unharmed("fit")[0]
    for seed in seeds:
        generator = np.random.default_rng(seed)
        folder = fresh(small.folder / "killed" / "fit")
        problems: list[str] = []
        for number in range(IN_A_ROW):
            # A resumed run has less to do, and its end is of interest too.
            problems += killed(small, "fit", folder, seconds * generator.uniform(0.2, 0.9))
            if number < IN_A_ROW - 1:
                tally.count("fit killed", seed, problems)
                problems = []
        tally.count("fit killed", seed, problems + small.ends_well("fit", folder))
    tally.record(record_property)


@pytest.mark.parametrize("seeds", groups(KILLS, KILLS_IN_ALL, size=4))
def test_commands(seeds, small, record_property):
    tally = Tally()
    for seed in seeds:
        generator = np.random.default_rng(seed)
        command = COMMANDS[seed % len(COMMANDS)]
        seconds, _ = small.unharmed(command)
        folder = fresh(small.folder / "killed" / command)
        problems = killed(small, command, folder, seconds * generator.uniform(0.3, 1.0))
        problems += small.ends_well(command, folder)
        tally.count(f"{command} killed", seed, problems)
    tally.record(record_property)
