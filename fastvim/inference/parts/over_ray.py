"""Parts computed by the actors of a Ray cluster.

Ray schedules and nothing else: an actor writes the parts that it is given, and a part that exists
is done. So a lost worker or node, or a driver that is started again, costs unfinished parts alone.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch

from fastvim.errors import MachineError, UserError, one_line
from fastvim.extras import install
from fastvim.inference.parts.loop import SAFE, Report, Run, Spent, compute, open_for
from fastvim.inference.parts.work import Failure, Opened, Work

AT_ONCE = 8  # parts of a task on a GPU: images are read ahead from one to the next
WAITING = 2  # tasks of an actor: the next one lies ready when one ends
MOST_LOSSES = 5  # of a part, with the actor that had it
_POLL = 5.0  # seconds between looks at the nodes


def compute_over_ray(
    address: str,
    device: torch.device | None,
    work: Work,
    run: Run,
    opened: Opened,
    missing: list[int],
    report: Report,
    workers: int | None,
) -> None:
    """Compute parts with actors: one a GPU, or one a core where no node has a GPU.

    Args:
        address: of the cluster as Ray has it, such as "auto"; "local" for this machine.
        device: "cpu" leaves GPUs alone.
        work: that each actor opens; files that it names are at the same paths on every node.
        run: that the parts belong to.
        opened: hears what the actors have seen.
        missing: numbers of the parts.
        report: is told what all of them do, a task at a time.
        workers: processes that read images for each actor; None for what suits the node.

    Raises:
        UserError: no such cluster, or what an actor raises.
        MachineError: no node is left, or a part was lost again and again.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--ray {address}: ray is not installed: {install('ray')}") from error
    began = not ray.is_initialized()
    if began:
        try:
            _knock(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--ray {address}: no cluster ({one_line(error)})") from error
    try:
        _Driver(ray, device, work, run, opened, missing, report, workers).drive()
    finally:
        if began:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError where nobody answers at HOST:PORT, at once; Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


@dataclass
class _Driver:
    """Hands parts to actors until all exist."""

    ray: Any
    device: torch.device | None
    work: Work
    run: Run
    opened: Opened
    missing: list[int]
    report: Report
    workers: int | None
    waiting: deque[int] = field(default_factory=deque)  # parts that no actor has
    tasks: dict[Any, tuple[Any, list[int]]] = field(default_factory=dict)  # actor and its parts
    actors: dict[str, list[Any]] = field(default_factory=dict)  # of each node
    losses: Counter[int] = field(default_factory=Counter)

    def drive(self) -> None:
        self.waiting.extend(self.missing)
        while self.waiting or self.tasks:
            self._fill()
            if not self.actors:
                raise MachineError(f"no node of the Ray cluster is left; {SAFE}")
            self._hand_out()
            ended, _ = self.ray.wait(list(self.tasks), timeout=_POLL)
            for task in ended:
                self._take(task)

    def _fill(self) -> None:
        """An actor for each GPU or core of the nodes that are alive."""
        nodes = {node["NodeID"]: node["Resources"] for node in self.ray.nodes() if node["Alive"]}
        gpus = {key: int(has.get("GPU", 0)) for key, has in nodes.items()}
        if not any(gpus.values()) or (self.device is not None and self.device.type == "cpu"):
            gpus = {}
        for key in [key for key in self.actors if key not in nodes]:
            del self.actors[key]
        for key, has in nodes.items():
            cores = int(has.get("CPU", 0))
            number = gpus.get(key, 0) if gpus else cores
            here = self.actors.setdefault(key, []) if number else []
            while len(here) < number:
                workers = self.workers
                if workers is None:
                    workers = max(1, cores // number) if gpus else 0
                here.append(self._actor(key, bool(gpus), workers))

    def _actor(self, node: str, gpu: bool, workers: int) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # No core is asked for: on a node of one core nothing else could run.
        actor = self.ray.remote(_Actor).options(
            num_cpus=0,
            num_gpus=int(gpu),
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        return actor.remote(self.work, self.run, gpu, workers, os.getcwd())

    def _hand_out(self) -> None:
        actors = [actor for here in self.actors.values() for actor in here]
        busy = Counter(actor for actor, _ in self.tasks.values())
        for turn in range(WAITING):
            for actor in actors:
                if not self.waiting or busy[actor] > turn:
                    continue
                most = AT_ONCE if self.device is None or self.device.type == "cuda" else 1
                number = max(1, min(most, len(self.waiting) // (WAITING * len(actors))))
                parts = [self.waiting.popleft() for _ in range(number)]
                self.tasks[actor.compute.remote(parts)] = actor, parts
                busy[actor] += 1

    def _take(self, task: Any) -> None:
        """What a task returns; its parts go to another actor where it was lost."""
        errors = self.ray.exceptions
        actor, parts = self.tasks.pop(task)
        try:
            failures, spent, told = self.ray.get(task)
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        except errors.RayError as error:
            for here in self.actors.values():
                if actor in here:
                    here.remove(actor)
            self._give_back(parts, error)
            return
        self.opened.hear(told)
        for failure in failures:
            self.report.failed(failure)
        self.report.advance(sum(map(self.run.manifest.size, parts)), spent)

    def _give_back(self, parts: list[int], error: Exception) -> None:
        done = self.run.manifest.done(self.run.parts)
        for part in parts:
            self.losses[part] += 1
            if part in done:
                self.report.advance(self.run.manifest.size(part), Spent())
            elif self.losses[part] >= MOST_LOSSES:
                raise MachineError(
                    f"part {part} was lost {MOST_LOSSES} times with the worker that computed it "
                    f"({type(error).__name__}); {SAFE}"
                )
            else:
                self.waiting.appendleft(part)


class _Actor:
    """Computes parts on a node."""

    def __init__(self, work: Work, run: Run, gpu: bool, workers: int, folder: str) -> None:
        self.failures: list[Failure] = []
        self.spent = Spent()
        self.device = torch.device("cuda" if gpu else "cpu")
        self.run, self.workers = run, workers
        self.work, self.folder = work, folder
        self.opened: Opened | None = None

    def compute(self, parts: list[int]) -> tuple[list[Failure], Spent, Any]:
        """Compute and write parts; the images that failed, the time, and what was seen of all."""
        if self.opened is None:  # not earlier: Ray keeps the errors of a constructor to itself
            self._open()
        assert self.opened is not None
        self.failures, self.spent = [], Spent()
        compute(self.run, self.opened, parts, self.device, self, self.workers)
        return self.failures, self.spent, self.opened.pass_on()

    def _open(self) -> None:
        try:
            os.chdir(self.folder)  # relative paths are the driver's
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}; expected on every node") from error
        self.opened = open_for(self.work, self.run, self.device)

    def advance(self, images: int, spent: Spent) -> None:
        """The driver hears of whole tasks."""
        self.spent = self.spent.plus(spent)

    def failed(self, failure: Failure) -> None:
        """For the driver."""
        self.failures.append(failure)
