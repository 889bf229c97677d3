"""The process group of processes that torchrun has started again on several machines.

torchrun keeps one store for all its starts. torch finds the addresses of processes there that have
ended, and other machines count the starts otherwise. So the first process gives each start a name,
and the values of a start are below it.
"""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

import torch.distributed as dist

_LOOK = 0.05  # seconds between two looks


def join_torchrun(strategy: Any, rank: int, size: int) -> None:
    """Make the process group in torchrun's store, if the processes are in one of torchrun's.

    Args:
        strategy: of Lightning's trainer, which makes the group itself otherwise.
        rank: of this process.
        size: number of processes.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    strategy.accelerator.setup_device(strategy.root_device)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=strategy._timeout)
    name = _name_of_start(dist.PrefixStore("fastvim", store), rank, size)
    dist.init_process_group(
        strategy._get_process_group_backend(),
        store=dist.PrefixStore(f"fastvim/{name}", store),
        rank=rank,
        world_size=size,
        timeout=strategy._timeout,
        device_id=None if strategy.root_device.type == "cpu" else strategy.root_device,
    )


def _name_of_start(store: Any, rank: int, size: int) -> str:
    """A name that the processes of this start alone have.

    Each one asks under a name of its own, which no earlier process had. The first process answers
    whoever asks, until all of this start have said that they heard it.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", mine)
        _wait(store, f"answer/{mine}")
        start = str(store.get(f"answer/{mine}").decode())
        store.set(f"heard/{start}/{rank}", "")
        _wait(store, f"begin/{start}")
        return start
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"heard/{mine}/{other}"]):
                missing.remove(other)
            elif store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", mine)
        time.sleep(_LOOK)
    store.set(f"begin/{mine}", "")
    return mine


def _wait(store: Any, key: str) -> None:
    while not store.check([key]):
        time.sleep(_LOOK)
