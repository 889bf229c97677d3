"""What a model is trained and evaluated on: losses, metrics, optimisers, schedules."""

from fastvim.tasks.classification import Classification

__all__ = ["Classification"]
