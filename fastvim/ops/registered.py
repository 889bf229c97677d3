"""Functions of tensors that torch knows as ops, and that eager mode calls directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` is on.

    The kernels know the first derivative in reverse mode alone; plain PyTorch knows all of them. A
    compiled graph is guarded by both states in any case.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_recorded(x: Tensor) -> bool:
    """Whether something beside autograd follows the ops: a mode, or a tensor of another class."""
    return type(x) not in _PLAIN or torch._C._len_torch_dispatch_stack() > 0


def _is_differentiated_in_turn(arguments: tuple[Any, ...]) -> bool:
    """Whether the arguments of an op of gradients call for its definition.

    They do under `create_graph=True`, under transforms, and where gradients are batched, as in
    vectorised Jacobians.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor
    return (
        torch.is_grad_enabled()
        or is_transformed()
        or any(isinstance(x, Tensor) and batched(x) for x in arguments)
    )


class Op:
    """A function of tensors, registered with torch but called directly in eager mode.

    A registered op costs tens of microseconds a call. The registration is used only where the op
    has to be a node of a graph: under `torch.compile`, in export, for tensors without data. A
    compiler does not look into it: kernels are compiled for sizes, graphs are not.

    Args:
        qualified: its name, such as "fastvim::add_norm_cpu".
        run: the implementation. Its first argument is a tensor, and the op's schema is read from
            its annotations.
        fake: the same signature; gives empty outputs for tensors without data.
        setup_context: (context, inputs, output), saves what `backward` needs.
        backward: (context, *gradients of the outputs) to one gradient for each argument; None: the
            op is not differentiable.
        device: the type of device that `run` serves.
        definition: of an op of gradients, the same in plain PyTorch, which computes them where they
            are differentiated in turn.
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
        definition: Callable[..., Sequence[Tensor]] | None = None,
    ) -> None:
        self.run, self.setup_context, self.backward = run, setup_context, backward
        self.definition = definition
        torch.library.define(qualified, torch.library.infer_schema(run, mutates_args=()))
        torch.library.impl(qualified, device, run)
        torch.library.register_fake(qualified, fake)
        namespace, name = qualified.split("::")
        self.registered = getattr(getattr(torch.ops, namespace), name).default
        self._device = device
        if backward is not None:
            self._library = torch.library.Library(namespace, "FRAGMENT")
            self._library.impl(name, self._dispatched, "Autograd", with_keyset=True)

    def __call__(self, *arguments: Any) -> Any:
        if self.definition is not None and _is_differentiated_in_turn(arguments):
            return self.definition(*arguments)
        if torch.compiler.is_compiling() or is_recorded(arguments[0]):
            return self.registered(*arguments)
        if self.backward is not None and torch.is_grad_enabled():
            return _Differentiable.apply(self, self.run, *arguments)
        return self.run(*arguments)

    def _dispatched(self, keys: Any, *arguments: Any) -> Any:
        """The op as torch's dispatcher calls it, for all devices, before anything else serves.

        A compiled graph calls it with gradients off: it is then what runs, at once. torch's own
        registration would dispatch a second time, which takes longer than a call.
        """
        first = arguments[0]
        followed = torch.is_grad_enabled() or is_transformed() or is_recorded(first)
        if not followed and first.device.type == self._device:
            return self.run(*arguments)
        keys = keys & torch._C._after_autograd_keyset

        def below(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.registered.redispatch(keys, *arguments)

        if not torch.is_grad_enabled():
            return below(*arguments)
        return _Differentiable.apply(self, below, *arguments)


class _Differentiable(torch.autograd.Function):
    """An `Op` with its gradients; `run` is its own, or what the dispatcher calls below it."""

    @staticmethod
    def forward(ctx: Any, op: Op, run: Callable[..., Any], *arguments: Any) -> Any:
        assert op.setup_context is not None
        output = run(*arguments)
        ctx.op = op
        op.setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return (None, None, *ctx.op.backward(ctx, *gradients))


def gradients_of(
    definition: Callable[..., Any], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients by autograd through a definition, which can be differentiated in turn.

    Args:
        definition: plain PyTorch, of the inputs to one or several outputs.
        inputs: those that need no gradient get zeros.
        gradients: of the outputs.
    """
    with torch.enable_grad():
        # Aliases: of two inputs, one may depend on the other outside of the definition.
        inputs = [x.view_as(x) for x in inputs]
        wanted = [x for x in inputs if x.requires_grad]
        outputs = definition(*inputs)
        found = torch.autograd.grad(
            outputs if isinstance(outputs, tuple) else (outputs,),
            wanted,
            gradients,
            create_graph=True,
            materialize_grads=True,
        )
    each = iter(found)
    return [next(each) if x.requires_grad else torch.zeros_like(x) for x in inputs]
