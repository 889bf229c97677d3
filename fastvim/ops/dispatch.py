"""Which engine serves an op: a kernel for the tensor's device, or the plain PyTorch reference.

An engine is a function of the op's own signature that serves one type of device and a few dtypes.
It is named by a string and imported when it is first used, so importing `fastvim` needs neither
numba nor Triton.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastvim.ops.registered import is_recorded, is_transformed

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
        function: the implementation, as "module:function".
        masked: the implementation for traversals over masked grids; "": the reference serves.
        dtypes: the dtypes it serves; the reference serves the others.
        on_request: serves only where `use_engine` names it.
    """

    name: str
    package: str
    device: str
    function: str
    masked: str = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    on_request: bool = False

    def serves(self, device: str, dtype: torch.dtype, masked: bool) -> bool:
        """Whether it can compute for such tensors."""
        takes = bool(self.masked) or not masked
        # AMD's GPUs are "cuda" to torch too; the kernels have NVIDIA's assembly.
        known = device == self.device and not (device == "cuda" and torch.version.hip)
        return known and dtype in self.dtypes and takes


_numba = functools.partial(Engine, "numba", "numba", "cpu")
_triton = functools.partial(Engine, "triton", "triton", "cuda")
_exported = functools.partial(Engine, package="torch", device="cpu", on_request=True)

# By op, in order of preference.
ENGINES: dict[str, tuple[Engine, ...]] = {
    "add_norm": (
        _numba("fastvim.ops.cpu.norm:add_norm_cpu"),
        _triton("fastvim.ops.triton.norm:add_norm_triton"),
    ),
    "conv_pool": (
        _numba(
            "fastvim.ops.cpu.conv_pool:conv_pool_cpu", "fastvim.ops.cpu.conv_pool:conv_pool_cpu"
        ),
        _triton(
            "fastvim.ops.triton.conv_pool:conv_pool_triton",
            "fastvim.ops.triton.masked:conv_pool_masked",
        ),
    ),
    "selective_scan": (
        _numba("fastvim.ops.cpu.selective_scan:selective_scan_cpu"),
        _triton("fastvim.ops.triton.selective_scan:selective_scan_triton"),
        _exported("scan", function="fastvim.ops.recurrence:selective_scan_operator"),
        _exported("loop", function="fastvim.ops.recurrence:selective_scan_loop"),
    ),
    "expand_gate": (
        _numba(
            "fastvim.ops.cpu.expand_gate:expand_gate_cpu",
            "fastvim.ops.cpu.expand_gate:expand_gate_cpu",
        ),
        _triton(
            "fastvim.ops.triton.expand_gate:expand_gate_triton",
            "fastvim.ops.triton.masked:expand_gate_masked",
        ),
    ),
}

# Several ops in one call, where no gradient is wanted: conv_pool with means, selective_scan and
# expand_gate. The arguments are those of `fastvim.ops.cpu.mix.mix_cpu`.
MIX = (_numba("fastvim.ops.cpu.mix:mix_cpu", "fastvim.ops.cpu.mix:mix_cpu"),)

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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _load(module: str) -> None:
    """Import a module, and those of all ops of its engine.

    The compiler runs this call, since it cannot trace it. It looks at `sys.modules` once in a
    trace: all that the trace may need has to be there.
    """
    package, _, _ = module.rpartition(".")
    import_module(module)
    for engine in (engine for served in ENGINES.values() for engine in served):
        for function in filter(None, (engine.function, engine.masked)):
            if function.startswith(f"{package}."):
                import_module(function.split(":")[0])


def resolve(function: str) -> Callable[..., Any]:
    """The function that a string such as "package.module:function" names."""
    module, name = function.split(":")
    _load(module)
    found: Callable[..., Any] = getattr(sys.modules[module], name)
    return found


def _candidates(
    engines: tuple[Engine, ...],
    chosen: str | None,
    device: str,
    dtype: torch.dtype,
    masked: bool,
) -> tuple[Engine, ...]:
    """The engines that could serve, in order of preference."""
    return tuple(
        engine
        for engine in engines
        if chosen == engine.name or (chosen is None and not engine.on_request)
        if engine.serves(device, dtype, masked)
    )


# For eager calls. The compiler traces the functions themselves.
_cached_candidates = functools.cache(_candidates)
_cached_resolve = functools.cache(resolve)


def implementation(
    op: str, x: Tensor, reference: Callable[_P, _T], masked: bool = False
) -> Callable[_P, _T]:
    """The function that serves `op` for a tensor like `x`: an engine's, or the reference.

    `torch.jit.trace` sees torch's own operators, not what a kernel writes: it gets the reference,
    as do derivatives that no kernel knows.
    """
    if torch.jit.is_tracing() or is_transformed():
        return reference
    compiling = torch.compiler.is_compiling()
    candidates = _candidates if compiling else _cached_candidates
    find = resolve if compiling else _cached_resolve
    for engine in candidates(ENGINES[op], _chosen, x.device.type, x.dtype, masked):
        if available(engine.package):
            function: Callable[_P, _T] = find(engine.masked if masked else engine.function)
            return function
    return reference


def mix_at_once(x: Tensor, masked: bool) -> Callable[..., Tensor] | None:
    """The function that computes `MIX` for a tensor like `x`; None: call the ops one by one.

    So it is where a gradient may be wanted, and where each op has to be seen: by a compiler, an
    exporter, a mode of torch's dispatcher.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_recorded(x):
        return None
    if torch.jit.is_tracing() or is_transformed():
        return None
    for engine in _cached_candidates(MIX, _chosen, x.device.type, x.dtype, masked):
        if available(engine.package):
            return _cached_resolve(engine.masked if masked else engine.function)
    return None


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
    """Serve every op by one engine within the block; ops that it lacks run as the reference.

    The choice holds for the whole process, not for one thread.

    Args:
        name: "reference", or the name of an engine, such as "numba"; for exported programs "scan"
            and "loop" (`fastvim.ops.recurrence`), which serve nothing unless they are named.

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
