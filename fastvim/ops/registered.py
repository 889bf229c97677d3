"""Functions of tensors that torch knows as ops, and that eager mode calls directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(x: Tensor | None) -> bool:
    """Whether a tensor is a stand-in without data, as in a trace."""
    return type(x) not in _PLAIN


class Op:
    """A function of tensors, registered with torch but called directly in eager mode.

    A registered op costs tens of microseconds a call. The registration is used only where the op
    has to be a node of a graph: under `torch.compile`, in export, for tensors without data.

    Args:
        qualified: its name, such as "fastvim::add_norm_cpu".
        run: the implementation. Its first argument is a tensor, and the op's schema is read from
            its annotations.
        fake: the same signature; gives empty outputs for tensors without data.
        setup_context: (context, inputs, output), saves what `backward` needs.
        backward: (context, *gradients of the outputs) to one gradient for each argument; None: the
            op is not differentiable.
        device: the type of device that `run` serves.
        traced: the compiler looks into `run`, which launches Triton's kernels.
    """

    def __init__(
        self,
        qualified: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        backward: Callable[..., tuple[Any, ...]] | None = None,
        *,
        device: str,
        traced: bool = False,
    ) -> None:
        self.run, self.setup_context, self.backward = run, setup_context, backward
        if traced:
            torch.library.triton_op(qualified, run, mutates_args=())
        else:
            torch.library.define(qualified, torch.library.infer_schema(run, mutates_args=()))
            torch.library.impl(qualified, device, run)
            torch.library.register_fake(qualified, fake)
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
        namespace, name = qualified.split("::")
        self.registered = getattr(getattr(torch.ops, namespace), name).default

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or is_traced(arguments[0]):
            return self.registered(*arguments)
        if self.backward is not None and torch.is_grad_enabled():
            return _Differentiable.apply(self, *arguments)
        return self.run(*arguments)


class _Differentiable(torch.autograd.Function):
    """The gradients of an `Op` that is called directly."""

    @staticmethod
    def forward(ctx: Any, op: Op, *arguments: Any) -> Any:
        assert op.setup_context is not None
        output = op.run(*arguments)
        ctx.op = op
        op.setup_context(ctx, arguments, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return (None, *ctx.op.backward(ctx, *gradients))
