"""Trained models at work: captured for one batch shape, or over any number of images."""

from fastvim.inference.captured import Predictor

__all__ = ["Predictor"]
