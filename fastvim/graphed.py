"""Both passes of a model in a training loop, captured as CUDA graphs.

B  batch

>>> graphed = GraphedModel(model)  # doctest: +SKIP
>>> with torch.autocast("cuda", torch.bfloat16):  # doctest: +SKIP
...     logits = graphed(images)
>>> F.cross_entropy(logits.float(), classes).backward()  # doctest: +SKIP
>>> optimizer.step()  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastvim.cudagraph import WARMUP, has_hooks, record, shared_pool, warm_up

_logger = logging.getLogger(__name__)


class GraphedModel(nn.Module):
    """A model in a training loop, its forward and backward pass captured.

    The first batch is run a few times. Then both passes are recorded as two CUDA graphs, and every
    further batch of that shape replays them: the same kernels, gradients and random numbers. The
    rest of the step (loss, clipping, optimiser, averages) stays ordinary PyTorch. Parameters
    receive their gradients through autograd, unless they are lent, so gradient accumulation, loss
    scaling and DistributedDataParallel (around this module) work as usual.

    A batch runs eagerly if its shape, dtype or autocast dtype is not the recorded one, in
    evaluation mode, without gradients, if its images require gradients, and on a CPU. So does
    every batch if the model cannot be recorded: `reason` then says why, and the log has one line.

    The graphs read the parameters where they are. An optimiser's steps and `load_state_dict` are
    seen; a parameter replaced by another object is not. After a change of what is trained
    (`requires_grad`), the next batch is recorded again. What a model does in Python (hooks, random
    choices of Python or numpy) happens during the recording and not again. Each forward pass must
    be followed by its backward pass, since the graphs keep the tensors between the two.

    Args:
        model: any module that takes images (B, ...) and returns tensors, in tuples, lists or
            dicts. Once recorded, its activations stay allocated.
        warmup: eager steps before the recording, in which kernels are compiled and tuned. They
            change no weights, no buffers and no random state.
        lends: give parameters without a gradient the recording's own tensor as `grad`, not through
            autograd: nothing is copied, and it is a copy from the next forward pass on. Not where a
            parameter has hooks, nor within DistributedDataParallel.

    Attributes:
        model: as given; save its weights.
        reason: why nothing is recorded, or None.

    Raises:
        ValueError: no warm-up; a model in DistributedDataParallel.
        RuntimeError: the recording failed for another reason than a synchronisation (do not use
            CUDA in this process afterwards); a backward pass after another forward pass, or a
            second backward pass.
    """

    def __init__(self, model: nn.Module, warmup: int = WARMUP, *, lends: bool = False) -> None:
        if warmup < 1:
            raise ValueError(f"warmup={warmup}: expected 1 or more")
        if isinstance(model, DistributedDataParallel):
            raise ValueError("put DistributedDataParallel around the GraphedModel, not into it")
        super().__init__()
        self.model = model
        self.warmup, self.lends = warmup, lends
        self.reason: str | None = None
        self._recorded: _Recorded | None = None

    @property
    def captured(self) -> bool:
        """Whether graphs are recorded."""
        return self._recorded is not None

    def forward(self, images: Tensor) -> Any:
        """The model's output for images, in new tensors at every call."""
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
        recorded = _Recorded(self.model, images, self.lends)
        self.reason = recorded.warm_up(self.warmup)
        if self.reason is None:
            recorded.record()
            self._recorded = recorded
        else:
            _logger.warning("training eagerly: %s", self.reason)


class _Recorded:
    """Both passes of a model for one kind of batch; a call replays them.

    `torch.cuda.make_graphed_callables` has no fall-back for batches of another shape, and does not
    look for synchronisations before it records.

    The graphs are recorded over aliases of the parameters. Autograd's nodes for the gradients of
    the parameters themselves belong to the stream that first used them (for instance that of
    DistributedDataParallel), and a recording may not wait for another stream.

    Attributes:
        kind: shape, dtype, device and strides of the images, and the autocast dtype.
        turn: number of forward and backward passes so far.
    """

    def __init__(self, model: nn.Module, images: Tensor, lends: bool) -> None:
        self.kind = _kind(images)
        self.turn = 0
        self._model, self._lends = model, lends
        self._images = images.detach().clone()
        self._trained = {p: p.requires_grad for p in model.parameters()}
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._aliases = {n: p.detach().requires_grad_() for n, p in self._parameters.items()}
        self._stream = torch.cuda.Stream(images.device)

    def __call__(self, images: Tensor) -> Any:
        self._images.copy_(images)
        outputs = _Replay.apply(self, *self._parameters.values())
        return tree_unflatten(list(outputs), self._tree)

    @property
    def outdated(self) -> bool:
        """Whether other parameters are trained now than when it was recorded."""
        return any(p.requires_grad != trained for p, trained in self._trained.items())

    def warm_up(self, steps: int) -> str | None:
        """Take eager steps. Returns why the step cannot be recorded, or None."""
        if any(isinstance(module, nn.SyncBatchNorm) for module in self._model.modules()):
            return "the batch norms wait for other processes"
        if not self._parameters:
            return "there is nothing to train"

        def step() -> None:
            outputs, _ = self._run()
            roots = [output for output in outputs if output.requires_grad]
            self._differentiate(roots, [torch.ones_like(root) for root in roots])

        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        with warnings.catch_warnings(), torch.random.fork_rng([self._stream.device]):
            # A backward pass may begin with a matrix product: torch warns, and continues.
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
            ahead = not has_hooks(self._model)  # as in `compile_for`
            reason = warm_up(step, self._stream, steps, "training step", ahead=ahead)
        for buffer, before in buffers:
            buffer.copy_(before)
        return reason

    def record(self) -> None:
        """Record both passes. Nothing is computed."""
        pool = shared_pool()
        self._forward, (outputs, self._tree) = record(self._run, self._stream, pool)
        roots = [output for output in outputs if output.requires_grad]
        self._grad_outputs = [torch.empty_like(root) for root in roots]
        every = self._parameters.values()
        self._lends &= not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in every)
        backward = partial(self._differentiate, roots, self._grad_outputs)
        self._backward, gradients = record(backward, self._stream, pool)
        self._outputs = [output.detach() for output in outputs]
        self._differentiable = [output.requires_grad for output in outputs]
        # A parameter that nothing depends on gets no gradient, as without graphs.
        used = [(n, g) for n, g in zip(self._aliases, gradients, strict=True) if g is not None]
        self._parameters = {name: self._parameters[name] for name, _ in used}
        self._gradients = [gradient for _, gradient in used]

    def forward(self) -> tuple[list[Tensor], list[bool]]:
        """Replay the forward pass. Returns copies of the outputs, and which have gradients."""
        self.turn += 1
        for parameter, gradient in zip(self._parameters.values(), self._gradients, strict=True):
            if parameter.grad is gradient:  # to be added to; both passes share their memory
                parameter.grad = gradient.clone()
        self._forward.replay()
        return [output.clone() for output in self._outputs], self._differentiable

    def backward(self, turn: int, gradients: list[Tensor]) -> Sequence[Tensor | None]:
        """Replay the backward pass of a forward pass.

        Args:
            turn: the value of `self.turn` after that forward pass.
            gradients: one for each output that requires gradients.

        Returns:
            The gradients of the parameters, in new tensors that lie as these do. Autograd takes
            them as they are. Those of the recording, which the next replay overwrites, it would
            copy one by one. None where they are lent.
        """
        if turn != self.turn:
            raise RuntimeError(
                "a graphed model's backward pass must follow its forward pass, once: another "
                "forward or backward pass has come between them"
            )
        self.turn += 1
        for static, gradient in zip(self._grad_outputs, gradients, strict=True):
            static.copy_(gradient)
        self._backward.replay()
        if self._lends and all(parameter.grad is None for parameter in self._parameters.values()):
            for parameter, gradient in zip(self._parameters.values(), self._gradients, strict=True):
                parameter.grad = gradient
            return [None] * len(self._gradients)
        returned = [torch.empty_like(parameter) for parameter in self._parameters.values()]
        torch._foreach_copy_(returned, self._gradients)
        return returned

    def _run(self) -> tuple[list[Tensor], Any]:
        """Outputs of an eager forward pass, flattened, and their nesting."""
        dtype = self.kind[-1]
        # An autocast region of our own, without a cache: every replay must cast the weights again.
        # The caller's region frees its cache when it ends.
        region = torch.autocast("cuda", dtype=dtype, enabled=dtype is not None, cache_enabled=False)
        with region:
            return tree_flatten(functional_call(self._model, self._aliases, (self._images,)))

    def _differentiate(
        self, roots: list[Tensor], grad_outputs: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The gradient of every alias; None for one that no root depends on."""
        aliases = list(self._aliases.values())
        gradients = torch.autograd.grad(roots, aliases, grad_outputs, allow_unused=True)
        if not self._lends:
            return gradients
        # Optimisers change gradients in place, and expect them to lie as the parameters do.
        taken: set[int] = set()
        own: list[Tensor | None] = []
        for alias, gradient in zip(aliases, gradients, strict=True):
            if gradient is not None:
                place = gradient.untyped_storage().data_ptr()
                if place in taken or gradient.stride() != alias.stride():
                    gradient = torch.empty_like(alias).copy_(gradient)
                taken.add(place)
            own.append(gradient)
        return tuple(own)


class _Replay(torch.autograd.Function):
    """A recorded step as one node of autograd."""

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
        grad_outputs = [gradient for gradient, wanted in pairs if wanted]
        return (None, *ctx.recorded.backward(ctx.turn, grad_outputs))


def _kind(images: Tensor) -> tuple[Any, ...]:
    """What a recording depends on. The last entry is the autocast dtype, or None."""
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return images.shape, images.dtype, images.device, images.stride(), autocast
