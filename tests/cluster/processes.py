"""Runs of the command line in processes of their own, as a cluster starts them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from harness import PROCESSES

from fastvim_cli import main

PATIENCE = 120.0  # seconds, of a machine that is busy with other things


class Run(NamedTuple):
    """A process, and the file of its output."""

    process: ForkServerProcess
    log: Path

    def signal(self, *numbers: int, gap: float = 0.0) -> None:
        """Send signals, some seconds apart; one that has ended meanwhile gets none."""
        for number in numbers:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)
            time.sleep(gap)

    def end(self, seconds: float = PATIENCE) -> int:
        """The exit code."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.text()}")
        return self.process.exitcode

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text()

    def errors(self) -> list[str]:
        """The lines of its errors."""
        return errors(self.text())


def errors(text: str) -> list[str]:
    """The lines of a text that begin as those of an error, which torchrun repeats otherwise."""
    return [line for line in text.splitlines() if line.startswith("fastvim: ")]


def start(
    config: Path, *arguments: str, processes: int = 1, second: Path | None = None, **options
) -> list[Run]:
    """Start `fastvim fit` in several processes of one run.

    Args:
        config: file of the configuration.
        arguments: of the command.
        processes: of the run.
        second: configuration of all processes but the first; None for the same.
        options: of `environments`.
    """
    runs = []
    for rank, variables in enumerate(environments(processes, **options)):
        log = config.with_name(f"{config.stem}_{rank}_{time.monotonic_ns()}.log")
        own = second if second is not None and rank else config
        words = ["fit", "--config", str(own), *arguments]
        process = PROCESSES.Process(target=_command, args=(words, str(log), variables))
        process.start()
        log.touch()
        runs.append(Run(process, log))
    return runs


def environments(
    processes: int, nodes: int = 1, slurm: Path | None = None, **extra: str
) -> list[dict[str, str]]:
    """The variables of each process, as those who start by hand or SLURM set them.

    Args:
        processes: of the run.
        nodes: that they are on.
        slurm: folder with a program `scontrol`; None without SLURM.
        extra: further variables.
    """
    each = processes // nodes
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **extra}
    if slurm is not None:
        job = {"SLURM_JOB_ID": "41", "SLURM_NTASKS": str(processes), "SLURM_JOB_NAME": "train"}
        path = f"{slurm}{os.pathsep}{os.environ['PATH']}"
        common |= {**job, "SLURM_NTASKS_PER_NODE": str(each), "PATH": path}
    found = []
    for rank in range(processes):
        place = {"LOCAL_RANK": rank % each, "NODE_RANK": rank // each}
        if slurm is not None:
            place = {
                "SLURM_PROCID": rank,
                "SLURM_LOCALID": rank % each,
                "SLURM_NODEID": rank // each,
            }
        alone = processes == 1 and slurm is None
        found.append({**({} if alone else common | _texts(place)), **extra})
    return found


def _texts(values: dict[str, int]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(happens: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"nothing in {seconds} s"
        time.sleep(0.02)


def _command(words: list[str], log: str, variables: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(variables)
    sys.exit(main(words))
