"""What a test leaves behind: the metrics, and predictions with the mistakes marked.

C, H, W: channels, height and width of an image
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fastvim.tasks.pictures.predictions import Prediction, draw_predictions
from fastvim.tasks.pictures.segmentation import Labelling, draw_labellings
from fastvim.tasks.protocols import TrainedTask


class Report(L.Callback):
    """After a test: the metrics as JSON, and a picture of predictions with the mistakes marked.

    The test step returns logits (B, classes), or as "labelled" a list of the classes of each
    image's pixels, or None for metrics alone. With several processes the picture shows the first
    one's images.

    Args:
        folder: gets `metrics.json` and `predictions.png`.
        mean: of the images' normalisation, one value per channel, or one for all.
        std: likewise.
        mistakes: how many wrong predictions to show at most, the most certain ones first.
        correct: how many right predictions to show at most, drawn at random.
        labelled: how many images with a class for each pixel to show at most, drawn at random.
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
        self._correct: list[Prediction] = []
        self._labelled: list[Labelling] = []
        self._seen = self._wrong = 0
        self._draw = torch.Generator().manual_seed(0)

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
            self._keep_labelled(outputs["labelled"], batch)
            return
        images, target = (part.cpu() for part in batch)
        certainty, predicted = outputs.cpu().softmax(dim=-1).max(dim=-1)
        for i, (guess, truth) in enumerate(zip(predicted.tolist(), target.tolist(), strict=True)):
            self._seen += 1
            shown = Prediction(images[i], guess, truth, certainty[i].item())
            if guess != truth:
                self._wrong += 1
                self._mistakes.append(shown)
            elif len(self._correct) < self._max_correct:
                self._correct.append(shown)
            else:
                place = self._place(self._seen - self._wrong)
                if place < self._max_correct:
                    self._correct[place] = shown
        self._mistakes.sort(key=lambda mistake: -mistake.certainty)
        del self._mistakes[self._max_mistakes :]

    def _place(self, count: int) -> int:
        """Where the last of `count` images goes, among the first few of which all are kept.

        Reservoir sampling: each is kept with the same probability.
        """
        return int(torch.randint(count, (1,), generator=self._draw))

    def _keep_labelled(self, predictions: list[Tensor], batch: Any) -> None:
        for image, target, predicted in zip(*batch, predictions, strict=True):
            self._seen += 1
            place = len(self._labelled)
            if place == self._max_labelled:
                place = self._place(self._seen)
            if place < self._max_labelled:
                shown = Labelling(image.cpu(), predicted.cpu(), target.cpu())
                self._labelled[place : place + 1] = [shown]

    def on_test_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        record = {"checkpoint": str(trainer.ckpt_path or ""), **metrics}
        if isinstance(pl_module, TrainedTask) and (scores := pl_module.class_scores()):
            record["classes"] = {
                score: {name: None if math.isnan(value) else value for name, value in of.items()}
                for score, of in scores.items()
            }
        (self._folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")

        if not self._seen:
            return
        names = trainer.datamodule.class_names
        if self._labelled:
            picture = draw_labellings(self._labelled, names, self._mean, self._std)
            picture.save(self._folder / "predictions.png")
            return
        correct = sorted(self._correct, key=lambda prediction: prediction.predicted)
        title = f"{self._wrong:,} of {self._seen:,} images wrong"
        shown = [*self._mistakes, *correct]
        picture = draw_predictions(shown, names, self._mean, self._std, title)
        picture.save(self._folder / "predictions.png")
