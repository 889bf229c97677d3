"""Tensors that a backward pass computes again, so that nothing keeps them until then.

An engine notes how it made a tensor. An op that would save that tensor saves its sources instead:
they are saved for another gradient anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastvim.ops.registered import is_transformed


class Recipe(NamedTuple):
    """How a tensor was made: a function, and the tensors that it takes."""

    compute: Callable[..., Tensor]
    sources: Sequence[Tensor | None]


_recipes: WeakIdKeyDictionary = WeakIdKeyDictionary()


def note(made: Tensor, compute: Callable[..., Tensor], *sources: Tensor | None) -> None:
    """Remember, while `made` lives, that `compute` of `sources` gives it bit for bit."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _recipes[made] = Recipe(compute, sources)


def recipe_of(x: Tensor) -> Recipe | None:
    """What was noted; None: nothing, or the tensor has been changed since."""
    return None if x._version else _recipes.get(x)


def saved_for(ctx: Any, x: Tensor) -> Sequence[Tensor | None]:
    """The tensors to save in the place of x."""
    recipe = recipe_of(x)
    ctx.compute = None if recipe is None else recipe.compute
    return (x,) if recipe is None else recipe.sources


def restored(ctx: Any, saved: Sequence[Tensor | None]) -> Tensor:
    """x, from what `saved_for` gave."""
    x = saved[0] if ctx.compute is None else ctx.compute(*saved)
    assert isinstance(x, Tensor)
    return x


class _Linear(torch.autograd.Function):
    """`F.linear` without a bias, of an input that is not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *saved_for(ctx, x))
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, *saved = ctx.saved_tensors
        wanted, weighs = ctx.needs_input_grad
        dweight = None
        if weighs:
            dweight = grad.flatten(0, -2).mT @ restored(ctx, saved).flatten(0, -2)
        return grad @ weight if wanted else None, dweight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`; does not save x if it can be computed again.

    Args:
        x: (..., d).
        weight: (E, d).
    """
    if (
        torch.compiler.is_compiling()
        or is_transformed()
        or not torch.is_grad_enabled()
        or type(weight) not in (Tensor, nn.Parameter)
        or recipe_of(x) is None
        or torch.is_autocast_enabled(x.device.type)  # raises for "meta", which has no recipes
    ):
        return F.linear(x, weight)
    out: Tensor = _Linear.apply(x, weight)
    return out
