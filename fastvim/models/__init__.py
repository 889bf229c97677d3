"""The models. Importing this package registers them with timm.

>>> import timm, fastvim
>>> model = timm.create_model("fastvim_tiny_patch16_224")
"""

from typing import TYPE_CHECKING, Any

from fastvim.models.channel import FastChannelVim, sample_channels
from fastvim.models.feature_maps import FeatureMaps
from fastvim.models.heads.sliding import sliding_window
from fastvim.models.heads.upernet import UPerNet
from fastvim.models.masked import FastMaskVim, MaskedAutoencoder, MaskedOutput
from fastvim.models.published import from_published, to_published
from fastvim.models.registry import checkpoint_filter_fn, create_model
from fastvim.models.vision import FastVim

if TYPE_CHECKING:
    from fastvim.models.heads.cascade import CascadeMaskRCNN

__all__ = [
    "CascadeMaskRCNN",
    "FastChannelVim",
    "FastMaskVim",
    "FastVim",
    "FeatureMaps",
    "MaskedAutoencoder",
    "MaskedOutput",
    "UPerNet",
    "checkpoint_filter_fn",
    "create_model",
    "from_published",
    "sample_channels",
    "sliding_window",
    "to_published",
]


def __getattr__(name: str) -> Any:
    """The detector, imported when it is first used: torchvision's detection modules are slow."""
    if name == "CascadeMaskRCNN":
        from fastvim.models.heads.cascade import CascadeMaskRCNN

        return CascadeMaskRCNN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
