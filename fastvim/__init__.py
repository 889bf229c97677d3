"""FastVim: state-space vision backbones whose scan runs over pooled rows and columns.

>>> import timm, fastvim
>>> model = timm.create_model("fastvim_tiny_patch16_224")
"""

from fastvim import models, registry
from fastvim.errors import UserError
from fastvim.models import FastVim, FeatureMaps, MaskedAutoencoder
from fastvim.ops import use_engine
from fastvim.weights import load_model

__version__ = "0.1.0"

__all__ = [
    "FastVim",
    "FeatureMaps",
    "MaskedAutoencoder",
    "UserError",
    "__version__",
    "load_model",
    "models",
    "registry",
    "use_engine",
]
