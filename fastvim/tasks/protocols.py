"""What tasks ask of the data modules, and callbacks of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Normalised(Protocol):
    """Data that tell how their images are normalised."""

    @property
    def mean(self) -> Sequence[float]: ...

    @property
    def std(self) -> Sequence[float]: ...


@runtime_checkable
class Waiting(Protocol):
    """A loader that tells for how many seconds the run has waited for it."""

    waited: float
    num_workers: int


class TaskData(Normalised, Protocol):
    """What the tasks read from a data module. Each task needs a part of it.

    Attributes:
        batch_size: images per process.
        seed: of the order of the images, and of random choices that all processes share.
        num_classes: of the targets.
        class_names: in the order of the class indices.
        classes_from: the file or folder that has the classes, for messages.
        category_ids: COCO's ids of the classes, in that order; of detection data.
        frame: "exif" or "stored", whether EXIF turns the images; of detection data.
    """

    batch_size: int
    seed: int

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> list[str]: ...

    @property
    def classes_from(self) -> str: ...

    @property
    def category_ids(self) -> list[int | str]: ...

    @property
    def frame(self) -> str: ...

    def train_dataloader(self) -> Any: ...


class TrainedTask(Protocol):
    """What the callbacks of a run read from its task.

    Attributes:
        global_batch: images of one optimiser step over all processes.
        peak_lr: the learning rate at the end of the warm-up.
        ema_decay: of the averaged weights; None where there are none.
        checkpoint: weights that it starts from; None for random ones.
        model: the network.
    """

    checkpoint: str | None
    ema_decay: float | None
    model: Any

    @property
    def global_batch(self) -> int: ...

    @property
    def peak_lr(self) -> float: ...

    def exported_weights(self) -> dict[str, Tensor]: ...

    def exported_metadata(self) -> dict[str, Any]: ...

    def output_names(self) -> list[str]: ...

    def class_scores(self) -> dict[str, dict[str, float]]: ...


def as_trained_task(module: Any) -> TrainedTask | None:
    """A module as the task that callbacks read; None for one of somebody else's.

    Not by `isinstance`: from Python 3.12 on, that does not find a network that a module holds.
    """
    return module if hasattr(module, "exported_metadata") else None
