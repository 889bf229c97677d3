"""Serving one model at one batch shape: the whole forward pass as one captured CUDA graph.

B  batch, C H W  channels, height and width of the images

>>> predictor = Predictor(model, (64, 3, 224, 224))  # doctest: +SKIP
>>> logits = predictor(images)  # doctest: +SKIP
"""

from __future__ import annotations

import copy as copying
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


class Predictor:
    """An image model that answers batches of one shape with the least overhead.

    A small model on a fast GPU spends its time launching kernels. Here the forward pass is run
    once, recorded as one CUDA graph over fixed buffers, and replayed for every batch. Where that is
    not possible (on a CPU, or for a model whose forward waits for the device) the same object runs
    the model eagerly: `captured` is False, `reason` says why, and the log has one line.

    The model is copied by default: the caller's module keeps its mode, dtype and device, and the
    copy is `predictor.model`. Weights written into that module *in place* (`load_state_dict`,
    `copy_`) are what the next replay computes with; replacing a parameter or a layer by another
    object is not seen. One predictor serves one thread at a time, and calls from different CUDA
    streams have to be ordered by the caller.

    Args:
        model: any module that takes images (B, C, H, W); its outputs, a tensor or tuples, lists
            and dicts of tensors, have the batch as their first axis.
        shape: (B, C, H, W) of the batches.
        dtype: of weights and images. Default: bfloat16 on CUDA, float32 elsewhere and with
            `autocast`.
        device: default: where the model is.
        autocast: dtype of an autocast region around the model, such as bfloat16 over float32
            weights; None for none, also where the caller has one.
        compile: `torch.compile` the model (whole, static shapes) first.
        capture: record the graph; False to run eagerly.
        memory_format: `torch.channels_last` suits convolutional models.
        copy_model: False takes the module itself: it is cast, moved and set to eval mode for good,
            and no second set of weights is made.
        warmup: eager runs before the recording, in which kernels are compiled and tuned.

    Attributes:
        model: the module that serves.
        images: static input (B, C, H, W): what `replay` computes on.
        captured: whether a graph is replayed.
        reason: why not, or None.

    Raises:
        ValueError: a shape that is not four positive numbers, or no warm-up.
        RuntimeError: the recording failed for another reason, which `capture=False` avoids; CUDA
            in this process should then be given up.
    """

    model: nn.Module
    images: Tensor
    captured: bool
    reason: str | None

    # Under inference mode tensors would be made that nothing may write to outside of it: the
    # graph's own random state among them.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        capture: bool = True,
        memory_format: torch.memory_format = torch.contiguous_format,
        copy_model: bool = True,
        warmup: int = 3,
    ) -> None:
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"shape {tuple(shape)}: expected (B, C, H, W), each 1 or more")
        if warmup < 1:
            raise ValueError(f"warmup={warmup}: expected 1 or more")
        self.device = _device_of(model) if device is None else _indexed(torch.device(device))
        if dtype is None:
            low = self.device.type == "cuda" and autocast is None
            dtype = torch.bfloat16 if low else torch.float32
        self.dtype = dtype
        self.autocast = autocast
        self.memory_format = memory_format
        model = copying.deepcopy(model) if copy_model else model
        model = model.to(device=self.device, dtype=dtype)
        self.model = model.to(memory_format=memory_format).eval()
        self._compiled = compile
        self._run: Callable[[Tensor], Any] = self.model
        if compile:
            self._run = torch.compile(self.model, fullgraph=True, dynamic=False)
        empty = torch.empty(*shape, dtype=dtype, device=self.device, memory_format=memory_format)
        self.images = empty.zero_()
        self.captured = False
        self.reason = None if capture else "capture=False"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Any = None
        if not capture:
            return
        if self.device.type != "cuda":
            self.reason = f"CUDA graphs need a CUDA device, not {self.device.type}"
            _logger.info("running eagerly: %s", self.reason)
            return
        with torch.cuda.device(self.device):
            self._capture(warmup)

    def __call__(self, images: Tensor, *, copy: bool = True) -> Any:
        """The model's output for a batch.

        Args:
            images: (1 to B, C, H, W) of any device and dtype, converted as `Tensor.to` does
                (integers are not rescaled). Fewer than B images are filled up with zeros where
                the model is captured or compiled, and the output is cut. From pinned memory the
                copy is asynchronous: leave the source alone until the output is there.
            copy: False returns the static output itself, which the next call overwrites.

        Returns:
            What the model returns, of so many images, in an ordinary tensor of the caller's own.

        Raises:
            ValueError: images of another shape, or more than B of them.
        """
        count = self._count(images)
        with torch.no_grad():
            if self.captured or self._compiled:  # either is made for the whole batch alone
                self.images[:count].copy_(images, non_blocking=True)
                self.images[count:].zero_()
                output = self.replay()
                if count < len(self.images):
                    output = _each(lambda tensor: tensor[:count], output)
            else:
                batch = images.to(
                    device=self.device,
                    dtype=self.dtype,
                    memory_format=self.memory_format,
                    non_blocking=True,
                )
                output = self._forward(batch)
            return _each(torch.clone, output) if copy else output

    def replay(self) -> Any:
        """Compute on what `images` holds; returns the static output (eagerly: a new one).

        With `images` written in place this leaves out both copies of `__call__`.
        """
        if self._graph is None:
            return self._forward(self.images)
        self._graph.replay()
        return self._output

    def _forward(self, images: Tensor) -> Any:
        # Always an autocast region of our own: one of the caller's must not reach into the graph,
        # nor weights that its cache holds, since they are freed when it ends.
        region = torch.autocast(
            self.device.type,
            dtype=self.autocast,
            enabled=self.autocast is not None,
            cache_enabled=False,
        )
        # Compiled code gains nothing from inference mode, and torch.compile fails under it where a
        # function uses a NumPy constant.
        with torch.inference_mode(not self._compiled), torch.no_grad(), region:
            return self._run(images)

    def _capture(self, warmup: int) -> None:
        """Record one forward pass, after runs in which every kernel is built and tuned."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                self._forward(self.images)
            forward = partial(self._forward, self.images)
            self.reason = why_not_captured(forward, "forward pass")
        torch.cuda.current_stream(self.device).wait_stream(stream)
        if self.reason is not None:
            _logger.warning("running eagerly: %s", self.reason)
            return
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (loaders that pin memory) may go on: only this one is recorded.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._output = self._forward(self.images)
        self.captured = True

    def _count(self, images: Tensor) -> int:
        """How many images there are, of the right shape."""
        most, *shape = self.images.shape
        if images.ndim != 4 or list(images.shape[1:]) != shape or not 1 <= len(images) <= most:
            expected = ", ".join(map(str, [f"1 to {most}" if most > 1 else 1, *shape]))
            raise ValueError(f"images {tuple(images.shape)}: expected ({expected})")
        return len(images)


def why_not_captured(call: Callable[[], object], what: str) -> str | None:
    """Why a call cannot be recorded as a CUDA graph, if it waits for the device somewhere, or None.

    A recording that fails leaves torch's random state and allocator broken, so that the usual
    reason is looked for beforehand.

    Args:
        call: made once.
        what: names it in the answer, as in "forward pass".
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
        return f"the {what} waits for the device ({str(error).splitlines()[0]})"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def _each(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Apply a function to every tensor of a model's output."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, dict):
        return {key: _each(function, value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return type(output)([_each(function, value) for value in output])
    return output


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _indexed(device: torch.device) -> torch.device:
    """`cuda` as the current one of them, so that all that is made lies on the same."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
