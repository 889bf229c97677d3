"""The models. `import fastvim` registers them with timm (`fastvim.registry`).

>>> import timm, fastvim
>>> model = timm.create_model("fastvim_tiny_patch16_224")
"""

from typing import TYPE_CHECKING, Any

from fastvim.models.channel import FastChannelVim, sample_channels
from fastvim.models.factory import create_model
from fastvim.models.feature_maps import FeatureMaps
from fastvim.models.feature_pyramid import FeaturePyramid
from fastvim.models.heads.sliding import sliding_window
from fastvim.models.heads.upernet import UPerNet
from fastvim.models.mask_vim import FastMaskVim
from fastvim.models.masked import MaskedAutoencoder
from fastvim.models.masking import MaskedOutput
from fastvim.models.vision import FastVim

if TYPE_CHECKING:
    from fastvim.models.heads.cascade import CascadeMaskRCNN

__all__ = [
    "CascadeMaskRCNN",
    "FastChannelVim",
    "FastMaskVim",
    "FastVim",
    "FeatureMaps",
    "FeaturePyramid",
    "MaskedAutoencoder",
    "MaskedOutput",
    "UPerNet",
    "create_model",
    "sample_channels",
    "sliding_window",
]


def __getattr__(name: str) -> Any:
    """The detector, imported when it is first used: torchvision's detection modules are slow."""
    if name == "CascadeMaskRCNN":
        from fastvim.models.heads.cascade import CascadeMaskRCNN

        return CascadeMaskRCNN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
