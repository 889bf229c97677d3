"""The layers of the models: patch embedding, mixer, block."""

from fastvim.layers.block import AddNorm, Block, add_and_norm, run_block
from fastvim.layers.embed import ChannelPatchEmbed, PatchEmbed, resize_grid, same_grid, sincos_grid
from fastvim.layers.mixer import Mixer

__all__ = [
    "AddNorm",
    "Block",
    "ChannelPatchEmbed",
    "Mixer",
    "PatchEmbed",
    "add_and_norm",
    "resize_grid",
    "run_block",
    "same_grid",
    "sincos_grid",
]
