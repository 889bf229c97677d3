"""Launches for many tensors, replayed from CUDA graphs where the tensors stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastvim.cudagraph import record

ALIKE = 3  # calls, before the next one is recorded
MOST = 4  # recordings: what changes its places again and again is called


class Replayed:
    """A function of tensors, which on a GPU is recorded once and then replayed.

    To hand hundreds of tensors to torch takes the host longer than the GPU needs for them. A graph
    has their places in memory in it. It is replayed as long as tensors lie where they lay, and what
    else the function depends on is the same; else the function is called.

    Args:
        function: launches work on torch's current stream, waits for nothing, and gives a tensor or
            None. What it gives is overwritten by the next call. It should not hold who holds this:
            a graph is freed best where nothing refers to it any more, not by a collection of cycles
            in whatever process.
    """

    def __init__(self, function: Callable[..., Tensor | None]) -> None:
        self._function = function
        self._known: tuple[Any, ...] = ()
        self._alike = self._recorded = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def __call__(self, *lists: list[Tensor], settings: Any = None) -> Tensor | None:
        """What the function gives for some lists of tensors.

        Args:
            *lists: its arguments.
            settings: what else it depends on, compared by value.
        """
        first = lists[0][0] if lists[0] else None
        # A divided tensor does not tell where it lies.
        if first is None or not first.is_cuda or type(first) not in (Tensor, nn.Parameter):
            return self._function(*lists)
        known = ([_places(tensors) for tensors in lists], settings)
        if known != self._known:
            self._known, self._alike, self._graph = known, 0, None
        if self._graph is None:
            self._alike += 1
            wanted = self._alike > ALIKE and self._recorded < MOST
            if not wanted or torch.cuda.is_current_stream_capturing():
                return self._function(*lists)
            self._recorded += 1
            stream = torch.cuda.Stream(first.device)
            stream.wait_stream(torch.cuda.current_stream())
            self._graph, self._result = record(lambda: self._function(*lists), stream)
        self._graph.replay()
        return self._result


def _places(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
