"""What a test leaves behind: the metrics, and predictions with the mistakes marked.

C, H, W: channels, height and width of an image
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastvim.labels import IGNORE_INDEX
from fastvim.tasks.pictures import drawing
from fastvim.tasks.task import Task

GREEN, RED, GREY = "#15803d", "#dc2626", "#475569"  # right, wrong, truth unknown
COLUMNS = 10


class Prediction(NamedTuple):
    """One image, what the model said, and what is right."""

    image: Tensor  # (C, H, W), normalised
    predicted: int
    target: int | None  # None where nobody knows
    certainty: float  # probability of the predicted class


class Labelling(NamedTuple):
    """One image, the class that the model gives each pixel, and the right ones."""

    image: Tensor  # (C, H', W'), normalised
    predicted: Tensor  # (H, W)
    target: Tensor  # (H, W); 255 does not count


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
        if isinstance(pl_module, Task) and (scores := pl_module.class_scores()):
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
        figure = draw_predictions(
            [*self._mistakes, *correct],
            names,
            self._mean,
            self._std,
            title=f"{self._wrong:,} of {self._seen:,} images wrong",
        )
        figure.savefig(self._folder / "predictions.png", dpi=110)


def draw_predictions(
    predictions: Sequence[Prediction],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    title: str,
) -> Figure:
    """A grid of images with the predicted class and its probability; mistakes framed in red.

    Args:
        predictions: in the order to show them.
        class_names: name of each class.
        mean: of the normalisation, one value per channel, or one for all.
        std: likewise.
        title: above the grid.
    """
    columns = min(COLUMNS, max(1, len(predictions)))
    rows = max(1, math.ceil(len(predictions) / columns))
    figure = Figure(figsize=(1.3 * columns, 1.65 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=14)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, prediction in zip(grid.flat, predictions, strict=False):
        _show(axes, _picture(prediction.image.float(), mean, std), prediction, class_names)
    return figure


def draw_labellings(
    labellings: Sequence[Labelling],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Image.Image:
    """A row for each image: itself, the right classes over it, the predicted ones, the mistakes.

    Args:
        labellings: in the order to show them.
        class_names: name of each class.
        mean: of the normalisation, one value per channel, or one for all.
        std: likewise.
    """
    rows, wrong, counted = [], 0, 0
    for image, predicted, target in labellings:
        size = (target.shape[1], target.shape[0])
        grey = _picture(image.float(), mean, std).mul(255).round().to(torch.uint8).numpy()
        shown = Image.fromarray(grey).convert("RGB").resize(size, Image.Resampling.BILINEAR)
        counts = target != IGNORE_INDEX
        errors = counts & (predicted != target)
        wrong, counted = wrong + int(errors.sum()), counted + int(counts.sum())
        classes = [drawing.overlay(shown, of.numpy(), class_names) for of in (target, predicted)]
        rows.append([shown, *classes, drawing.mistakes(shown, errors.numpy())])
    entries = drawing.legend([np.asarray(of.predicted) for of in labellings], class_names)
    entries.append(drawing.Entry(drawing.MISTAKE, f"wrong {wrong / max(1, counted):.1%}"))
    return drawing.sheet(rows, ("image", "labels", "prediction", "mistakes"), entries)


def _picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(H, W) or (H, W, 3) in [0, 1] of a normalised image (C, H, W).

    Other channel counts than grey and RGB have no colours, nor their values a known range: the
    first three channels are shown, each from its darkest to its brightest pixel.
    """
    if len(image) in (1, 3):
        scale, shift = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
        picture = (image * scale + shift).clamp(0, 1)
    else:
        shown = image[:3] if len(image) > 3 else image[:1]
        low, high = shown.amin((1, 2), keepdim=True), shown.amax((1, 2), keepdim=True)
        picture = (shown - low) / (high - low).clamp(min=1e-6)
    return picture.permute(1, 2, 0) if len(picture) == 3 else picture[0]


def _show(axes: Axes, picture: Tensor, prediction: Prediction, class_names: Sequence[str]) -> None:
    """One image with what the model said."""
    wrong = prediction.target not in (None, prediction.predicted)
    colour = GREY if prediction.target is None else RED if wrong else GREEN
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=colour, linewidth=3 if wrong else 1)
    text = f"{_short(class_names[prediction.predicted])} ({prediction.certainty:.0%})"
    if wrong and prediction.target is not None:
        text += f"\ntrue: {_short(class_names[prediction.target])}"
    axes.set_title(text, fontsize=9, color=colour)


def _short(name: str) -> str:
    """A class name that fits over its image."""
    return name if len(name) <= 14 else name[:13] + "…"
