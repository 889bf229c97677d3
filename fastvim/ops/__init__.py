"""The four operations of the mixer, and the traversals they walk.

Tensors in, tensors out. Every op is defined in plain PyTorch, differentiable on any device and in
any floating dtype (float32 inside), and may be served by a kernel (`fastvim.ops.dispatch`).
"""

from fastvim.ops.conv_pool import conv_pool
from fastvim.ops.dispatch import engine_name, use_engine
from fastvim.ops.expand_gate import expand_gate
from fastvim.ops.norm import add_norm
from fastvim.ops.selective_scan import selective_scan
from fastvim.ops.traversal import Segments, Traversal

__all__ = [
    "Segments",
    "Traversal",
    "add_norm",
    "conv_pool",
    "engine_name",
    "expand_gate",
    "selective_scan",
    "use_engine",
]
