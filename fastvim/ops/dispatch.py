"""Which engine serves an op: the plain PyTorch definition, or a kernel for the tensor's device.

Every op has its definition in its own file. An engine here is a function of the same signature
for some device and dtypes, imported when it is first used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")

REFERENCE = "reference"
OPS = ("add_norm", "conv_pool", "selective_scan", "expand_gate")


@dataclass(frozen=True, eq=False)
class Engine:
    """A kernel implementation of one op.

    Attributes:
        name: what `use_engine` calls it.
        package: the Python package it needs.
        device: the type of device whose tensors it serves.
        dtypes: the dtypes it serves; others fall to the definition.
        load: imports and returns the implementation.
        load_masked: the same for traversals over kept indices, if it takes them.
    """

    name: str
    package: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], Callable[..., Any]]
    load_masked: Callable[[], Callable[..., Any]] | None

    def serves(self, device: str, dtype: torch.dtype, masked: bool) -> bool:
        """Whether it can compute for such tensors."""
        takes = self.load_masked is not None or not masked
        return device == self.device and dtype in self.dtypes and takes


def _numba_conv_pool() -> Callable[..., Any]:
    from fastvim.ops.cpu.conv import conv_pool_numba

    return conv_pool_numba


def _numba_selective_scan() -> Callable[..., Any]:
    from fastvim.ops.cpu.selective_scan import selective_scan_numba

    return selective_scan_numba


def _triton_add_norm() -> Callable[..., Any]:
    from fastvim.ops.triton.norm import add_norm_triton

    return add_norm_triton


def _triton_conv_pool() -> Callable[..., Any]:
    from fastvim.ops.triton.conv_pool import conv_pool_triton

    return conv_pool_triton


def _triton_conv_pool_kept() -> Callable[..., Any]:
    from fastvim.ops.triton.kept import conv_pool_kept

    return conv_pool_kept


def _triton_expand_gate_kept() -> Callable[..., Any]:
    from fastvim.ops.triton.kept import expand_gate_kept

    return expand_gate_kept


def _triton_selective_scan() -> Callable[..., Any]:
    from fastvim.ops.triton.selective_scan import selective_scan_triton

    return selective_scan_triton


def _triton_expand_gate() -> Callable[..., Any]:
    from fastvim.ops.triton.expand_gate import expand_gate_triton

    return expand_gate_triton


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_numba = functools.partial(Engine, "numba", "numba", "cpu", _DTYPES)
_triton = functools.partial(Engine, "triton", "triton", "cuda", _DTYPES)

# By op, in order of preference. On a CPU the norms are as good as their definitions.
ENGINES: dict[str, tuple[Engine, ...]] = {
    "add_norm": (_triton(_triton_add_norm, None),),
    "conv_pool": (
        _numba(_numba_conv_pool, _numba_conv_pool),
        _triton(_triton_conv_pool, _triton_conv_pool_kept),
    ),
    "selective_scan": (
        _numba(_numba_selective_scan, None),
        _triton(_triton_selective_scan, None),
    ),
    "expand_gate": (_triton(_triton_expand_gate, _triton_expand_gate_kept),),
}

_chosen: str | None = None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available(package: str) -> bool:
    """Whether an engine's package is installed; logs once when it is not."""
    return _installed(package)


@functools.cache
def _installed(package: str) -> bool:
    if find_spec(package) is not None:
        return True
    _logger.warning("%s is not installed: its ops run as plain PyTorch (slower)", package)
    return False


def _candidates(
    engines: tuple[Engine, ...],
    chosen: str | None,
    device: str,
    dtype: torch.dtype,
    masked: bool,
) -> tuple[Engine, ...]:
    """Those that could serve, in order of preference."""
    return tuple(
        engine
        for engine in engines
        if chosen in (None, engine.name) and engine.serves(device, dtype, masked)
    )


_remembered = functools.cache(_candidates)


def implementation(
    op: str, x: Tensor, reference: Callable[_P, _T], masked: bool = False
) -> Callable[_P, _T]:
    """The function that serves `op` for a tensor like `x`: an engine's, or the definition."""
    candidates = _candidates if torch.compiler.is_compiling() else _remembered
    for engine in candidates(ENGINES[op], _chosen, x.device.type, x.dtype, masked):
        if available(engine.package):
            load = engine.load_masked if masked else engine.load
            assert load is not None
            return load()
    return reference


def engine_name(op: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """Name of the engine that serves `op` on a device type, as `fastvim models --engines` prints.

    Args:
        op: one of `OPS`.
        device: such as "cpu" or "cuda".
        dtype: of the tensors.

    Raises:
        ValueError: unknown op.
    """
    if op not in OPS:
        raise ValueError(f"op={op!r}: expected one of {OPS}")
    for engine in _candidates(ENGINES[op], _chosen, device, dtype, masked=False):
        if _installed(engine.package):
            return engine.name
    return REFERENCE


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Serve every op by one engine within the block; ops without it keep their definition.

    The choice holds for the whole process, not for one thread.

    Args:
        name: "reference" for the definitions, or the name of an engine, such as "numba".

    Raises:
        ValueError: unknown engine, or one whose package is not installed.
    """
    global _chosen
    packages = {engine.name: engine.package for served in ENGINES.values() for engine in served}
    if name != REFERENCE and name not in packages:
        raise ValueError(f"engine {name!r}: expected one of {[REFERENCE, *packages]}")
    if name != REFERENCE and not _installed(packages[name]):
        raise ValueError(f"engine {name!r} needs the package {packages[name]!r}: not installed")
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _autocasts(device: str) -> bool:
    """Whether there is autocast for a type of device."""
    return torch.amp.is_autocast_available(device)


def definition(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Mark an op's plain PyTorch definition: it computes in the precision it says.

    Autocast would run its products and convolutions in half precision, so it is off inside.
    """

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        first = args[0]
        assert isinstance(first, Tensor)
        if not _autocasts(first.device.type):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype an op computes in: float64 for float64, float32 for everything else.

    Raises:
        ValueError: `x` is not a floating tensor.
    """
    if not x.is_floating_point():
        raise ValueError(f"expected a floating dtype, got {x.dtype}")
    return torch.promote_types(x.dtype, torch.float32)


def check_shapes(*expected: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Raise ValueError naming the first tensor whose shape is not the one beside it."""
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)}: expected {shape}")
