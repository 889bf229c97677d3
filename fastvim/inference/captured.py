"""Inference at one batch shape: the whole forward pass as one CUDA graph.

B  batch, C H W  channels, height and width of the images

>>> predictor = Predictor(model, (64, 3, 224, 224))  # doctest: +SKIP
>>> logits = predictor(images)  # doctest: +SKIP
"""

from __future__ import annotations

import copy as copying
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastvim.cudagraph import WARMUP, record, warm_up

_logger = logging.getLogger(__name__)


class Predictor:
    """An image model for batches of one shape, its forward pass captured.

    The forward pass is recorded as one CUDA graph over fixed buffers and replayed for every batch.
    On a CPU, and for a model whose forward pass synchronises with the GPU, the model runs eagerly:
    `captured` is False, `reason` says why, and the log has one line.

    The model is copied by default: the caller's module keeps its mode, dtype and device, and the
    copy is `predictor.model`. Weights written into that module *in place* (`load_state_dict`,
    `copy_`) count from the next replay on. A parameter or a layer replaced by another object is not
    seen. One predictor serves one thread at a time. The caller orders calls from different CUDA
    streams.

    Args:
        model: any module that takes images (B, C, H, W) and returns a tensor, or tuples, lists and
            dicts of tensors. The batch is the first axis of each.
        shape: (B, C, H, W) of the batches.
        dtype: of weights and images. Default: bfloat16 on CUDA, float32 elsewhere and with
            `autocast`.
        device: default: the model's.
        autocast: dtype of an autocast region around the model, such as bfloat16 over float32
            weights. None: no autocast, even inside an autocast region of the caller.
        compile: `torch.compile` the model (whole, static shapes) first.
        capture: record the graph; False to run eagerly.
        memory_format: `torch.channels_last` suits convolutional models.
        copy_model: False takes the module itself: it is cast, moved and set to eval mode. No second
            set of weights is made.
        warmup: eager runs before the recording, in which kernels are compiled and tuned.

    Attributes:
        model: the module that serves.
        images: static input (B, C, H, W) of `replay`.
        captured: whether a graph is replayed.
        reason: why not, or None.

    Raises:
        ValueError: a shape that is not four positive numbers, or no warm-up.
        RuntimeError: the recording failed for another reason than a synchronisation. Do not use
            CUDA in this process afterwards; `capture=False` avoids the recording.
    """

    model: nn.Module
    images: Tensor
    captured: bool
    reason: str | None

    # Tensors made under inference mode cannot be written to outside of it. The graph's random state
    # would be one of them.
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
        warmup: int = WARMUP,
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
                (integers are not rescaled). If the model is captured or compiled, fewer than B
                images are filled up with zeros and the output is cut. From pinned memory the copy
                is asynchronous: do not change the source before the output is there.
            copy: False returns the static output itself, which the next call overwrites.

        Returns:
            What the model returns for these images, in new tensors.

        Raises:
            ValueError: images of another shape, or more than B of them.
        """
        count = self._count(images)
        with torch.no_grad():
            if self.captured or self._compiled:  # for batches of B images only
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
        """Compute on `self.images`. Returns the static output, or a new one if eager.

        Write the images there in place to avoid both copies of `__call__`.
        """
        if self._graph is None:
            return self._forward(self.images)
        self._graph.replay()
        return self._output

    def _forward(self, images: Tensor) -> Any:
        # An autocast region of our own, without a cache: the caller's region must not reach into
        # the graph. It frees the weights in its cache when it ends.
        region = torch.autocast(
            self.device.type,
            dtype=self.autocast,
            enabled=self.autocast is not None,
            cache_enabled=False,
        )
        # Compiled code gains nothing from inference mode. torch.compile fails under it if a
        # function uses a NumPy constant.
        with torch.inference_mode(not self._compiled), torch.no_grad(), region:
            return self._run(images)

    def _capture(self, warmup: int) -> None:
        """Record one forward pass."""
        stream = torch.cuda.Stream(self.device)
        forward = partial(self._forward, self.images)
        self.reason = warm_up(forward, stream, warmup, "forward pass", ahead=True)
        if self.reason is not None:
            _logger.warning("running eagerly: %s", self.reason)
            return
        self._graph, self._output = record(forward, stream)
        self.captured = True

    def _count(self, images: Tensor) -> int:
        """How many images there are, of the right shape."""
        most, *shape = self.images.shape
        if images.ndim != 4 or list(images.shape[1:]) != shape or not 1 <= len(images) <= most:
            expected = ", ".join(map(str, [f"1 to {most}" if most > 1 else 1, *shape]))
            raise ValueError(f"images {tuple(images.shape)}: expected ({expected})")
        return len(images)


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
    """`cuda` as the current device's index, so that all tensors lie on one device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
