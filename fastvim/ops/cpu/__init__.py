"""Fused kernels for CPUs, compiled by numba when first used."""
