"""The CPU engine: numba kernels. `import fastvim` registers its ops; numba comes with their use.

So a program that names them loads where numba is not installed, and runs where it is.
"""

from fastvim.ops.cpu import conv_pool, expand_gate, norm, selective_scan

__all__ = ["conv_pool", "expand_gate", "norm", "selective_scan"]
