"""What a model is trained and evaluated on: losses, metrics, optimisers, schedules."""

from fastvim.tasks.classification import Classification
from fastvim.tasks.detection import Detection
from fastvim.tasks.pretraining import Pretraining
from fastvim.tasks.probe import LinearProbe
from fastvim.tasks.segmentation import Segmentation
from fastvim.tasks.task import Task

__all__ = ["Classification", "Detection", "LinearProbe", "Pretraining", "Segmentation", "Task"]
