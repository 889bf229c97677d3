"""Which share of the parts a process computes: as told, or as a cluster's variables say."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastvim.errors import UserError


@dataclass(frozen=True)
class Shard:
    """One of several shares of the parts.

    Attributes:
        index: from 0 on.
        count: of the shares.
        said: where this comes from, for a line; "" where there is one share.
    """

    index: int = 0
    count: int = 1
    said: str = ""

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def has(self, part: int) -> bool:
        """Whether a part is in this share."""
        return part % self.count == self.index

    def split(self, index: int, count: int, said: str = "") -> Shard:
        """A share of this share."""
        if count == 1:
            return self
        words = " and ".join(filter(None, (self.said, said)))
        return Shard(self.index * count + index, self.count * count, words)


WHOLE = Shard()


def parse_shard(text: str) -> Shard:
    """`I/N`: the Ith of N shares, from 1 on.

    Raises:
        UserError: another text.
    """
    told = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if told and 1 <= int(told[1]) <= int(told[2]):
        return Shard(int(told[1]) - 1, int(told[2]), f"--shard {text}")
    raise UserError(f"--shard {text}: expected I/N, such as 1/4, with I from 1 to N")


def shard_of_environment(variables: Mapping[str, str] = os.environ) -> Shard:
    """The share that the variables of a scheduler name.

    A job array or an indexed job is divided first, then what torchrun or srun starts in each.

    Args:
        variables: of the environment.

    Raises:
        UserError: variables that do not agree.
    """
    whole = WHOLE
    for outer in (_slurm_array, _kubernetes):
        if (found := outer(variables)) is not None:
            whole = whole.split(*found)
            break
    for inner in (_torchrun, _srun):
        if (found := inner(variables)) is not None:
            whole = whole.split(*found)
            break
    return whole


def local_share(variables: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which of the processes of this machine this is, from 0 on, and how many there are."""
    for rank, size in (
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("SLURM_LOCALID", "SLURM_TASKS_PER_NODE"),  # such as "4(x2),3"
    ):
        if rank in variables:
            index = _number(variables, rank)
            count = re.match(r"\d+", variables.get(size, ""))
            return index, max(int(count[0]) if count else 1, index + 1)
    return 0, 1


_Share = tuple[int, int, str]  # index, count, the variables


def _slurm_array(variables: Mapping[str, str]) -> _Share | None:
    if "SLURM_ARRAY_TASK_ID" not in variables:
        return None
    number, least, count = (
        _number(variables, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "COUNT")
    )
    step = _number(variables, "SLURM_ARRAY_TASK_STEP", 1) or 1
    most = _number(variables, "SLURM_ARRAY_TASK_MAX", least + (count - 1) * step)
    index, rest = divmod(number - least, step)
    if rest or not 0 <= index < count or (count > 1 and most != least + (count - 1) * step):
        raise UserError(
            f"SLURM_ARRAY_TASK_ID {number}: one of {count} tasks from {least} to {most}; expected "
            "an array without gaps, such as --array=0-9, or --shard I/N"
        )
    return index, count, "SLURM_ARRAY_TASK_ID"


def _kubernetes(variables: Mapping[str, str]) -> _Share | None:
    if "JOB_COMPLETION_INDEX" not in variables:
        return None
    if "JOB_COMPLETIONS" not in variables:
        raise UserError(
            "JOB_COMPLETION_INDEX without JOB_COMPLETIONS: expected the job's manifest to set it "
            "to the number of completions, or --shard I/N"
        )
    return _checked(variables, "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")


def _torchrun(variables: Mapping[str, str]) -> _Share | None:
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return _checked(variables, "RANK", "WORLD_SIZE")
    return None


def _srun(variables: Mapping[str, str]) -> _Share | None:
    if "SLURM_PROCID" in variables and "SLURM_NTASKS" in variables:
        return _checked(variables, "SLURM_PROCID", "SLURM_NTASKS")
    return None


def _checked(variables: Mapping[str, str], index: str, count: str) -> _Share:
    place, size = _number(variables, index), _number(variables, count)
    if place >= size:
        raise UserError(f"{index} {place}: expected less than {count}, which is {size}")
    return place, size, index


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in variables and default is not None:
        return default
    text = variables.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name} {text!r}: expected a number, or --shard I/N")
    return int(text)
