"""Fused kernels for GPUs in Triton, compiled when first used."""
