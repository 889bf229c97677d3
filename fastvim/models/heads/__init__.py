"""Heads for dense tasks: UPerNet, Cascade Mask R-CNN, and inference on images of any size."""
