"""The Triton kernels, which the files of the same names above use on GPUs."""
