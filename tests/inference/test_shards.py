"""Shares of the parts from `--shard` and from the variables of schedulers."""

from __future__ import annotations

import pytest

from fastvim.errors import UserError
from fastvim.inference.parts.shards import (
    Shard,
    local_share,
    parse_shard,
    shard_of_environment,
)


def test_shards_divide_the_parts():
    for count in (1, 2, 7):
        shares = [[part for part in range(20) if Shard(i, count).has(part)] for i in range(count)]
        assert sorted(part for share in shares for part in share) == list(range(20))


def test_a_share_is_divided_again():
    shares = [Shard(i, 2).split(j, 3) for i in range(2) for j in range(3)]
    assert sorted(share.index for share in shares) == list(range(6))
    assert {share.count for share in shares} == {6}


def test_shard_option():
    assert parse_shard("2/4") == Shard(1, 4, "--shard 2/4")
    assert str(parse_shard("2/4")) == "2/4"
    for text in ("0/4", "5/4", "1", "1/0", "a/b", "-1/4", "1/4/2", "", "1/4 "):
        with pytest.raises(UserError, match="expected I/N"):
            parse_shard(text)


def array(number, least, count, step=1, **more):
    names = ("ID", "MIN", "COUNT", "STEP", "MAX")
    values = (number, least, count, step, least + (count - 1) * step)
    return {f"SLURM_ARRAY_TASK_{n}": str(v) for n, v in zip(names, values, strict=True)} | more


BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}


@pytest.mark.parametrize(
    ("variables", "expected", "said"),
    [
        ({}, "1/1", ""),
        ({"RANK": "1", "WORLD_SIZE": "3"}, "2/3", "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "1/1", ""),
        ({"RANK": "1"}, "1/1", ""),
        (array(7, 5, 4) | BATCH, "3/4", "SLURM_ARRAY_TASK_ID"),
        (array(20, 0, 3, step=10) | BATCH, "3/3", "SLURM_ARRAY_TASK_ID"),
        (array(3, 3, 1) | BATCH, "1/1", ""),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, "3/4", "SLURM_PROCID"),
        (
            array(1, 0, 2) | {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"},
            "6/8",
            "SLURM_ARRAY_TASK_ID and SLURM_PROCID",
        ),
        # torchrun on each of two nodes that srun starts: its ranks count all processes.
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "5", "WORLD_SIZE": "8"}, "6/8", "RANK"),
        (
            {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "5"},
            "1/5",
            "JOB_COMPLETION_INDEX",
        ),
    ],
)
def test_variables_of_schedulers(variables, expected, said):
    shard = shard_of_environment(variables)
    assert (str(shard), shard.said) == (expected, said)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JOB_COMPLETION_INDEX": "0"}, "expected the job's manifest to set it"),
        ({"JOB_COMPLETION_INDEX": "5", "JOB_COMPLETIONS": "5"}, "less than JOB_COMPLETIONS"),
        ({"RANK": "x", "WORLD_SIZE": "3"}, "RANK 'x': expected a number"),
        ({"RANK": "3", "WORLD_SIZE": "3"}, "less than WORLD_SIZE"),
        # --array=1,3,7: the third task would be taken for the seventh.
        (array(7, 1, 3) | {"SLURM_ARRAY_TASK_MAX": "7"}, "without gaps"),
        (array(1, 1, 3) | {"SLURM_ARRAY_TASK_MAX": "7"}, "without gaps"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN ''"),
    ],
)
def test_variables_that_do_not_agree(variables, message):
    with pytest.raises(UserError, match=message):
        shard_of_environment(variables)


def test_processes_of_a_machine():
    assert local_share({}) == (0, 1)
    assert local_share({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}) == (1, 4)
    assert local_share({"SLURM_LOCALID": "2", "SLURM_TASKS_PER_NODE": "4(x2),3"}) == (2, 4)
    assert local_share({"SLURM_LOCALID": "2"}) == (2, 3)
