"""Several processes on one machine, each with a device of its own and a share of the parts."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from fastvim.errors import MachineError, UserError
from fastvim.inference.parts.loop import SAFE, Report, Run, Spent, compute, open_for, readers
from fastvim.inference.parts.work import Failure, Opened, Work

_THREADS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")  # are read when a process begins


def compute_on_devices(
    count: int,
    device: torch.device,
    work: Work,
    run: Run,
    opened: Opened,
    missing: list[int],
    report: Report,
    workers: int | None,
) -> None:
    """Compute parts with several processes.

    Args:
        count: of the processes.
        device: "cuda" for a GPU each; "cpu" shares out the cores.
        work: that each process opens.
        run: that the parts belong to.
        opened: hears what the processes have seen.
        missing: numbers of the parts.
        report: is told what all of them do.
        workers: processes that read images for each; None for what suits the device.

    Raises:
        UserError: more processes than GPUs, or what one of them raises.
        MachineError: one of them died.
    """
    if device.type == "cuda" and count > torch.cuda.device_count():
        raise UserError(f"--devices {count}: this machine has {torch.cuda.device_count()} GPUs")
    places = [torch.device("cuda", i) if device.type == "cuda" else device for i in range(count)]
    number = readers(device, count) if workers is None else workers
    children: list[_Child] = []
    try:
        with _threads(max(1, (os.cpu_count() or 1) // count)):
            for i, place in enumerate(places):
                if share := missing[i::count]:
                    name = f"process {i + 1} of {count} on {place}"
                    children.append(_start(name, (work, run, share, place, number)))
        _follow(children, opened, report)
    finally:
        for child in children:
            child.process.terminate()
        for child in children:
            child.process.join()


@dataclass
class _Child:
    name: str
    process: BaseProcess
    pipe: Connection
    ended: bool = False  # told that all is done


def _start(name: str, arguments: tuple[Any, ...]) -> _Child:
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    here, there = context.Pipe(duplex=False)
    method = multiprocessing.get_start_method()
    process = context.Process(target=_run, args=(there, method, *arguments), name=name)
    process.start()
    there.close()  # so that the end of the process is the end of the pipe
    return _Child(name, process, here)


def _follow(children: list[_Child], opened: Opened, report: Report) -> None:
    """Pass on what the processes tell until all of them have ended."""
    following = {child.pipe: child for child in children}
    while following:
        for pipe in wait(list(following)):
            child = following[pipe]  # type: ignore[index]  # pipes alone
            try:
                what, value = child.pipe.recv()
            except EOFError:
                del following[child.pipe]
                if not child.ended:
                    raise _died(child) from None
                continue
            if what == "done":
                report.advance(*value)
            elif what == "failed":
                report.failed(value)
            elif what == "error":
                raise value
            else:
                opened.hear(value)
                child.ended = True


def _died(child: _Child) -> MachineError:
    child.process.join(10)
    code = child.process.exitcode
    how = f"was ended by signal {-code}" if code and code < 0 else f"ended with code {code}"
    return MachineError(f"{child.name} {how}; {SAFE}")


def _run(
    pipe: Connection,
    method: str,
    work: Work,
    run: Run,
    share: list[int],
    device: torch.device,
    workers: int,
) -> None:
    """What a process does; it ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, which the parent follows
    # A process that was spawned spawns: each of its readers would import torch anew.
    multiprocessing.set_start_method(method, force=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else pinned memory is another GPU's
    with suppress(BrokenPipeError):
        try:
            opened = open_for(work, run, device)
            compute(run, opened, share, device, _Pipe(pipe), workers)
            pipe.send(("ended", opened.pass_on()))
        except UserError as error:
            pipe.send(("error", error))


@dataclass
class _Pipe:
    """Tells the parent."""

    pipe: Connection

    def advance(self, images: int, spent: Spent) -> None:
        self.pipe.send(("done", (images, spent)))

    def failed(self, failure: Failure) -> None:
        self.pipe.send(("failed", failure))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Processes that are started meanwhile compute with that many threads, where nothing is set."""
    added = [name for name in _THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, str(number)))
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
