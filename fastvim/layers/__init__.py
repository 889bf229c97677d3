"""The layers of the models: patch embedding, mixer, block."""

from fastvim.layers.block import AddNorm, Block, run_block
from fastvim.layers.embed import ChannelPatchEmbed, PatchEmbed, resize_grid, same_grid, sincos_grid
from fastvim.layers.mixer import Mixer

__all__ = [
    "AddNorm",
    "Block",
    "ChannelPatchEmbed",
    "Mixer",
    "PatchEmbed",
    "resize_grid",
    "run_block",
    "same_grid",
    "sincos_grid",
]
