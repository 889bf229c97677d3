"""Layers whose weights an op reads in place of a call of the layer."""

from __future__ import annotations

from torch import Tensor, fx, nn


def is_bypassed(layer: nn.Module, kind: type[nn.Module], x: Tensor | None = None) -> bool:
    """Whether nobody misses the call of a layer, so that a faster op may read its weights.

    The call is missed by hooks (feature extractors, Grad-CAM, pruning), by a layer of another class
    (adapters, divided blocks), and by graphs of `torch.fx`, where they shall name the layer.

    Args:
        layer: the layer.
        kind: the class whose computation the op knows.
        x: input of the layer, a proxy while `torch.fx` traces; None: graphs need not name it.
    """
    hooked = (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )
    return type(layer) is kind and not hooked and not isinstance(x, fx.Proxy)
