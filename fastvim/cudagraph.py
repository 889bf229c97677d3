"""Capture of CUDA graphs, one call at a time.

A small model on a fast GPU spends its time launching kernels. A graph holds all kernels of a call
and launches them at once. Every capture follows the same steps: `warm_up` the call on a side
stream, give up if it synchronises with the GPU, `record` it, replay the graph. The graph reads and
writes the same memory in every replay, so a caller writes new inputs into the recorded tensors.

B  batch
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fastvim.ops.triton.ahead import left_out_by

_logger = logging.getLogger(__name__)

WARMUP = 3  # calls before a recording

Result = TypeVar("Result")


def warm_up(
    call: Callable[[], object],
    stream: torch.cuda.Stream,
    count: int,
    what: str,
    *,
    ahead: bool = False,
) -> str | None:
    """Make a call on a side stream until every kernel is compiled and tuned.

    Args:
        call: what is to be recorded.
        stream: the stream of the recording.
        count: how many times to call.
        what: names the call in the answer, as in "forward pass".
        ahead: `compile_ahead` first.

    Returns:
        Why the call cannot be recorded, or None.
    """
    _collect_autograd()
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        if ahead:
            compile_ahead(call)
        for _ in range(count):
            call()
        reason = why_not_captured(call, what)
    current.wait_stream(stream)
    return reason


def compile_ahead(call: Callable[[], object]) -> None:
    """Compile the kernels of FastVim that a call is going to launch, with a thread on each core.

    The call is made once without them (`fastvim.ops.triton.ahead.left_out_by`): what it gives means
    nothing, and whatever it changes is the caller's to restore.
    """
    if requests := left_out_by(call):
        from fastvim.ops.triton.parallel import compile_all

        compile_all(requests)


def compile_for(model: nn.Module, images: Tensor) -> None:
    """Compile the kernels of a model for such images, as `compile_ahead` does.

    Those of the forward pass, and of the backward pass where gradients are on. Buffers, gradients
    and random states stay as they are. A model with hooks is left alone: they would look at results
    that mean nothing.

    Args:
        model: takes images (B, ...) and returns tensors, in its present mode and autocast region.
        images: as the model takes them.
    """
    if has_hooks(model):
        return
    device = images.device
    dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)

    def call() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
            outputs, _ = tree_flatten(model(images))
        roots = [output for output in outputs if output.requires_grad]
        if roots:
            trained = [p for p in model.parameters() if p.requires_grad]
            ones = [torch.ones_like(root) for root in roots]
            torch.autograd.grad(roots, trained, ones, allow_unused=True)

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device] if images.is_cuda else []):
        compile_ahead(call)
    for buffer, before in buffers:
        buffer.copy_(before)


def why_not_captured(call: Callable[[], object], what: str) -> str | None:
    """Why a call cannot be recorded: None, unless it synchronises with the GPU.

    A recording that fails leaves torch's random state and allocator broken. So its usual cause is
    looked for beforehand.

    Args:
        call: made once.
        what: names the call in the answer, as in "forward pass".
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return f"the {what} synchronises with the GPU ({str(error).splitlines()[0]})"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def record(
    call: Callable[[], Result], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record a call as a CUDA graph. Nothing is computed.

    Args:
        call: warmed up before.
        stream: the stream of the warm-up.
        pool: a `shared_pool`. Default: a pool of the graph's own.

    Returns:
        The graph, and what the call returned. Each replay overwrites the tensors in it.
    """
    _collect_autograd()
    graph = torch.cuda.CUDAGraph()
    # Other threads (loaders that pin memory) may continue: only this one is recorded.
    with torch.cuda.graph(graph, pool, stream=stream, capture_error_mode="thread_local"):
        result = call()
    return graph, result


def shared_pool() -> Any:
    """Memory for several graphs, of which one writes what the next one reads."""
    return torch.cuda.graph_pool_handle()


def _collect_autograd() -> None:
    """Free autograd graphs that reference cycles keep alive.

    Autograd's node for a weight's gradient belongs to the stream that first used it. A node left
    over from another stream would break the recording.
    """
    gc.collect()


def has_hooks(model: nn.Module) -> bool:
    """Whether something is called with what modules take or give."""
    modules = model.modules()
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)
