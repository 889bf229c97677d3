"""A stream of CUDA for what runs beside a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Compute on a stream of its own on a GPU; on other devices nothing changes.

    The default stream of CUDA waits for what libraries do on theirs, and they wait for it: each
    copy of a decoder in another thread would take as long as a whole captured step.
    """
    if device.type != "cuda":
        yield
        return
    before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)
