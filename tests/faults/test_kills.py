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
from small import Small, fresh, half_written, result
from tally import Tally

COMMANDS = ("predict", "reconstruct", "segment", "detect", "convert", "check")
IN_A_ROW = 5  # kills of one training run
RUNS, RUNS_IN_ALL = 32, 1  # of IN_A_ROW kills each
KILLS, KILLS_IN_ALL = 160, 8  # of other commands


@pytest.fixture(scope="module")
def unharmed(small: Small) -> dict[str, tuple[float, dict]]:
    """Seconds and result of each command without a kill."""
    found = {}
    for command in ("fit", *COMMANDS):
        folder = fresh(small.folder / "unharmed" / command)
        ended = small.warm.run(*small.words(command), cwd=folder)
        assert ended.code == 0, ended
        found[command] = ended.seconds, result(command, folder)
    return found


def killed(small: Small, command: str, folder: Path, seconds: float) -> list[str]:
    """Kill a command after some seconds; what is wrong then."""
    ended = small.warm.run(*small.words(command), cwd=folder, seconds=seconds)
    if ended.code == 0:  # it was faster
        return half_written(folder)
    unexpected = [] if ended.code == -signal.SIGKILL else [f"{ended}"]
    return [*unexpected, *half_written(folder)]


def ends_well(small: Small, command: str, folder: Path, expected: dict) -> list[str]:
    """Run the command to its end; what is not as without a kill."""
    ended = small.warm.run(*small.words(command), cwd=folder)
    if ended.code != 0:
        return [f"code {ended.code}: {ended.stderr[-300:]}"]
    problems = half_written(folder)
    found = result(command, folder)
    if found != expected:
        names = [name for name in expected.keys() | found if expected.get(name) != found.get(name)]
        problems.append(f"other results: {', '.join(sorted(names)[:5])}")
    return problems + [f"{file.name} is left" for file in folder.rglob("*.part")]


@pytest.mark.parametrize("seeds", groups(RUNS, RUNS_IN_ALL, size=1))
def test_training_runs(seeds, small, unharmed, record_property):
    tally, (seconds, expected) = Tally(), unharmed["fit"]
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
        tally.count("fit killed", seed, problems + ends_well(small, "fit", folder, expected))
    tally.record(record_property)


@pytest.mark.parametrize("seeds", groups(KILLS, KILLS_IN_ALL, size=4))
def test_commands(seeds, small, unharmed, record_property):
    tally = Tally()
    for seed in seeds:
        generator = np.random.default_rng(seed)
        command = COMMANDS[seed % len(COMMANDS)]
        seconds, expected = unharmed[command]
        folder = fresh(small.folder / "killed" / command)
        problems = killed(small, command, folder, seconds * generator.uniform(0.3, 1.0))
        problems += ends_well(small, command, folder, expected)
        tally.count(f"{command} killed", seed, problems)
    tally.record(record_property)
