"""The one capture: what it refuses, what it records, and that nothing else records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastvim
from fastvim.cudagraph import record, warm_up

ROOT = Path(fastvim.__file__).parent


def test_graphs_are_recorded_in_one_file():
    capture = re.compile(r"cuda\.graph\(|CUDAGraph\(|graph_pool_handle\(|make_graphed_callables\(")
    files = [*ROOT.rglob("*.py"), *(ROOT.parent / "measurements").glob("*.py")]
    assert [file.name for file in files if capture.search(file.read_text())] == ["cudagraph.py"]


@pytest.mark.gpu
def test_a_recorded_call_computes_in_its_replays():
    x = torch.zeros(3, device="cuda")
    calls = []

    def double() -> torch.Tensor:
        calls.append(1)
        return 2 * x

    stream = torch.cuda.Stream()
    assert warm_up(double, stream, 3, "call") is None
    assert len(calls) == 3 + 1  # the last one looks for synchronisations
    graph, result = record(double, stream)
    x.fill_(2)
    graph.replay()
    assert result.tolist() == [4, 4, 4]
    assert len(calls) == 5


@pytest.mark.gpu
def test_a_synchronisation_is_the_reason():
    x = torch.ones(3, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    reason = warm_up(lambda: x.sum().item(), torch.cuda.Stream(), 1, "sum")
    assert reason is not None
    assert reason.startswith("the sum synchronises with the GPU (")
    assert torch.cuda.get_sync_debug_mode() == mode
    with pytest.raises(RuntimeError, match="of its own"):
        warm_up(lambda: fail(RuntimeError("of its own")), torch.cuda.Stream(), 1, "sum")


def fail(error: Exception) -> None:
    raise error
