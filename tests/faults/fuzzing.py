"""Hostile inputs, one a process: every command runs in a fork of one warm process.

`Warm` starts that process, which imports what the commands need, and computes nothing that
starts threads. Each of its forks runs one command with a limit on time and memory. What a file must
not bring about, a connection or another program, ends the fork with code 99.
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

import numba
import pytest
from PIL import Image

SECONDS = 60
MEMORY = 3 * 2**30  # address space beyond that of the warm process, in bytes
FORBIDDEN = 99
DISK = 16  # MiB
# Runs the words that follow a folder, in which they see a small file system of their own.
SMALL_DISK = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
SMALL_DISK += [f'mount -t tmpfs -o size={DISK}m none "$0" && exec "$@"']
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
COMMANDS += ("models", "benchmark")
# What the commands import when they come to it.
LIBRARIES = ("fastvim.models.heads.cascade", "fastvim.tasks.subsets", "fastvim.benchmark")
LIBRARIES += tuple(f"fastvim.inference.{work}" for work in ("classify", "segment", "detect"))
LIBRARIES += ("fastvim.inference.reconstruct", "fastvim.inference.parts.run")
LIBRARIES += tuple(f"fastvim.data.{kind}" for kind in ("images", "channels", "segmentation"))
LIBRARIES += ("fastvim.data.detection", "fastvim.data.checks")
LIBRARIES += ("fastvim.ops.cpu.forward", "fastvim.ops.cpu.backward")
LIBRARIES += ("pandas", "pyarrow.parquet", "pyarrow.pandas_compat", "tifffile", "s3fs", "attrs")
LIBRARIES += ("torch.utils.tensorboard", "tensorboard.plugins.hparams.metadata", "timm.optim")
LIBRARIES += ("matplotlib.backends.backend_agg",)


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

    It knows nothing of the user: its home and the folder of fetched weights are empty.

    Args:
        folder: for the commands' output.

    Attributes:
        modules: a folder of `sys.path`, for modules of a test.
        disk: a small file system, as this process sees it; None where the system forbids one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.modules = folder, folder / "modules"
        for name in ("modules", "home", "weights", "disk"):
            (folder / name).mkdir()
        places = [str(self.modules), *filter(None, sys.path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        environment |= {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(folder / "cache")}
        environment |= {"HOME": str(folder / "home"), "FASTVIM_WEIGHTS": str(folder / "weights")}
        mounted = [*SMALL_DISK, str(folder / "disk")]
        has_disk = not subprocess.run([*mounted, "true"], capture_output=True).returncode
        self._process = subprocess.Popen(
            [*(mounted if has_disk else []), sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        # The mount is in a namespace of the process alone.
        place = Path(f"/proc/{self._process.pid}/root{folder}/disk")
        self.disk = place if has_disk else None

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()  # all that it holds are imports, which take seconds to leave
        self._process.wait()

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
    Image.init()
    numba.njit(lambda: 0)()  # it loads most of itself at the first compilation

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
