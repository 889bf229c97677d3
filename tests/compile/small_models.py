"""Small models of every family, and inputs of any size for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastvim.models import FeatureMaps, create_model

SMALL = {"img_size": 48, "embed_dim": 32, "depth": 2}
CHANNELS = 4  # that the channel models know; images have 3


class MaskedEncoder(nn.Module):
    """The encoder of a masked autoencoder, over kept cells that the caller chooses."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor, ids_keep: Tensor) -> Tensor:
        return self.encoder.forward_features(image, ids_keep)


def classifier(name: str, **options) -> nn.Module:
    return create_model(name, num_classes=5, **SMALL, **options)


def autoencoder() -> nn.Module:
    options = {"decoder_embed_dim": 32, "decoder_depth": 1}
    return create_model("mae_fastvim_tiny_patch16_224", **SMALL, **options)


BUILD: dict[str, Callable[[], nn.Module]] = {
    "fastvim": lambda: classifier("fastvim_tiny_patch16_224"),
    "vim": lambda: classifier("vim_tiny_patch16_224"),
    "channels": lambda: classifier("fastchannelvim_small_patch16_224", in_chans=CHANNELS),
    "chosen channels": lambda: classifier("fastchannelvim_small_patch16_224", in_chans=CHANNELS),
    "channelvim": lambda: classifier("channelvim_small_patch16_224", in_chans=CHANNELS),
    "encoder": lambda: MaskedEncoder(autoencoder().encoder),
    "autoencoder": autoencoder,
    "maps": lambda: FeatureMaps(classifier("fastvim_tiny_patch16_224"), [0, 1]),
}


def build(family: str) -> nn.Module:
    """A model with the weights of one seed, in evaluation."""
    torch.manual_seed(0)
    return BUILD[family]().eval()


def inputs(family: str, batch: int, height: int, width: int, chans: int = 3) -> tuple[Tensor, ...]:
    """What the family's forward takes, for images of any size."""
    generator = torch.Generator().manual_seed(height * width + batch)
    image = torch.randn(batch, chans, height, width, generator=generator)
    if family == "chosen channels":
        return image, torch.randperm(CHANNELS, generator=generator)[:chans]
    cells = -(-height // 16) * -(-width // 16)
    noise = torch.rand(batch, cells, generator=generator)
    if family == "encoder":
        return image, noise.argsort(1)[:, : cells // 2].sort(1).values
    return (image, noise) if family == "autoencoder" else (image,)


def tensors_of(output) -> list[Tensor]:
    """All floating tensors of an output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    return [tensor for part in output for tensor in tensors_of(part)]
