"""The four operations of the model, and the traversals of the token grid.

Tensors in, tensors out. Each op has a reference in plain PyTorch (`fastvim.ops.reference`), which
is differentiable on any device and in any floating dtype. Kernels serve some devices and dtypes
instead (`fastvim.ops.dispatch`).
"""

from fastvim.ops import cpu as _registers_its_ops  # noqa: F401
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
