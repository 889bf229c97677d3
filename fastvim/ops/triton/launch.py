"""Cheap launches: what Triton works out of a kernel's arguments is kept and used again.

Triton looks at every argument of every launch, which takes twice as long as the launch. The ops
here keep a launch for each kind of input instead: the compiled kernel, its grid and its numbers.
Under `torch.compile` the kernels are handed to its compiler, which writes launches of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastvim.ops.triton.common import INTERPRETED

ALIGNMENT = 16  # bytes; Triton compiles apart for pointers that are multiples of it
MOST_KINDS = 4096  # of input that an op keeps launches for
_T = TypeVar("_T")
_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(x: Tensor | None) -> bool:
    """Whether a tensor has no data of its own, but stands for others in a trace."""
    return type(x) not in _PLAIN


class Launch:
    """A kernel with all but its tensors: compiled at the first call, and launched at every call.

    It serves one kind of tensors (`Launches`).

    Args:
        kernel: a `triton.jit` function whose parameters are tensors, then numbers.
        device: of the tensors.
        grid: programs along each axis.
        numbers: its numbers, `tl.constexpr` ones too, in order.
        options: of the compiler, such as `num_warps`.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        grid: tuple[int, ...],
        numbers: tuple[Any, ...],
        **options: Any,
    ) -> None:
        self.kernel = kernel
        self.device = device
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.options = options
        self._run: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the device, or write down the launch in a trace."""
        if is_traced(tensors[0]):
            kernel = self.kernel if INTERPRETED else torch.library.wrap_triton(self.kernel)
            kernel[self.grid](*tensors, *self.numbers, **self.options)
        elif self._run is None:
            self._compile(tensors)
        elif torch.cuda.current_device() == self.device.index:
            self._run(*tensors, *self.numbers)
        else:
            with torch.cuda.device(self.device):
                self._run(*tensors, *self.numbers)

    def _compile(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Launch through Triton, which compiles, and keep the compiled kernel."""
        if INTERPRETED:
            self.kernel[self.grid](*tensors, *self.numbers, **self.options)
            return
        with torch.cuda.device(self.device):
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.options)
        self._run = compiled[self.grid]


class Launches(Generic[_T]):
    """The launches of an op, by kind of input: shapes, strides, dtypes, alignment, device."""

    def __init__(self) -> None:
        self._known: dict[Any, _T] = {}

    def clear(self) -> None:
        """Forget all of them."""
        self._known.clear()

    def get(self, tensors: tuple[Tensor | None, ...], options: Any, plan: Callable[[], _T]) -> _T:
        """The launch for these inputs and options; `plan` makes it for the first of a kind."""
        first = tensors[0]
        assert first is not None
        if is_traced(first):
            return plan()  # for sizes that may be symbols
        key = (
            first.device,
            options,
            *[
                None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % ALIGNMENT == 0)
                for t in tensors
            ],
        )
        launch = self._known.get(key)
        if launch is None:
            if len(self._known) >= MOST_KINDS:  # images of ever other sizes
                self.clear()
            launch = self._known[key] = plan()
        return launch


class Op:
    """A function of tensors as an op of torch, called as it is where nothing asks for the op.

    A registered op costs tens of microseconds a call, so that it is used where it has to be a node
    of a graph alone: under `torch.compile`, in export, for tensors without data.

    Args:
        qualified: its name, as in "fastvim::add_norm_triton".
        run: annotated with types that an op may have; the schema is read from them. The first
            argument is a tensor.
        fake: of the same signature, for tensors without data, where `run` cannot be traced.
        keep: (context, inputs, output), saves what `gradients` needs; None: no gradients.
        gradients: (context, *gradients of the outputs) to one for each argument.
        opaque: the compiler shall not look into it, but call it.
    """

    def __init__(
        self,
        qualified: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        keep: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        gradients: Callable[..., tuple[Any, ...]] | None = None,
        *,
        opaque: bool = False,
    ) -> None:
        self.run, self.keep, self.gradients = run, keep, gradients
        if INTERPRETED or opaque:
            torch.library.define(qualified, torch.library.infer_schema(run, mutates_args=()))
            torch.library.impl(qualified, "cpu" if INTERPRETED else "cuda", run)
            torch.library.register_fake(qualified, fake)
        else:
            torch.library.triton_op(qualified, run, mutates_args=())
        if gradients is not None:
            torch.library.register_autograd(qualified, gradients, setup_context=keep)
        namespace, name = qualified.split("::")
        self.registered = getattr(getattr(torch.ops, namespace), name).default

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or is_traced(arguments[0]):
            return self.registered(*arguments)
        if self.gradients is not None and torch.is_grad_enabled():
            return _Differentiable.apply(self, *arguments)
        return self.run(*arguments)


class _Differentiable(torch.autograd.Function):
    """The gradients of an `Op` that is called as it is."""

    @staticmethod
    def forward(ctx: Any, op: Op, *arguments: Any) -> Any:
        assert op.keep is not None
        output = op.run(*arguments)
        ctx.op = op
        op.keep(ctx, arguments, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return (None, *ctx.op.gradients(ctx, *gradients))
