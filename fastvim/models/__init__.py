"""The models; importing this registers them with timm.

>>> import timm, fastvim
>>> model = timm.create_model("fastvim_tiny_patch16_224")
"""

from fastvim.models.cascade import CascadeMaskRCNN
from fastvim.models.channel import FastChannelVim, sample_channels
from fastvim.models.dense import FeatureMaps
from fastvim.models.masked import FastMaskVim, MaskedAutoencoder, MaskedOutput
from fastvim.models.published import from_published, to_published
from fastvim.models.registry import checkpoint_filter_fn, create_model
from fastvim.models.sliding import sliding_window
from fastvim.models.upernet import UPerNet
from fastvim.models.vision import FastVim

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
