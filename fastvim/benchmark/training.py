"""A training step that can be called again and again: eager, compiled, or as one CUDA graph.

B  batch, C H W  channels, height and width of the images
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvim.benchmark.cases import Precision
from fastvim.inference import why_not_captured

WARMUP = 3  # steps before a recording, in which kernels are compiled and tuned


Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """In float32, whatever the logits' dtype."""
    return F.cross_entropy(logits.float(), classes)


class Uncapturable(Exception):
    """Why a step cannot be recorded as a CUDA graph."""


class TrainingStep:
    """Forward and backward of a classification, without an optimizer.

    One call: gradients set to None, the forward pass (under autocast if the precision says so),
    the loss, by default cross entropy against `classes`, the backward pass.

    With `capture` the first call records a step as one CUDA graph and every call replays it. The
    recorded step finds no gradients: it makes its own in the graph's pool, and a replay writes
    them anew instead of adding to them. Nothing is set to None then. Dropout draws other numbers
    in every replay: `torch.cuda.graph` moves the random state on. The graph is of the mode (train
    or eval) that the model was in: after a change of it, `release` the graph.

    Args:
        model: gives logits (B, classes).
        images: (B, C, H, W); of a captured step on a CUDA device.
        precision: dtypes.
        compile: run the forward and backward passes through torch.compile.
        capture: record and replay.
        classes: (B,) integers; default: all 0.
        loss: of what the model gives and the classes, a scalar.

    Attributes:
        model: as given.
        images, classes: what every call reads, to be written in place.

    Raises:
        ValueError: `capture` of images elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        precision: Precision,
        *,
        compile: bool = False,
        capture: bool = False,
        classes: Tensor | None = None,
        loss: Loss = cross_entropy,
    ) -> None:
        device = images.device
        if capture and device.type != "cuda":
            raise ValueError(f"capture of images on {device.type}: expected a CUDA device")
        if classes is None:
            classes = torch.zeros(len(images), dtype=torch.long, device=device)
        self.model = model
        self.images = images
        self.classes = classes
        self.autocast = precision.autocast
        self._loss = loss
        self._run = torch.compile(model, fullgraph=True, dynamic=False) if compile else model
        # One stream for all recordings of this step: cuBLAS keeps a workspace for each.
        self._stream = torch.cuda.Stream(device) if capture else None
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def __call__(self) -> Tensor:
        """The logits (B, classes), detached; gradients are in the model's parameters.

        Of a captured step these are the same tensors after every call.

        Raises:
            Uncapturable: the step waits for the device.
        """
        if self._stream is None:
            return self._step()
        if self._recorded is None:
            self._recorded = self._record(self._stream)
        graph, logits = self._recorded
        graph.replay()
        return logits

    def results(self) -> tuple[Tensor, Tensor]:
        """Copies of the logits and of all gradients, in one vector, of one call."""
        logits = self().clone()
        found = [p.grad.float().flatten() for p in self.model.parameters() if p.grad is not None]
        return logits, torch.cat(found)

    def renew(self) -> None:
        """Call once, then write random images and classes in place.

        A graph that the call records has thus not seen them.
        """
        count = self().shape[1]
        self.images.normal_()
        self.classes.random_(count)

    def release(self) -> None:
        """Give up the graph, with its memory; the next call records another."""
        self._recorded = None

    def _step(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        # A recorded step casts the weights in every replay: no cache may hold them.
        region = torch.autocast(
            self.images.device.type,
            dtype=self.autocast,
            enabled=self.autocast is not None,
            cache_enabled=self._stream is None,
        )
        with region:
            logits = self._run(self.images)
        self._loss(logits, self.classes).backward()
        return logits.detach()

    def _record(self, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A step as a graph, and its logits, after steps that build and tune every kernel."""
        # Autograd's node for a weight's gradient belongs to the stream of the step that made it:
        # one that a cycle of objects keeps from an earlier step would break the recording.
        gc.collect()
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self._step()
            reason = why_not_captured(self._step, "training step")
        current.wait_stream(stream)
        self.model.zero_grad(set_to_none=True)
        if reason is not None:
            raise Uncapturable(reason)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            logits = self._step()
        return graph, logits
