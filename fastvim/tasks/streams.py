"""The stream that a run trains on.

The default stream of CUDA waits for what libraries do on theirs, and they wait for it: each copy of
a decoder in another thread would take as long as a whole captured step.
"""

from __future__ import annotations

import torch


def leave_default_stream(device: torch.device) -> None:
    """Let this thread work on a stream of its own; nothing on another device than a GPU."""
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(stream)


def return_to_default_stream(device: torch.device) -> None:
    """Undo `leave_default_stream`."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        torch.cuda.set_stream(torch.cuda.default_stream(device))
        torch.cuda.current_stream(device).wait_stream(stream)
