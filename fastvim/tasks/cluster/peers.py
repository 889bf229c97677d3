"""Small values that the processes of a run tell each other: what one decides, what all compare.

They go through the store of the process group, over which its processes have found each other: no
device waits, and no further connection can fail. A process that waits looks again and again, so
that its signals are served meanwhile. Where another one ends, `fastvim.tasks.cluster.watch` ends
the wait.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from fastvim.errors import UserError
from fastvim.tasks.cluster.gathering import Gathering
from fastvim.tasks.cluster.rendezvous import join_torchrun

_Result = TypeVar("_Result")
_LOOK = (0.005, 0.25)  # seconds between two looks for a value: at first, and at most


class Peers:
    """The processes of a run.

    Args:
        rank: of this process.
        size: number of processes.
        store: that all of them reach; None for a process alone.

    Attributes:
        hosts: name of the machine of each process.
        token: of this start of the run, the same in all processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._calls = 0  # of what all processes do together, in the same order
        self.hosts = self._collect(socket.gethostname())
        self.token: str = self.decide(lambda: uuid.uuid4().hex)

    def decide(self, action: Callable[[], _Result]) -> _Result:
        """What the first process's `action` returns, in all processes.

        Args:
            action: returns JSON's values. The other processes do not call it.
        """
        if self.size == 1:
            return action()
        name = self._next("decide")
        if self.rank == 0:
            result = action()
            self.put(name, json.dumps(result))
            return result
        return json.loads(self.wait(name))

    def compare(self, facts: Mapping[str, Any], advice: str) -> None:
        """Compare what each process has found out by itself with the first one's.

        Args:
            facts: JSON's values by what they are called, both for the message.
            advice: what to do where they differ.

        Raises:
            UserError: in all processes, with the first difference.
        """
        for rank, theirs in enumerate(found := self._collect(dict(facts))):
            for fact in {**found[0], **theirs}:
                first, other = found[0].get(fact), theirs.get(fact)
                if first != other:
                    raise UserError(
                        f"{fact} is {_shown(first)} in process 0 ({self.hosts[0]}) and "
                        f"{_shown(other)} in process {rank} ({self.hosts[rank]}): {advice}"
                    )

    def require_shared(self, folder: Path, sees: Callable[[], bool], wait: float = 15.0) -> None:
        """Require that all processes see what the first one has written into a folder.

        Args:
            folder: for the message.
            sees: looks for it.
            wait: seconds until a file system of several machines shows it.

        Raises:
            UserError: in all processes.
        """
        end = time.monotonic() + wait
        while not (seen := sees()) and time.monotonic() < end:
            time.sleep(0.2)
        for rank, found in enumerate(self._collect(seen)):
            if not found:
                raise UserError(
                    f"process {rank} ({self.hosts[rank]}) does not see the folder {folder} of "
                    f"process 0 ({self.hosts[0]}): expected --trainer.default_root_dir on a disk "
                    "that all machines share"
                )

    def agree(self, value: int) -> int:
        """The largest value of all processes."""
        if self.size == 1:
            return value
        name = self._next("agree")
        self.put(f"{name}/{self.rank}", str(value))
        if self._store.add(name, 1) == self.size:  # the last one to come
            keys = [f"{name}/{rank}" for rank in range(self.size)]
            self.put(f"{name}/all", str(max(map(int, self._store.multi_get(keys)))))
            for key in (name, *keys):
                self._store.delete_key(key)
        return int(self.wait(f"{name}/all"))

    def leave(self) -> None:
        """End together: the first process, which may hold the store, is the last to leave."""
        if self.size == 1:
            return
        self.agree(0)
        if self.rank:
            self.put(f"left/{self.rank}", "")
            return
        for rank in range(1, self.size):
            self.wait(f"left/{rank}")

    def put(self, name: str, value: str) -> None:
        """Tell a value."""
        self._store.set(name, value)

    def wait(self, name: str) -> str:
        """A value, as soon as it is told."""
        pause, most = _LOOK
        while not self._store.check([name]):
            time.sleep(pause)
            pause = min(2 * pause, most)
        return str(self._store.get(name).decode())

    def clone(self) -> Any:
        """The store over a connection of its own, for another thread."""
        return self._store.clone()

    def _collect(self, value: Any) -> list[Any]:
        """A value of each process, in all processes."""
        if self.size == 1:
            return [value]
        name = self._next("collect")
        self.put(f"{name}/{self.rank}", json.dumps(value))
        return [json.loads(self.wait(f"{name}/{rank}")) for rank in range(self.size)]

    def _next(self, what: str) -> str:
        self._calls += 1
        return f"{what}/{self._calls}"


def connect(trainer: Any, leave: Callable[[str, int], None], tell: Callable[[str], None]) -> Peers:
    """Start the other processes of this machine, where no launcher has, and connect all.

    Args:
        trainer: Lightning's, whose `fit` finds this done.
        leave: ends this process at once: with a line to print, which may be empty, and an exit
            code.
        tell: prints a line.
    """
    if trainer.world_size == 1:
        return Peers()
    strategy, environment = trainer.strategy, trainer.strategy.cluster_environment
    started = []
    if isinstance(launcher := strategy.launcher, _SubprocessScriptLauncher):
        environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
        if not environment.creates_processes_externally:
            launcher._call_children_scripts()
            started = launcher.procs
    with Gathering(trainer.world_size, started, leave, tell):
        join_torchrun(strategy, trainer.global_rank, trainer.world_size)
        strategy.setup_environment()
        store = dist.PrefixStore("peers", dist.distributed_c10d._get_default_store())
        return Peers(trainer.global_rank, trainer.world_size, store)


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)
