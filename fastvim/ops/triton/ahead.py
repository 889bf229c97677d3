"""Kernels that are compiled before their first launch, all at once.

A kernel is compiled when it is first launched, and a training step has more than twenty. So a call
can be made once without them: each launch notes what it would have compiled and computes nothing.
`parallel` then compiles what was noted. This file is imported on machines without Triton.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)


class Pointer:
    """What Triton looks at in a tensor. It keeps no memory.

    Args:
        tensor: what it stands for.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self._address = tensor.dtype, tensor.data_ptr()

    def data_ptr(self) -> int:
        """The tensor's address, of which Triton takes the alignment."""
        return self._address


class Request(NamedTuple):
    """A launch that was left out.

    Attributes:
        kernel: a `triton.jit` function.
        arguments: in the kernel's order, each tensor as a `Pointer`.
        options: of the compiler.
        device: of the tensors.
    """

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, int]
    device: torch.device


# Not of a thread or a context: autograd launches kernels in threads of its own.
_requests: dict[Any, Request] | None = None  # by launch


def left_out(launch: Any, kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> bool:
    """Note a launch that has not been compiled, and say whether it is to be left out.

    Args:
        launch: a `Launch`, which has a device; noted once.
        kernel, arguments, options: what it gives to Triton.
    """
    if _requests is None:
        return False
    kept = tuple(Pointer(each) if isinstance(each, Tensor) else each for each in arguments)
    _requests[launch] = Request(kernel, kept, options, launch.device)
    return True


def left_out_by(call: Callable[[], object]) -> list[Request]:
    """Make a call without the kernels that this process has not launched yet, and list these.

    Their outputs stay as they are found. So what the call gives means nothing, and it may fail
    where it depends on that. The caller restores whatever the call changes.

    Args:
        call: takes the same inputs as the calls that follow.
    """
    global _requests
    assert _requests is None, "one call at a time"
    _requests = requests = {}
    try:
        # It would look for NaN in memory that nobody has written.
        with torch.autograd.set_detect_anomaly(False):
            call()
    except Exception as error:
        _logger.debug("the call without kernels: %s", error)
    finally:
        _requests = None
    return [*requests.values()]
