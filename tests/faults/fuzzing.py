"""Hostile inputs, one a process: every command runs in a fork of one warm process.

`Warm` starts that process, which imports the library and computes nothing. Each of its forks runs
one command with a limit on time and memory. What a file must not bring about, a connection or
another program, ends the fork with code 99.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import IO, NamedTuple

import pytest

SECONDS = 60
MEMORY = 3 * 2**30  # address space beyond that of the warm process, in bytes
FORBIDDEN = 99
# Audit events of Python: see its documentation's table.
EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen")
EVENTS += (
    "socket.connect",
    "socket.sendto",
    "socket.getaddrinfo",
    "urllib.Request",
    "webbrowser.open",
)
COMMANDS = ("train", "predict", "reconstruct", "segment", "detect", "channels", "data", "convert")
LIBRARIES = ("fastvim.data", "fastvim.tasks", "fastvim.models.heads.cascade")
LIBRARIES += ("pandas", "pyarrow.parquet", "tifffile")
LIBRARIES += ("numba", "fastvim.ops.cpu.conv", "fastvim.ops.cpu.selective_scan", "tensorboard")


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: its exit code; negative for a signal, as of one that took too long.
        stdout: what it printed.
        stderr: what it said.
        seconds: that it took.
        memory: highest resident memory, in bytes.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    memory: int

    @property
    def problems(self) -> list[str]:
        """What is wrong with this end, whatever the input was."""
        found = [] if self.code in (0, 1, 2) else [f"code {self.code}"]
        if "Traceback" in self.stderr:
            found.append("a traceback")
        errors = [line for line in self.stderr.splitlines() if line.startswith("fastvim: error:")]
        if len(errors) != (self.code in (1, 2)):
            found.append(f"{len(errors)} lines of errors with code {self.code}")
        if any(line.startswith("fastvim: error: unexpected ") for line in errors):
            found.append("an error that nothing explains")
        if errors and self.stderr.splitlines()[-1] != errors[0]:
            found.append("the error is not the last line")
        if any(len(line) > 1500 for line in errors):
            found.append("an endless line")
        return found


class Warm:
    """The warm process; a context manager.

    Args:
        folder: for the commands' output.
        paths: further entries of `sys.path`.
    """

    def __init__(self, folder: Path, *paths: Path) -> None:
        self.folder = folder
        places = [*map(str, paths), *filter(None, sys.path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        environment |= {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(folder / "cache")}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(SECONDS)

    def run(self, *words: str | Path, cwd: Path | None = None, seconds: float = SECONDS) -> Ended:
        """Run `fastvim WORDS` in a fork.

        Args:
            words: of the command line.
            cwd: folder to run in; None for that of the output.
            seconds: after which it is killed.
        """
        task = {"words": [*map(str, words)], "cwd": str(cwd or self.folder), "seconds": seconds}
        task["outputs"] = [str(self.folder / name) for name in ("stdout", "stderr")]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        code, took, memory = json.loads(self._process.stdout.readline())
        said = [Path(file).read_text(errors="backslashreplace") for file in task["outputs"]]
        return Ended(code, *said, took, memory)


def groups(draws: int, in_all_runs: int, size: int = 20) -> list:
    """Parameters of a test: the seeds of each group. `make test-faults` alone runs the later ones.

    Args:
        draws: number of seeds.
        in_all_runs: how many of them every run has.
        size: of a group.
    """
    return [
        pytest.param(
            range(first, min(first + size, draws)),
            id=f"from_{first}",
            marks=[] if first < in_all_runs else pytest.mark.faults,
        )
        for first in range(0, draws, size)
    ]


def _serve(tasks: IO[str]) -> None:
    """Fork for each line of JSON; answer with exit code, seconds and memory."""
    for name in (*(f"fastvim_cli.{command}" for command in COMMANDS), *LIBRARIES):
        importlib.import_module(name)

    for line in tasks:
        task = json.loads(line)
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            _run(task)
        status, memory = _wait(child, begin + task["seconds"])
        code = os.waitstatus_to_exitcode(status)
        sys.stdout.write(json.dumps([code, time.monotonic() - begin, memory]) + "\n")
        sys.stdout.flush()


def _wait(child: int, end: float) -> tuple[int, int]:
    """The status of a child that is killed at `end`, and its highest memory in bytes."""
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage.ru_maxrss * 1024
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _run(task: dict) -> None:
    """The command, in the child: never returns."""
    code = 1
    with contextlib.suppress(BaseException):
        for descriptor, file in zip((1, 2), task["outputs"], strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(task["cwd"])
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(_watch)
        from fastvim_cli import main

        try:
            code = main(task["words"])
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


# typeshed_client, in which jsonargparse looks up the types of compiled classes, asks another Python
# for its path, with nothing of a file in the command. A loader's worker passes images on by a
# socket.
OWN = ("json.dumps(sys.path)", f"{os.sep}pymp-")


def _watch(event: str, arguments: tuple) -> None:
    if event in EVENTS and not any(own in repr(arguments) for own in OWN):
        os.write(2, f"FORBIDDEN: {event} {arguments!r}\n".encode())
        os._exit(FORBIDDEN)


if __name__ == "__main__":
    _serve(sys.stdin)
