"""What is timed of training: the bare step, and the loop that `fastvim fit` runs around the model.

B  batch, C H W  channels, height and width of the images
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastvim.benchmark.cases import Precision
from fastvim.cudagraph import WARMUP, record, warm_up
from fastvim.graphed import GraphedModel

Loss = Callable[[Any, Tensor], Tensor]

# What a record says of a `TrainingLoop`.
LOOP = (
    "forward pass (graph modes: GraphedModel), cross entropy, gradients set to None, "
    "backward pass, AdamW with and without weight decay, average of the weights (EMA); "
    "without data, augmentation, clipping and logging"
)


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """In float32, whatever the logits' dtype."""
    return F.cross_entropy(logits.float(), classes)


class Uncapturable(Exception):
    """Why a step cannot be recorded as a CUDA graph."""


class TrainingStep:
    """The bare step: forward and backward pass of a classification, without an optimizer.

    One call: gradients set to None, the forward pass (under autocast if the precision says so),
    the loss, the backward pass.

    With `capture` the first call records the whole step as one CUDA graph, and every call replays
    it. The recorded step finds no gradients. It makes its own in the graph's pool, and a replay
    overwrites them instead of adding to them. Dropout draws other numbers in every replay:
    `torch.cuda.graph` advances the random state. The graph holds for the mode (train or eval) that
    the model was in. After a change of mode, `release` the graph.

    Args:
        model: gives logits (B, classes).
        images: (B, C, H, W); of a captured step on a CUDA device.
        precision: dtypes.
        compile: run the forward and backward passes through torch.compile.
        capture: record and replay.
        classes: (B,) integers; default: all 0.
        loss: of the model's output and the classes, a scalar.

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
        self._precision = precision
        self._loss = loss
        self._run = torch.compile(model, fullgraph=True, dynamic=False) if compile else model
        # One stream for all recordings of this step: cuBLAS keeps a workspace for each.
        self._stream = torch.cuda.Stream(device) if capture else None
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def __call__(self) -> Tensor:
        """The logits (B, classes), detached; gradients are in the model's parameters.

        Of a captured step these are the same tensors after every call.

        Raises:
            Uncapturable: the step synchronises with the GPU.
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
        return self().clone(), gradients(self.model)

    def renew(self) -> None:
        """Call once, then write random images and classes in place.

        So a graph that the call records has not seen them.
        """
        count = self().shape[1]
        self.images.normal_()
        self.classes.random_(count)

    def release(self) -> None:
        """Free the graph and its memory; the next call records another."""
        self._recorded = None

    def _step(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        # A recorded step casts the weights in every replay, so it must not use a cache.
        with autocast(self.images, self._precision, cache=self._stream is None):
            logits = self._run(self.images)
        self._loss(logits, self.classes).backward()
        return logits.detach()

    def _record(self, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A step as a graph, and its logits."""
        reason = warm_up(self._step, stream, WARMUP, "training step")
        self.model.zero_grad(set_to_none=True)
        if reason is not None:
            raise Uncapturable(reason)
        return record(self._step, stream)


class TrainingLoop:
    """One step of the loop that `fastvim fit` runs: `LOOP` says what it contains.

    With `capture` a `GraphedModel` replays the model's two passes, as in `fit` on a GPU. Loss,
    optimiser and average are ordinary PyTorch.

    Args:
        model: in training mode; gives what `loss` takes.
        images: (B, C, H, W).
        classes: (B,) integers.
        precision: dtypes.
        capture: replay the model's passes.
        loss: of the model's output and the classes, a scalar.

    Attributes:
        model, images, classes: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        classes: Tensor,
        precision: Precision,
        *,
        capture: bool = False,
        loss: Loss = cross_entropy,
    ) -> None:
        self.model = model
        self.images, self.classes = images, classes
        self._precision, self._loss = precision, loss
        self._graphed = GraphedModel(model) if capture else None
        groups = param_groups_weight_decay(model, 0.05)
        self._optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=images.is_cuda)
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        # Counted on the CPU, as the callback EMA does: reading the count must not synchronise.
        self._average.n_averaged = torch.tensor(1)

    def __call__(self) -> None:
        """Take a step.

        Raises:
            Uncapturable: the model cannot be recorded.
        """
        self.differentiate()
        self._optimizer.step()
        self._average.update_parameters(self.model)

    def differentiate(self) -> None:
        """Both passes: gradients are in the model's parameters."""
        run = self.model if self._graphed is None else self._graphed
        with autocast(self.images, self._precision):
            output = run(self.images)
        if self._graphed is not None and self._graphed.reason is not None:
            raise Uncapturable(self._graphed.reason)
        loss = self._loss(output, self.classes)
        self._optimizer.zero_grad()
        loss.backward()


def gradients(model: nn.Module) -> Tensor:
    """Copies of all gradients, in one vector of float32."""
    found = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found)


def autocast(
    images: Tensor, precision: Precision, cache: bool = True
) -> AbstractContextManager[object]:
    """The autocast region that a precision asks for."""
    dtype = precision.autocast
    return torch.autocast(
        images.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=cache
    )
