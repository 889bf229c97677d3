"""Packages that the base install lacks, and the extra of this distribution that brings each."""

from __future__ import annotations

EXTRAS = {
    "cpu": ("numba",),
    "train": (
        *("faster_coco_eval", "jsonargparse", "lightning", "matplotlib", "rich"),
        *("tensorboard", "torchmetrics"),
    ),
    "microscopy": ("fsspec", "imagecodecs", "pandas", "pyarrow", "s3fs", "tifffile"),
    "export": ("onnx", "onnx_ir", "onnxruntime", "onnxscript"),
    "ray": ("ray",),
    "gpu": ("nvidia",),
}


def install(extra: str) -> str:
    """The end of a message: how to install an extra."""
    return f'needs pip install "fastvim[{extra}]"'


def needed_extra(error: ImportError) -> str | None:
    """One line about a package that is missing, or None if no extra has it."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return f"{package} is not installed: {install(extra)}"
    return None
