"""What the constructors of the models, and changes of built ones, have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from timm.layers import resample_patch_embed, to_2tuple
from torch import Tensor, nn

from fastvim.errors import OptionError, UserError
from fastvim.layers import PatchEmbed
from fastvim.options import COUNT, SMALL_SIZE, check

_GREY = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601, as Pillow rounds it


def on_device(device: torch.device | str | None) -> AbstractContextManager[object]:
    """A context in which new tensors lie on a device; None leaves PyTorch's default.

    Raises:
        OptionError: no name of a device.
    """
    if device is None:
        return nullcontext()
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise OptionError("device", device, "a device such as 'cpu', 'cuda' or 'meta'") from error


def reset_layers(model: nn.Module) -> None:
    """Draw the weights of all layers anew: first those of the parts, then those of the whole."""
    for module in reversed([*model.modules()]):
        reset = getattr(module, "reset_parameters", None)
        if module is not model and reset is not None:
            reset()


def resample_patches(layer: PatchEmbed, patch_size: int | tuple[int, int]) -> None:
    """Change the side of a layer's patches and resample its projection.

    Raises:
        UserError: a size that is none, patches that are not square, or that overlap.
    """
    check(COUNT, patch_size=patch_size)
    check(SMALL_SIZE, patch_size=patch_size)
    side, other = to_2tuple(patch_size)
    if side != other:
        raise UserError(f"patch_size={patch_size}: expected square patches")
    if side == layer.patch_size:
        return
    if layer.stride != layer.patch_size:
        raise UserError(f"patch_size={patch_size}: patches that overlap keep their size")
    old = layer.proj
    weight = resample_patch_embed(old.weight.detach(), [side, side])
    layer.proj = nn.Conv2d(
        old.in_channels, old.out_channels, side, side, device=weight.device, dtype=weight.dtype
    )
    layer.proj.weight = nn.Parameter(weight, old.weight.requires_grad)
    layer.proj.bias = old.bias
    layer.patch_size = layer.stride = side


def require_size(height: int, width: int, expected: tuple[int, int]) -> None:
    """Raise UserError for an image of another size."""
    if (height, width) != expected:
        raise UserError(
            f"image of {height} x {width} pixels: dynamic_img_size=False takes "
            f"{expected[0]} x {expected[1]}"
        )


def grey_of(image: Tensor) -> Tensor:
    """Grey images (B, 1, H, W) of RGB ones (B, 3, H, W); others as they are."""
    if image.shape[1] != 3:
        return image
    red, green, blue = (image * image.new_tensor(_GREY)[:, None, None]).split(1, dim=1)
    return red + green + blue


def no_scripting(model: nn.Module) -> UserError:
    """What `torch.jit.script` is told, which reads a part of Python alone."""
    return UserError(
        f"{type(model).__name__} cannot be scripted: torch.export and torch.jit.trace take it"
    )
