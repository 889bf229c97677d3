"""Batches finished ahead on a GPU: what counts as waiting for them."""

from __future__ import annotations

import time

import pytest
import torch

from fastvim.data.workers import WatchedLoader

COUNT, SECONDS = 30, 0.02
CYCLES = 40_000_000  # some 20 ms of a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["the loader", "the GPU", "the host"])
def test_waiting_is_the_time_in_which_the_gpu_has_nothing_to_do(slow: str) -> None:
    def finish(batch: torch.Tensor) -> torch.Tensor:
        time.sleep(SECONDS if slow == "the loader" else 0)
        return batch.cuda()

    loader = WatchedLoader(range(COUNT), num_workers=1, patience=0, finish=finish)
    loader.ahead = torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for number, _ in enumerate(loader):
            if number == 1:  # until then processes start
                before = loader.waited
            if slow == "the GPU":
                torch.cuda._sleep(CYCLES)
            time.sleep(SECONDS if slow == "the host" else 0)
    waited = loader.waited - before
    if slow == "the loader":
        assert 0.5 * COUNT * SECONDS < waited < 2 * COUNT * SECONDS
    else:
        assert waited < 0.2 * COUNT * SECONDS
