"""No mistake in the data is learned in silence: drawn sets with one planted fault, and sound ones.

`fastvim data check` must name the fault, and `fastvim fit` must stop before its first step or warn
and go on. Of sound sets, odd but right, neither may say anything.
`make test-faults` runs all draws.
"""

from __future__ import annotations

import logging
import re

import pytest
import yaml
from fault_sets import FAULTS, LAYOUTS, ODDITIES, draw, recipe

from fastvim_cli import main

FAULTY, SOUND = 400, 200  # draws
FAULTY_IN_ALL_RUNS, SOUND_IN_ALL_RUNS = 40, 12
STEPS = "images a step"  # printed where training begins


def draws(number: int, in_all_runs: int) -> list:
    return [
        pytest.param(seed, marks=[] if seed < in_all_runs else pytest.mark.faults)
        for seed in range(number)
    ]


def run(command: list[str], capsys, caplog) -> tuple[int, str]:
    """Exit code, and all that is said."""
    caplog.clear()
    code = main(command)
    output, error = capsys.readouterr()
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    return code, "\n".join([output, error, *warnings])


@pytest.mark.parametrize("seed", draws(FAULTY, FAULTY_IN_ALL_RUNS))
def test_a_planted_fault_is_named(seed, tmp_path, capsys, caplog):
    layout, outcome, plant = FAULTS[37 * seed % len(FAULTS)]  # not one layout after the other
    drawn = draw(tmp_path / "set", seed, layout)
    pattern = plant(drawn)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(drawn, layout)))
    for command in (["data", "check", "--no-read"], ["data", "check"], ["fit"]):
        code, said = run([*command, f"--config={file}"], capsys, caplog)
        stops = outcome == "stops"
        if "--no-read" not in command:
            assert code == (2 if stops else 0), said
            assert re.search(pattern, said), said
        if command == ["fit"]:
            assert (STEPS in said) != stops, said


@pytest.mark.parametrize("seed", draws(SOUND, SOUND_IN_ALL_RUNS))
def test_a_sound_set_is_passed_in_silence(seed, tmp_path, capsys, caplog):
    layout = list(LAYOUTS)[seed % len(LAYOUTS)]
    drawn = draw(tmp_path / "set", seed, layout)
    changes = ODDITIES[layout]
    for index in drawn.rng.choice(len(changes), 2, replace=False):
        changes[index](drawn)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(drawn, layout)))
    code, said = run(["data", "check", f"--config={file}"], capsys, caplog)
    assert code == 0, said
    assert said.rstrip().endswith("nothing wrong"), said
    code, said = run(["fit", f"--config={file}"], capsys, caplog)
    assert code == 0, said
    assert not caplog.records, said


def test_every_fault_is_drawn():
    kinds = {plant.__name__ for _, _, plant in FAULTS}
    assert len(kinds) == len(FAULTS) >= 20
    assert 5 * len(FAULTS) <= FAULTY
    assert {layout for layout, _, _ in FAULTS} == set(ODDITIES) == set(LAYOUTS)
