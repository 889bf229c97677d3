"""Processes whose main thread does not go on, although another of their threads lives."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from processes import free_port, wait_until
from torch.distributed import TCPStore

from fastvim.tasks.cluster import watch as watching
from fastvim.tasks.cluster.peers import Peers
from fastvim.tasks.cluster.watch import Progress, Watch

HOST = socket.gethostname()
WAITS = f"process 1 ({HOST}) has not finished a step for 0 s, and the others wait for it; "


class Two:
    """The watches of two processes, in this one; what they tell, and how they would end.

    Args:
        quiet: of `Watch`.
    """

    def __init__(self, quiet: tuple[float, float]) -> None:
        port = free_port()
        servers = (True, False)
        stores = [
            TCPStore("127.0.0.1", port, is_master=own, wait_for_workers=False) for own in servers
        ]
        with ThreadPoolExecutor(2) as pool:
            peers = list(pool.map(Peers, (0, 1), (2, 2), stores))
        self.told: list[str] = []
        self.ended: list[tuple[str, int]] = []
        told = (self._safe, self._leave, self.told.append)
        self.watches = [Watch(each, *told, quiet=quiet) for each in peers]
        for each in self.watches:
            each.__enter__()

    def move(self, *counts: int) -> None:
        """Let the main threads be so far."""
        for watch, count in zip(self.watches, counts, strict=True):
            watch.progress.count = count

    def _safe(self) -> str:
        return "last.ckpt holds step 4"

    def _leave(self, line: str, code: int) -> None:
        self.ended.append((line, code))


@pytest.fixture
def two(monkeypatch, request):
    monkeypatch.setattr(watching, "BEAT", 0.02)
    monkeypatch.setattr(watching, "_LINGER", 0.2)
    both = Two(request.param)
    yield both
    for watch in both.watches:
        watch.end()


@pytest.mark.parametrize("two", [(0.3, 60)], indirect=True)
def test_who_is_behind_is_told_once_and_again_after_it_went_on(two):
    for count in range(1, 7):
        two.move(count, count)  # in less than what is told
        time.sleep(0.1)
    assert two.told == []
    two.move(12, 10)
    wait_until(lambda: two.told)
    time.sleep(0.4)
    line = WAITS + "the run ends after 60 s"
    assert two.told == [line]
    two.move(14, 14)
    wait_until(lambda: len(two.told) > 1)
    assert two.told == [line, "no process has finished a step for 0 s; the run ends after 60 s"]
    assert two.ended == []


@pytest.mark.parametrize("two", [(0.1, 0.4)], indirect=True)
def test_a_run_that_does_not_go_on_ends(two):
    two.move(12, 10)
    wait_until(lambda: len({*two.ended}) > 1)
    lines = {line for line, _ in two.ended}
    assert lines == {"", WAITS + "last.ckpt holds step 4"}
    assert {code for _, code in two.ended} == {1}


@pytest.mark.parametrize("two", [(0.1, 0.2)], indirect=True)
def test_before_and_after_training_any_time_is_right(two):
    time.sleep(0.4)
    two.move(12, 0)
    time.sleep(0.4)
    assert (two.told, two.ended) == ([], [])


@pytest.mark.parametrize("two", [(60, 60)], indirect=True)
@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_without_a_sign_of_life(two, silent):
    other = two.watches[1 - silent]
    other._patience = 0.4
    time.sleep(0.2)
    two.watches[silent].end()  # as if it were killed
    wait_until(lambda: two.ended)
    line, code = two.ended[0]
    assert line.startswith(
        f"process {silent} ({HOST}) gives no sign of life for 0 s: it was killed"
    )
    assert (line.endswith("; last.ckpt holds step 4"), code) == (True, 1)


def test_training_and_validation_move_the_count(tmp_path):
    progress, seen = Progress(), []

    class Model(BoringModel):
        def training_step(self, batch, index):
            seen.append(progress.count)
            return super().training_step(batch, index)

        def validation_step(self, batch, index):
            seen.append(progress.count)
            return super().validation_step(batch, index)

    limits = {"limit_train_batches": 3, "limit_val_batches": 2}
    trainer(tmp_path, progress, **limits).fit(Model())
    assert seen == [2, 5, 8, 11, 13]
    assert progress.count == 0
