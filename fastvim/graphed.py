"""Training at one batch shape: a model's forward and backward pass as captured CUDA graphs.

B  batch

>>> graphed = GraphedModel(model)  # doctest: +SKIP
>>> with torch.autocast("cuda", torch.bfloat16):  # doctest: +SKIP
...     logits = graphed(images)
>>> F.cross_entropy(logits.float(), classes).backward()  # doctest: +SKIP
>>> optimizer.step()  # doctest: +SKIP
"""

from __future__ import annotations

import gc
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastvim.inference import why_not_captured

_logger = logging.getLogger(__name__)


class GraphedModel(nn.Module):
    """A model in a training loop, called with the least overhead.

    A small model on a fast GPU spends its training step launching kernels. Here the first batch is
    run a few times, the model's forward and backward pass are recorded as two CUDA graphs, and
    every further batch of that shape replays them: the same kernels, gradients and random
    numbers. The rest of the step (loss, clipping, optimiser, averages) stays ordinary PyTorch, and
    parameters receive their gradients through autograd: gradient accumulation and loss scaling
    work as without it, and DistributedDataParallel around it.

    A batch that was not recorded for runs eagerly: one of another shape or dtype, or under another
    autocast; one in evaluation mode, without gradients or with gradients of its own; any on a CPU.
    So does every batch where the model cannot be recorded; `reason` then says why, and the log has
    one line.

    The graphs read the parameters where they are: steps of an optimiser and `load_state_dict` are
    seen, other parameters in their place are not. Where parameters are frozen or no longer so, the
    next batch is recorded anew. What a model does in Python (hooks, random choices of Python or
    numpy) happens while it is recorded and not again. One forward pass must be followed by its
    backward pass before the next, since the graphs keep the tensors between the two.

    Args:
        model: any module that takes images (B, ...) and gives tensors, in tuples, lists or dicts.
            Its activations stay allocated once recorded.
        warmup: eager steps before the recording, in which kernels are compiled and tuned; they
            change neither weights, nor buffers, nor the random state.

    Attributes:
        model: as given; its weights are what to save.
        reason: why it is not recorded, or None.

    Raises:
        ValueError: no warm-up; a model in DistributedDataParallel already.
        RuntimeError: in a call, if the recording fails for another reason than a model that waits
            for the device; CUDA in this process should then be given up. In a backward pass that
            comes after another forward pass, or for the second time.
    """

    def __init__(self, model: nn.Module, warmup: int = 3) -> None:
        if warmup < 1:
            raise ValueError(f"warmup={warmup}: expected 1 or more")
        if isinstance(model, DistributedDataParallel):
            raise ValueError("put DistributedDataParallel around the GraphedModel, not into it")
        super().__init__()
        self.model = model
        self.warmup = warmup
        self.reason: str | None = None
        self._recorded: _Recorded | None = None

    @property
    def captured(self) -> bool:
        """Whether graphs are recorded."""
        return self._recorded is not None

    def forward(self, images: Tensor) -> Any:
        """What the model gives for images; tensors of their own in every call."""
        training = self.model.training and torch.is_grad_enabled()
        replayable = training and images.is_cuda and not images.requires_grad
        if self._recorded is not None and self._recorded.outdated:
            self._recorded = None
        if replayable and self._recorded is None and self.reason is None:
            self._record(images)
        if replayable and self._recorded is not None and self._recorded.kind == _kind(images):
            return self._recorded(images)
        return self.model(images)

    def __getstate__(self) -> dict[str, Any]:
        # A copy records its own.
        return {**self.__dict__, "_recorded": None}

    def _record(self, images: Tensor) -> None:
        recorded = _Recorded(self.model, images)
        self.reason = recorded.warm_up(self.warmup)
        if self.reason is None:
            recorded.record()
            self._recorded = recorded
        else:
            _logger.warning("training eagerly: %s", self.reason)


class _Recorded:
    """A step of one kind of batch; replayed by calling it.

    Recorded are aliases of the parameters. Autograd's nodes for the gradients of the parameters
    themselves belong to the stream that first used them (DistributedDataParallel's own, say), and
    a recording may not wait for another stream.

    Attributes:
        kind: of the images.
        turn: counts forward and backward passes.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.kind = _kind(images)
        self.turn = 0
        self._model = model
        self._images = images.detach().clone()
        self._trained = {p: p.requires_grad for p in model.parameters()}
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._aliases = {n: p.detach().requires_grad_() for n, p in self._parameters.items()}
        self._stream = torch.cuda.Stream(images.device)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

    def __call__(self, images: Tensor) -> Any:
        self._images.copy_(images)
        outputs = _Replay.apply(self, *self._parameters.values())
        return tree_unflatten(list(outputs), self._tree)

    @property
    def outdated(self) -> bool:
        """Whether other parameters are trained now than when it was recorded."""
        return any(p.requires_grad != trained for p, trained in self._trained.items())

    def warm_up(self, steps: int) -> str | None:
        """Take steps in which kernels are built and tuned; why the step cannot be recorded."""
        if any(isinstance(module, nn.SyncBatchNorm) for module in self._model.modules()):
            return "the batch norms wait for other processes"
        if not self._parameters:
            return "there is nothing to train"

        def step() -> None:
            outputs, _ = self._run()
            starts = [output for output in outputs if output.requires_grad]
            self._differentiate(starts, [torch.ones_like(output) for output in starts])

        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        quiet, own_random_state = warnings.catch_warnings(), torch.random.fork_rng([current.device])
        with quiet, own_random_state, torch.cuda.stream(self._stream):
            # A backward pass may begin with a matrix product; torch remarks on that, and goes on.
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
            buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
            for _ in range(steps):
                step()
            reason = why_not_captured(step, "training step")
            for buffer, before in buffers:
                buffer.copy_(before)
        current.wait_stream(self._stream)
        return reason

    def record(self) -> None:
        """Record both passes. Nothing is computed."""
        gc.collect()  # graphs of autograd that a cycle of objects keeps
        pool = torch.cuda.graph_pool_handle()
        # Other threads (loaders that pin memory) may go on: only this one is recorded.
        options: dict[str, Any] = {"stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._forward, pool, **options):
            outputs, self._tree = self._run()
        starts = [output for output in outputs if output.requires_grad]
        self._starts = [torch.empty_like(output) for output in starts]
        with torch.cuda.graph(self._backward, pool, **options):
            gradients = self._differentiate(starts, self._starts)
        self._outputs = [output.detach() for output in outputs]
        self._differentiable = [output.requires_grad for output in outputs]
        # A parameter that nothing depends on gets no gradient, as without graphs.
        used = [(n, g) for n, g in zip(self._aliases, gradients, strict=True) if g is not None]
        self._parameters = {name: self._parameters[name] for name, _ in used}
        self._gradients = [gradient for _, gradient in used]

    def forward(self) -> tuple[list[Tensor], list[bool]]:
        """Replay the forward pass: copies of the outputs, and which of them have gradients."""
        self.turn += 1
        self._forward.replay()
        return [output.clone() for output in self._outputs], self._differentiable

    def backward(self, turn: int, gradients: list[Tensor]) -> list[Tensor]:
        """Replay the backward pass of a forward pass.

        Args:
            turn: after that pass.
            gradients: of the outputs that have some.

        Returns:
            The gradients of the parameters, which the next replay writes anew.
        """
        if turn != self.turn:
            raise RuntimeError(
                "a graphed model's backward pass must follow its forward pass, once: another "
                "forward or backward pass has come between them"
            )
        self.turn += 1
        for start, gradient in zip(self._starts, gradients, strict=True):
            start.copy_(gradient)
        self._backward.replay()
        return self._gradients

    def _run(self) -> tuple[list[Tensor], Any]:
        """The outputs of a forward pass, and how they are nested."""
        dtype = self.kind[-1]
        # An autocast region of our own: the weights that the caller's one keeps cast are freed
        # when it ends, and a replay casts them anew.
        region = torch.autocast("cuda", dtype=dtype, enabled=dtype is not None, cache_enabled=False)
        with region:
            return tree_flatten(functional_call(self._model, self._aliases, (self._images,)))

    def _differentiate(
        self, outputs: list[Tensor], gradients: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            outputs, list(self._aliases.values()), gradients, allow_unused=True
        )


class _Replay(torch.autograd.Function):
    """Both passes of a recorded step, as autograd sees them."""

    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, *parameters: Tensor) -> tuple[Tensor, ...]:
        outputs, differentiable = recorded.forward()
        ctx.recorded, ctx.turn, ctx.differentiable = recorded, recorded.turn, differentiable
        pairs = zip(outputs, differentiable, strict=True)
        ctx.mark_non_differentiable(*(output for output, wanted in pairs if not wanted))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(gradients, ctx.differentiable, strict=True)
        starts = [gradient for gradient, wanted in pairs if wanted]
        # Autograd copies these, since they are kept here.
        return (None, *ctx.recorded.backward(ctx.turn, starts))


def _kind(images: Tensor) -> tuple[Any, ...]:
    """What a recording holds for: the batch's shape, dtype and device, and the autocast around."""
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return images.shape, images.dtype, images.device, images.stride(), autocast
