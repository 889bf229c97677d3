"""What processes tell each other, here threads with a store; and that of torchrun's starts."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import free_port
from torch.distributed import TCPStore

from fastvim.errors import UserError
from fastvim.tasks.cluster.peers import Peers
from fastvim.tasks.cluster.rendezvous import _name_of_start

HOST = socket.gethostname()


@pytest.fixture
def stores() -> list[TCPStore]:
    """A store for each of three processes."""
    port = free_port()
    places = (True, False, False)
    return [TCPStore("127.0.0.1", port, is_master=own, wait_for_workers=False) for own in places]


def together(work: Callable[[int], Any], ranks: range = range(3)) -> list[Any]:
    """What each process makes of its rank, or the error that it ends with."""

    def attempt(rank: int) -> Any:
        try:
            return work(rank)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(attempt, ranks))


@pytest.fixture
def peers(stores) -> list[Peers]:
    return together(lambda rank: Peers(rank, 3, stores[rank]))


def test_one_decides_and_all_agree(peers):
    assert together(lambda rank: peers[rank].decide(lambda: [rank, None])) == [[0, None]] * 3
    for _ in range(2):  # nothing is left over from the time before
        assert together(lambda rank: peers[rank].agree(5 - rank)) == [5, 5, 5]
    assert len({each.token for each in peers}) == 1


def test_a_difference_is_told_in_all_processes(peers):
    facts = [{"the step": 4, "x": 1}, {"the step": 4, "x": 1}, {"the step": 6}]
    line = f"the step is 4 in process 0 ({HOST}) and 6 in process 2 ({HOST}): share"
    assert together(lambda rank: peers[rank].compare(facts[rank], "share")) == [line] * 3
    assert together(lambda rank: peers[rank].compare({"x": None}, "share")) == [None] * 3


def test_a_folder_that_one_process_does_not_see(peers):
    begun = time.monotonic()
    sees = [lambda: True, lambda: time.monotonic() > begun + 0.3, lambda: False]

    def require(rank: int) -> None:
        peers[rank].require_shared(Path("run"), sees[rank], wait=0.6)

    line = (
        f"process 2 ({HOST}) does not see the folder run of process 0 ({HOST}): expected "
        "--trainer.default_root_dir on a disk that all machines share"
    )
    assert together(require) == [line] * 3
    sees[2] = sees[1]  # a file system shows it somewhat later
    assert together(require) == [None] * 3


def test_each_start_of_torchrun_has_a_name_of_its_own(stores):
    """In one store, where those that have ended have left what they said."""
    names = [together(lambda rank: _name_of_start(stores[rank], rank, 3)) for _ in range(3)]
    assert [len({*found}) for found in names] == [1, 1, 1]
    assert len({found[0] for found in names}) == 3
