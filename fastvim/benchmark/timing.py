"""Time and memory of something that can be called again and again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

# A group of calls is timed as one: so long that the clock's resolution and the gaps at its ends do
# not count.
GROUP_SECONDS = {"cuda": 0.05, "cpu": 0.02}
MOST_CALLS = 1000


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over groups, and the quartiles around it."""

    median: float
    lower: float
    upper: float


def measure(
    call: Callable[[], object], device: torch.device, warmup: int = 10, repeats: int = 10
) -> Timing:
    """Time a call: warm up, then `repeats` groups of as many calls as fill `GROUP_SECONDS`.

    On CUDA the groups run without a pause, between events on the current stream;
    elsewhere by the process's clock.
    """
    for _ in range(max(warmup, 1)):
        call()
    calls = 1
    (single,) = _groups(call, device, calls, 1)
    wanted = GROUP_SECONDS["cuda" if device.type == "cuda" else "cpu"]
    calls = min(max(1, math.ceil(wanted / max(single, 1e-7))), MOST_CALLS)
    lower, median, upper = np.percentile(_groups(call, device, calls, repeats), [25, 50, 75])
    return Timing(float(median), float(lower), float(upper))


def _groups(
    call: Callable[[], object], device: torch.device, calls: int, repeats: int
) -> list[float]:
    """Seconds of one call, in each of `repeats` groups of `calls` calls."""
    if device.type != "cuda":
        ends = [time.perf_counter()]
        for _ in range(repeats):
            for _ in range(calls):
                call()
            ends.append(time.perf_counter())
        return [(b - a) / calls for a, b in pairwise(ends)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        for _ in range(calls):
            call()
        event.record()
    torch.cuda.synchronize(device)
    return [1e-3 * first.elapsed_time(last) / calls for first, last in pairwise(events)]


def reset_peak(device: torch.device) -> None:
    """Reset the peak of the memory in use (CUDA only)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Most GiB in use at one time since `reset_peak`; None where torch does not count it.

    Bytes in live tensors, which includes those in a graph's own pool: the recording allocates
    them just as an eager run does. What the allocator keeps free for later is left out.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30
