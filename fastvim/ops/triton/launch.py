"""Cheap launches: what Triton derives from a kernel's arguments is kept and used again.

Triton inspects every argument of every launch, which takes twice as long as the launch itself. An
op here keeps one `Launch` for each kind of input instead: the compiled kernel, its grid and all
arguments that are not tensors. Compiled graphs launch in the same way: they call the ops as they
are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastvim.ops import registered
from fastvim.ops.triton.ahead import left_out
from fastvim.ops.triton.common import INTERPRETED

ALIGNMENT = 16  # bytes; Triton compiles a pointer that is a multiple of it differently
MAX_KINDS = 4096  # kinds of input that an op keeps launches for
H100_MULTIPROCESSORS = 132
_T = TypeVar("_T")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU. Without a GPU, as in the interpreter, those of an H100."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return H100_MULTIPROCESSORS


class Launch:
    """A kernel with all arguments but its tensors; compiled at the first call, if not `ahead`.

    All arguments are given by name, and put into the kernel's order once. A launch serves one kind
    of tensors (`Launches`).

    Args:
        kernel: a `triton.jit` function whose tensors come before its other parameters.
        device: of the tensors.
        grid: programs along each axis.
        num_warps: of a program.
        num_stages: of the compiler's software pipeline.
        meta: all parameters that are not tensors: sizes, strides and `tl.constexpr`.
    """

    def __init__(
        self,
        kernel: Any,
        *,
        device: torch.device,
        grid: tuple[int, ...],
        num_warps: int = 4,
        num_stages: int = 3,
        **meta: Any,
    ) -> None:
        self.kernel = kernel
        self.device = device
        self.grid = (*grid, 1, 1)[:3]
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self.meta = meta
        self._run: Callable[..., None] | None = None

    def __call__(self, **tensors: Tensor | None) -> None:
        """Launch on the device's current stream.

        Raises:
            TypeError: at the first launch, names that are not those of the kernel's parameters.
        """
        if self._run is None:
            self._first(tensors)
        elif torch.cuda.current_device() == self.device.index:
            self._run(*tensors.values(), *self._values)
        else:
            with torch.cuda.device(self.device):
                self._run(*tensors.values(), *self._values)

    def _first(self, tensors: dict[str, Tensor | None]) -> None:
        """Check and order the names, launch through Triton and keep what it compiled."""
        names = self.kernel.arg_names
        if sorted((*tensors, *self.meta)) != sorted(names):
            raise TypeError(
                f"{self.kernel.fn.__name__}: "
                f"missing {sorted({*names} - {*tensors, *self.meta})}, "
                f"unknown {sorted({*tensors, *self.meta} - {*names})}, "
                f"given twice {sorted({*tensors} & {*self.meta})}"
            )
        # Every call comes from one place in the code, so this holds for the calls that follow.
        assert [*tensors] == names[: len(tensors)], "tensors come first, in the kernel's order"
        self._values = tuple(self.meta[name] for name in names[len(tensors) :])
        arguments = (*tensors.values(), *self._values)
        if left_out(self, self.kernel, arguments, self.options):
            return
        if INTERPRETED:
            self.kernel[self.grid](*arguments, **self.options)
        else:
            with torch.cuda.device(self.device):
                compiled = self.kernel[self.grid](*arguments, **self.options)
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
            if len(self._known) >= MAX_KINDS:  # e.g. every image has another size
                self.clear()
            launch = self._known[key] = plan()
        return launch


class Op(registered.Op):
    """A registered op that launches kernels.

    Args:
        qualified, run, fake, setup_context, backward, definition: as `registered.Op`'s.
    """

    def __init__(self, *arguments: Any, definition: Callable[..., Any] | None = None) -> None:
        device = "cpu" if INTERPRETED else "cuda"
        super().__init__(*arguments, device=device, definition=definition)
