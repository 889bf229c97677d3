"""Any words after `fastvim` end in an answer or in one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_sets import Scene, command_line
from damaged_sets import command_on_damaged
from fuzzing import Warm

DRAWS, IN_ALL_RUNS = 1000, 40  # of command lines, and of files
SEEDS = [
    pytest.param(seed, marks=[] if seed < IN_ALL_RUNS else pytest.mark.faults)
    for seed in range(DRAWS)
]


@pytest.fixture(scope="session")
def scene(tmp_path_factory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene") / "sound")


def expect_an_end(warm: Warm, words: list[str], folder: Path) -> None:
    ended = warm.run(*words, cwd=folder)
    assert not ended.problems, f"fastvim {words}\n{ended}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_command_line_ends_well(seed, scene, warm, tmp_path):
    expect_an_end(warm, command_line(seed, scene), tmp_path)


@pytest.mark.parametrize("seed", SEEDS)
def test_odd_and_damaged_files_end_well(seed, scene, warm, tmp_path):
    expect_an_end(warm, command_on_damaged(seed, scene, tmp_path), tmp_path)
