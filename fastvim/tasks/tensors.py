"""The tensors of a module, found without a walk over its modules."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn


class TensorsOf:
    """The parameters and buffers of a module, walked over again only after a change.

    `module.parameters()` takes as long as launching what is to be done to them. The lists are the
    same as long as every module holds the same parameters, buffers and submodules. That is compared
    at every call, object by object, in a fifth of the time of the walks.

    Args:
        module: whose tensors are asked for.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modules: list[nn.Module] = []
        self._held: list[Any] = []
        self._parameters: list[nn.Parameter] = []
        self._buffers: list[Tensor] = []

    def find(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Those of `module.parameters()` and of `module.buffers()`, in their order."""
        held = _held(self._modules)
        same = held and len(held) == len(self._held) and all(map(operator.is_, held, self._held))
        if not same:
            self._modules = list(self._module.modules())
            self._held = _held(self._modules)
            self._parameters = list(self._module.parameters())
            self._buffers = list(self._module.buffers())
        return self._parameters, self._buffers


def _held(modules: list[nn.Module]) -> list[Any]:
    found: list[Any] = []
    for module in modules:
        found += module._parameters.values()
        found += module._buffers.values()
        found += module._modules.values()
    return found
