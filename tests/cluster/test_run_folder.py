"""Which checkpoint of a folder is the newest, and when a run goes on by itself."""

from __future__ import annotations

import os

import pytest
import torch

from fastvim.tasks.run_folder import (
    begin,
    has_begun,
    name_of,
    newest,
    requeued,
    restarts,
    started_again,
)


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint without weights, later than those before."""
    clock = iter(range(1_000_000, 2_000_000))

    def write(name: str, step: int, batches: int | None = None, run: str | None = "a") -> str:
        processed = step if batches is None else batches
        progress = {"epoch_loop.batch_progress": {"total": {"processed": processed}}}
        content = {"global_step": step, "loops": {"fit_loop": progress}}
        if run is not None:
            content["run"] = run
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        torch.save(content, path)
        now = next(clock)
        os.utime(path, (now, now))
        return str(path)

    return write


def names(found) -> list[str]:
    return [each.path.name for each in found]


def test_the_newest_has_done_the_most_steps(tmp_path, save):
    save("checkpoints/last.ckpt", 30)
    save("hpc_ckpt_2.ckpt", 20)
    save("hpc_ckpt_11.ckpt", 40, run=None)
    save("checkpoints/last-v1.ckpt", 40, batches=85)
    save("checkpoints/best.ckpt", 90)
    expected = ["last-v1.ckpt", "hpc_ckpt_11.ckpt", "last.ckpt", "hpc_ckpt_2.ckpt"]
    assert names(newest(tmp_path)) == expected


def test_equal_steps_are_told_apart_by_time(tmp_path, save):
    save("hpc_ckpt_1.ckpt", 4)
    save("checkpoints/last.ckpt", 4)
    assert names(newest(tmp_path)) == ["last.ckpt", "hpc_ckpt_1.ckpt"]


def test_a_second_run_in_a_folder_is_another_one(tmp_path, save):
    first = save("checkpoints/last.ckpt", 100)
    second = save("checkpoints/last-v1.ckpt", 3, run="b")
    assert names(newest(tmp_path)) == ["last-v1.ckpt"]
    assert names(newest(tmp_path, "a")) == ["last.ckpt"]
    assert (name_of(tmp_path, first), name_of(tmp_path, second)) == ("a", "b")


def test_who_goes_back_begins_another_run(tmp_path, save):
    early = save("hpc_ckpt_1.ckpt", 10)
    save("checkpoints/last.ckpt", 20)
    elsewhere = save("other/last.ckpt", 50)
    assert (
        name_of(tmp_path, early) is name_of(tmp_path, elsewhere) is name_of(tmp_path, None) is None
    )


def test_what_cannot_be_read_comes_first(tmp_path, save):
    save("checkpoints/last.ckpt", 20)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"PK\x03\x04 half of a file")
    assert names(newest(tmp_path)) == ["hpc_ckpt_1.ckpt", "last.ckpt"]


@pytest.mark.parametrize(
    ("variables", "again"),
    [
        ({}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "0"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, True),
        ({"SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "40"}, False),
        ({"SLURM_JOB_ID": "41"}, True),
    ],
)
def test_started_again(tmp_path, save, variables, again):
    begin(tmp_path, "a", "token")
    requeued(tmp_path, "41")
    assert has_begun(tmp_path, "token")
    save("checkpoints/last.ckpt", 7)
    found = started_again(tmp_path, restarts(variables), variables)
    assert (found is not None and names(found)) == (again and ["last.ckpt"])


def test_what_began_anew_does_not_go_on_from_an_earlier_run(tmp_path, save):
    save("checkpoints/last.ckpt", 100)
    begin(tmp_path, "b", "token")
    assert started_again(tmp_path, 1, {}) == []


def test_a_checkpoint_that_lightning_put_into_the_queue(tmp_path, save):
    save("hpc_ckpt_1.ckpt", 5, run=None)
    assert names(started_again(tmp_path, 0, {"SLURM_JOB_ID": "9"}) or []) == ["hpc_ckpt_1.ckpt"]
    assert started_again(tmp_path, 0, {}) is None


def test_restarts_are_counted():
    assert restarts({"TORCHELASTIC_RESTART_COUNT": "2", "SLURM_RESTART_COUNT": "1"}) == 3
    assert restarts({"SLURM_RESTART_COUNT": "many"}) == 0
