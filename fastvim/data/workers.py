"""Processes that load images: one that dies or hangs ends the run by name."""

from __future__ import annotations

import atexit
import gc
import math
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from fastvim.errors import MachineError

AHEAD = 2  # batches that are ready before they are asked for


class WatchedLoader(DataLoader[Any]):
    """A loader that names the worker that died, or that gave no batch for `patience` seconds.

    torch's own `timeout` does not end the wait for a worker that stops before its tensors have
    been taken over. Where another part of the program runs as a worker dies, torch raises a
    RuntimeError there.

    Args:
        patience: 0 waits for ever.
        finish: what this process makes of a batch that the workers collated; None leaves it.
        **settings: of a DataLoader.

    Attributes:
        ahead: a GPU, on which a thread finishes batches while earlier ones are used; None finishes
            them as they are asked for.
        waited: seconds that this process has waited for batches, over all epochs. Without workers
            it loads them itself meanwhile. With `ahead`, seconds in which the GPU had nothing else
            to do; a process that has handed over its work in time waits at no cost.

    Raises:
        MachineError: while it is iterated over.
    """

    def __init__(
        self,
        *args: Any,
        patience: float,
        finish: Callable[[Any], Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.patience, self.finish = patience, finish
        self.ahead: torch.device | None = None
        self.waited = 0.0
        self._work: _Work | None = None
        self._stream: torch.cuda.Stream | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._work is not None:
            self._work.end()  # until then the processes work for it
        if self.num_workers and self._iterator is None and torch.cuda.is_initialized():
            gc.collect()  # or a process of the loader frees what is CUDA's, and dies
        with closing(_Watch(self._iterator, self.patience)) as watch, watch.waiting():
            batches = _Batches(super().__iter__(), self)  # persistent workers begin it together
        if self.ahead is None:
            return batches
        if self._stream is None:  # one for all epochs: torch keeps freed memory for each
            self._stream = torch.cuda.Stream(self.ahead)
        self._work = _Work(batches, self._stream)
        return _Ahead(self._work, self)


class _Batches(Iterator[Any]):
    def __init__(self, batches: Any, loader: WatchedLoader) -> None:
        self._batches, self._loader = batches, loader
        self._watch = _Watch(batches, loader.patience)

    def __next__(self) -> Any:
        loader, begun = self._loader, time.monotonic()
        with self._watch.waiting():
            batch = next(self._batches)
        if loader.ahead is None:
            loader.waited += time.monotonic() - begun
        return batch if loader.finish is None else loader.finish(batch)

    def __del__(self) -> None:
        self._watch.close()


class _Work:
    """A thread that finishes batches on a stream of its own.

    Args:
        batches: gives finished ones.
        stream: of a GPU.

    Attributes:
        ready: batches, each with the event of its end on the GPU; at last an error, with None.
    """

    def __init__(self, batches: Iterator[Any], stream: torch.cuda.Stream) -> None:
        self.ready: Queue[tuple[Any, torch.cuda.Event | None]] = Queue(AHEAD)
        self.over = Event()
        self._batches, self._stream = batches, stream
        self._thread = Thread(target=self._run, daemon=True, name="fastvim-loader")
        self._thread.start()
        _at_work.add(self)

    def _run(self) -> None:
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            try:
                while not self.over.is_set():
                    batch = next(self._batches)
                    self._put((batch, _now(self._stream)))
            except BaseException as error:  # StopIteration too
                self._put((error, None))

    def _put(self, item: tuple[Any, torch.cuda.Event | None]) -> None:
        while not self.over.is_set():
            with suppress(Full):
                return self.ready.put(item, timeout=0.1)

    def end(self) -> None:
        """Ask for no more batches, wait for the last one, and let go of those that are ready."""
        self.over.set()
        self._thread.join()
        with suppress(Empty):
            while True:
                self.ready.get_nowait()
        self.ready.put((StopIteration(), None))  # for who still waits


class _Ahead(Iterator[Any]):
    """Batches that are finished while earlier ones are used."""

    def __init__(self, work: _Work, loader: WatchedLoader) -> None:
        self._work, self._loader = work, loader
        # When the GPU had done all before a batch, and when it had the batch; not yet compared.
        self._moments: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __next__(self) -> Any:
        stream = torch.cuda.current_stream(self._loader.ahead)
        idle = _now(stream)
        try:
            batch, done = self._work.ready.get()
        except RuntimeError:  # torch's of a process that died, raised here; the thread knows which
            batch, done = self._last()
        if done is None:
            self._work.ready.put((batch, None))  # for whoever asks again
            raise batch
        self._moments.append((idle, done))
        self._loader.waited += self._lost()
        stream.wait_event(done)
        for each in tree_leaves(batch):
            if isinstance(each, Tensor) and each.is_cuda:
                each.record_stream(stream)
        return batch

    def _lost(self) -> float:
        """Seconds for which the GPU waited, of batches that it has come to since the last call."""
        seconds = 0.0
        while self._moments and all(event.query() for event in self._moments[0]):
            idle, ready = self._moments.popleft()
            seconds += max(0.0, idle.elapsed_time(ready)) / 1000
        return seconds

    def _last(self) -> tuple[Any, None]:
        """What ends the batches."""
        while True:
            batch, done = self._work.ready.get()
            if done is None:
                return batch, None

    def __del__(self) -> None:
        self._work.over.set()


def _now(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """The moment at which the GPU has done what a stream was given so far."""
    return stream.record_event(torch.cuda.Event(enable_timing=True))


def _end_all() -> None:
    """A thread inside of CUDA would not survive the end of the process."""
    for work in list(_at_work):
        work.end()


_at_work: weakref.WeakSet[_Work] = weakref.WeakSet()
atexit.register(_end_all)


class _Watch:
    """Kills workers that give nothing for some seconds; says of a dead one what it was.

    One thread looks at the clock now and then. A timer for each batch would be a thread for each.

    Args:
        batches: torch's iterator of a loader, or None.
        patience: seconds; 0 waits for ever.
    """

    def __init__(self, batches: Any, patience: float) -> None:
        self._batches, self._patience = batches, patience
        self._workers: list[Any] = getattr(batches, "_workers", [])
        self._until = math.inf  # when the patience ends
        self._hanging = ""  # the worker that was waited for
        self._over = Event()
        if self._workers and patience:
            Thread(target=self._look, daemon=True, name="fastvim-watch").start()

    def close(self) -> None:
        """Look no more."""
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(min(1.0, self._patience / 8)):
            if time.monotonic() > self._until:
                self._hanging = _hanging(self._batches, self._workers)
                for worker in self._workers:
                    worker.kill()  # what waits for them then raises
                return

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this process waits for a batch.

        Raises:
            MachineError: a worker died, or the patience has ended.
        """
        self._until = time.monotonic() + self._patience
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            if self._hanging:
                text = f"{self._hanging}: no batch for {self._patience:g} s (data.timeout)"
                raise MachineError(text) from error
            for number, worker in enumerate(self._workers):
                if isinstance(error, (ConnectionError, EOFError)):
                    worker.join(1)  # it closes its end of a connection a little earlier
                if worker.exitcode:
                    text = f"{_name(number, worker)} {_end(worker.exitcode)}"
                    raise MachineError(text) from error
            raise
        finally:
            self._until = math.inf


def _hanging(batches: Any, workers: list[Any]) -> str:
    """The worker that is stopped, or else the one whose batch is due."""
    for number, worker in enumerate(workers):
        if _is_stopped(worker.pid):
            return f"{_name(number, worker)} is stopped"
    number = (*batches._task_info.get(batches._rcvd_idx, ()), 0)[0]
    return f"{_name(number, workers[number])} hangs"


def _is_stopped(pid: int) -> bool:
    """Whether a process waits for SIGCONT, where the system tells it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state == "T"


def _end(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), often for want of memory"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _name(number: int, worker: Any) -> str:
    return f"worker {number} of the loader (process {worker.pid})"
