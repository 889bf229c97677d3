"""The report of a test: metrics, and predictions with the mistakes marked.

C, H, W: channels, height and width of an image
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning as L
import torch

from fastvim.pictures.predictions import Prediction, draw_predictions
from fastvim.pictures.segmentation import Labelling, draw_labellings
from fastvim.storage import save_picture, write_text
from fastvim.tasks.protocols import as_trained_task

Item = TypeVar("Item")


class Report(L.Callback):
    """After a test: the metrics as JSON, and a picture of predictions with the mistakes marked.

    The test step returns logits (B, classes), or as "labelled" a list of the classes of each
    image's pixels, or None for metrics alone. With several processes the picture shows images of
    the first process.

    Args:
        folder: gets `metrics.json` and `predictions.png`.
        mean: of the images' normalisation, one value per channel, or one for all.
        std: likewise.
        mistakes: most wrong predictions to show, the most certain ones first.
        correct: most right predictions to show, drawn at random.
        labelled: most segmented images to show, drawn at random.
    """

    def __init__(
        self,
        folder: str,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        mistakes: int = 40,
        correct: int = 40,
        labelled: int = 4,
    ) -> None:
        self._folder = Path(folder)
        self._mean, self._std = mean, std
        self._max_mistakes, self._max_correct = mistakes, correct
        self._max_labelled = labelled

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mistakes: list[Prediction] = []
        self._correct = _Reservoir[Prediction](self._max_correct)
        self._labelled = _Reservoir[Labelling](self._max_labelled)
        self._wrong = 0

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None:  # a task with metrics alone
            return
        if isinstance(outputs, dict):
            for image, target, predicted in zip(*batch, outputs["labelled"], strict=True):
                self._labelled.add(Labelling(image.cpu(), predicted.cpu(), target.cpu()))
            return
        images, target = (part.cpu() for part in batch)
        certainty, predicted = outputs.cpu().softmax(dim=-1).max(dim=-1)
        for i, (guess, truth) in enumerate(zip(predicted.tolist(), target.tolist(), strict=True)):
            shown = Prediction(images[i], guess, truth, certainty[i].item())
            if guess == truth:
                self._correct.add(shown)
            else:
                self._wrong += 1
                self._mistakes.append(shown)
        self._mistakes.sort(key=lambda mistake: -mistake.certainty)
        del self._mistakes[self._max_mistakes :]

    def on_test_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics = _without_nan(trainer.callback_metrics)
        task = as_trained_task(pl_module)
        tested = trainer.ckpt_path or (task and task.checkpoint) or ""
        record: dict[str, Any] = {"checkpoint": str(tested), **metrics}
        if task is not None and (scores := task.class_scores()):
            record["classes"] = {
                score: _without_nan(by_class) for score, by_class in scores.items()
            }
        write_text(self._folder / "metrics.json", json.dumps(record, indent=2) + "\n")

        names = trainer.datamodule.class_names if task is None else task.output_names()
        if self._labelled.items:
            picture = draw_labellings(self._labelled.items, names, self._mean, self._std)
        elif seen := self._wrong + self._correct.seen:
            correct = sorted(self._correct.items, key=lambda prediction: prediction.predicted)
            title = f"{self._wrong:,} of {seen:,} images wrong"
            shown = [*self._mistakes, *correct]
            picture = draw_predictions(shown, names, self._mean, self._std, title)
        else:
            return
        save_picture(self._folder / "predictions.png", picture)


def _without_nan(values: Mapping[str, Any]) -> dict[str, float | None]:
    """As JSON's numbers; null for a share of nothing."""
    return {name: None if math.isnan(value) else float(value) for name, value in values.items()}


class _Reservoir(Generic[Item]):
    """A random sample of all items added, each kept with the same probability.

    Args:
        most: size of the sample.
    """

    def __init__(self, most: int) -> None:
        self.items: list[Item] = []
        self.seen = 0
        self._most = most
        self._random = torch.Generator().manual_seed(0)

    def add(self, item: Item) -> None:
        self.seen += 1
        if len(self.items) < self._most:
            self.items.append(item)
            return
        place = int(torch.randint(self.seen, (1,), generator=self._random))
        if place < self._most:
            self.items[place] = item
