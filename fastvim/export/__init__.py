"""Trained models as files that run without this library: ONNX, torch.export and AOTInductor."""

from fastvim.export.write import export, training_size

__all__ = ["export", "training_size"]
