"""Notices processes of a run that end or hang, and ends the others with one line.

Every process tells the store that it lives. A thread of the first process looks at all of them, one
of each other process at the first. Whoever ends for a reason of its own says so there: the others
follow, whatever their main threads wait for.

A main thread that hangs leaves the thread beside it alive. So the sign of life holds how far the
main thread is, and the first process tells which one is behind when none goes on.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import lightning as L

from fastvim.tasks.cluster.peers import Peers

PATIENCE = 20.0  # seconds without a sign of life
BEAT = 0.5  # seconds between two of them
_QUIET = (300.0, 1800.0)  # seconds without a step: until it is told, and until the run ends
_MOST = 60.0  # seconds that the end of a process may take
_LINGER = 4 * BEAT  # until the others have read why this process ends
# In errors of a connection whose other end has gone.
_OF_PEERS = ("gloo", "NCCL", "Connection", "Broken pipe", "Timed out", "timed out", "recvValue")


class Progress(L.Callback):
    """Counts what the main thread of this process has done, from the first training step on.

    Attributes:
        count: 0 outside of training, where one piece of work may take any time.
    """

    def __init__(self) -> None:
        self.count = 0

    def _move(self, *args: Any) -> None:
        self.count += 1

    # What hangs in a loader has begun fewer batches than those that wait for its gradients.
    on_train_start = on_train_batch_start = _move  # type: ignore[assignment]
    on_before_backward = on_train_batch_end = _move  # type: ignore[assignment]
    on_validation_batch_start = on_validation_batch_end = _move  # type: ignore[assignment]

    def on_train_end(self, *args: Any) -> None:
        self.count = 0


class Watch:
    """Watches over the processes of a run, while it is entered.

    Args:
        peers: the processes.
        safe: a line on what is not lost, and how to go on.
        leave: ends this process at once: with a line to print, which may be empty, and an exit
            code.
        tell: prints a line.
        patience: seconds without a sign of life after which a process is lost.
        quiet: seconds in which no process has gone on after which the first one tells which is
            behind, and after which the run ends; 30 minutes are torch's limit as well.

    Attributes:
        progress: for the trainer of this process.
    """

    def __init__(
        self,
        peers: Peers,
        safe: Callable[[], str],
        leave: Callable[[str, int], None],
        tell: Callable[[str], None],
        patience: float = PATIENCE,
        quiet: tuple[float, float] = _QUIET,
    ) -> None:
        self.peers = peers
        self.progress = Progress()
        self._safe, self._leave, self._tell = safe, leave, tell
        self._patience, self._quiet = patience, quiet
        self._over = threading.Event()
        others = range(1, peers.size) if peers.rank == 0 else range(min(1, peers.size - 1))
        now = time.monotonic()
        self._seen = dict.fromkeys(others, ("", now))  # last sign of life, and when
        self._answered = now  # when the store has last answered
        self._moved: tuple[list[int], float] = [], now  # counts of all processes, and since when
        self._told_quiet = False

    def __enter__(self) -> Watch:
        if self.peers.size > 1:
            self._store = self.peers.clone()
            for work in (self._talk, self._judge):
                threading.Thread(target=work, daemon=True, name=f"fastvim-{work.__name__}").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.peers.leave()
            self.end()

    def end(self) -> None:
        """Watch no longer: all processes end, each by itself."""
        self._over.set()

    def failed(self, error: BaseException, code: int) -> bool:
        """Tell the others that this process ends; whether it is the first one to end.

        Where a connection to another process has failed, it is that process which has ended: this
        one ends when `leave` tells which.

        Args:
            error: that ends this process.
            code: its exit code.
        """
        if self.peers.size == 1:
            return True
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_PEERS):
            self._patience = min(self._patience, 12 * BEAT)
            time.sleep(self._patience + 10)
        self._over.set()
        first = self._first_to_end(code)
        threading.Thread(target=self._linger, args=(code,)).start()
        return first

    def _linger(self, code: int) -> None:
        """Hold this process until the others have seen that it ends, and not for long after."""
        time.sleep(_LINGER)
        threading.main_thread().join(_MOST)
        self._leave("", code)

    def _talk(self) -> None:
        """Tell the store that this process lives, and see what the others tell."""
        count = 0
        while not self._over.is_set():
            try:
                count += 1
                beat = f"{count} {self.progress.count}"
                self._store.set(f"beat/{self.peers.rank}", beat)
                if self._store.check(["end"]):
                    self._leave("", json.loads(self._store.get("end"))["code"])
                for rank, (before, _) in self._seen.items():
                    if self._store.check([key := f"beat/{rank}"]):
                        beat = self._store.get(key).decode()
                        if beat != before:
                            self._seen[rank] = beat, time.monotonic()
                self._answered = time.monotonic()
            except RuntimeError:  # the process that had the store has gone, for good
                self._patience = min(self._patience, 12 * BEAT)
                return
            self._over.wait(BEAT)

    def _judge(self) -> None:
        """End this process when another one has given no sign of life for too long."""
        looked = time.monotonic()
        while not self._over.wait(BEAT):
            now = time.monotonic()
            if now - looked > self._patience / 2:  # this process itself was stopped for a while
                self._answered = now
                self._seen = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}
                self._moved = [], now
            looked = now
            silent = {rank: now - since for rank, (_, since) in self._seen.items()}
            silent[0] = max(silent.get(0, 0.0), now - self._answered)
            rank, seconds = max(silent.items(), key=lambda item: item[1])
            if seconds > self._patience:
                who = "what connects the processes" if rank == self.peers.rank else self._who(rank)
                self._lost(
                    f"{who} gives no sign of life for {seconds:.0f} s: it was killed, hangs, or "
                    "its machine is unreachable"
                )
            elif self.peers.rank == 0:
                self._judge_progress(now)

    def _judge_progress(self, now: float) -> None:
        """Tell which process is behind where none has gone on for long, and end the run later."""
        beats = [beat for _, (beat, _) in sorted(self._seen.items())]
        counts = [self.progress.count, *(int(beat.partition(" ")[2] or 0) for beat in beats)]
        before, since = self._moved
        if counts != before or not all(counts):
            self._moved, self._told_quiet = (counts, now), False
            return
        tell, end = self._quiet
        seconds, least = now - since, min(counts)
        if seconds < tell or (self._told_quiet and seconds < end):
            return
        line = f"no process has finished a step for {seconds:.0f} s"
        if least < max(counts):
            who = self._who(counts.index(least))
            line = f"{who} has not finished a step for {seconds:.0f} s, and the others wait for it"
        if seconds >= end:
            return self._lost(line)
        self._told_quiet = True
        self._tell(f"{line}; the run ends after {end:.0f} s")

    def _who(self, rank: int) -> str:
        return f"process {rank} ({self.peers.hosts[rank]})"

    def _lost(self, why: str) -> None:
        """End all processes: one of them does not go on."""
        self._over.set()
        line = f"{why}; {self._safe()}"
        first = self._first_to_end(1)
        if first:
            time.sleep(_LINGER)
        self._leave(line if first else "", 1)

    def _first_to_end(self, code: int) -> bool:
        """Say that the run ends; whether no other process has said it before."""
        silent = time.monotonic() - self._answered > self._patience / 2
        with suppress(RuntimeError):
            if silent:
                return self._first_of_machine()
            value = json.dumps({"code": code, "by": self.peers.rank})
            told = self.peers.clone().compare_set("end", "", value)
            return bool(told.decode() == value)
        return self._first_of_machine()

    def _first_of_machine(self) -> bool:
        """Whether no other process of this machine has come here before, where no store is."""
        file = os.path.join(tempfile.gettempdir(), f"fastvim-{self.peers.token}")
        try:
            os.close(os.open(file, os.O_CREAT | os.O_EXCL))
        except OSError:
            return False
        return True
