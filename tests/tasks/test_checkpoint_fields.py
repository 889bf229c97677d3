"""Entries of a training checkpoint that nobody wrote: one line names the file and the entry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvim.errors import UserError
from fastvim.tasks.checkpoint_fields import check_fields
from fastvim.tasks.resuming import told_by

SOUND: dict[str, Any] = {
    "state_dict": {"a": torch.zeros(1)},
    "loops": {"fit_loop": {}},
    "pytorch-lightning_version": "2.6.6",
    "callbacks": {},
    "hyper_parameters": {"lr": 1.0, "model_args": None},
    "batches": {"batch_size": 2, "processes": 1, "accumulated": 1, "seed": 0},
    "lr_schedulers": [{}],
    "optimizer_states": [{"param_groups": [{"params": [0]}]}],
    "fastvim": {"class_names": ["a"], "value_range": None},
}
ODD: dict[str, tuple[Any, ...]] = {
    "state_dict": (5, {"a": 5}, {1: torch.zeros(1)}),
    "loops": (5, {}, {"fit_loop": 5}),
    "pytorch-lightning_version": (5, "x", None),
    "callbacks": (5, None, []),
    "hyper_parameters": (None, [1], "x", {1: 2}, {"model_args": [1]}),
    "batches": (5, {}, {**SOUND["batches"], "seed": "x"}, {**SOUND["batches"], "seed": 10**30}),
    "lr_schedulers": (5, [5]),
    "optimizer_states": (5, [5], [{}], [{"param_groups": 5}], [{"param_groups": [5]}]),
    "fastvim": (None, [1], {"class_names": 5}, {"value_range": 5}, {"licence": 5}),
}


def test_sound_entries_and_those_that_may_be_missing():
    check_fields(Path("a.ckpt"), SOUND)
    check_fields(Path("a.ckpt"), {name: SOUND[name] for name in list(SOUND)[:3]})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ODD.items() for v in values])
def test_an_odd_entry(name, value, tmp_path):
    file = tmp_path / "a.ckpt"
    torch.save({**SOUND, name: value}, file)
    said = "its metadata" if name == "fastvim" else re.escape(f"its {name} is ")
    with pytest.raises(UserError, match=rf"a\.ckpt: {said}.*expected") as raised:
        told_by(str(file))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["state_dict", "loops", "pytorch-lightning_version"])
def test_an_entry_that_is_missing(name, tmp_path):
    file = tmp_path / "a.ckpt"
    torch.save({key: value for key, value in SOUND.items() if key != name}, file)
    with pytest.raises(UserError, match=r"a\.ckpt is no training checkpoint"):
        told_by(str(file))
