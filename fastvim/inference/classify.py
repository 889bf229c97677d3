"""Classes of images: what `fastvim predict` computes.

B: images of a batch; C, H, W: channels, height and width of an image
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastvim.errors import NotFiniteError, UserError, require_finite
from fastvim.inference.inputs import reader
from fastvim.inference.models import ImageWork, OpenedModel
from fastvim.inference.parts.collect import json_line
from fastvim.inference.parts.store import Store
from fastvim.inference.parts.work import Item, Row
from fastvim.pictures.predictions import Prediction, draw_predictions
from fastvim.pictures.sheet import png
from fastvim.weights.usage import class_names, image_settings

if TYPE_CHECKING:
    import pyarrow

TOP = 5  # classes written for each image
SHEET_IMAGES = 100  # pictures on the contact sheet at most


@dataclass(frozen=True)
class Classify(ImageWork):
    """Predict classes; channel models take every file that `fastvim.data.arrays` reads.

    Args:
        batch_size: images at a time.
    """

    command: ClassVar[str] = "predict"
    batch_size: int = 32

    def open(self, device: torch.device) -> Classifier:
        """Load the model."""
        return Classifier(self, device)


class Classifier(OpenedModel):
    """A classifier on a device, as `Opened` says."""

    def __init__(self, work: Classify, device: torch.device) -> None:
        super().__init__(work.command, work, device)
        self.batch_size = work.batch_size
        self.names = class_names(self.model, self.metadata)
        self.images = image_settings(self.model, self.metadata)
        self.read, self.endings = reader(self.model, self.images, self.read_picture)

    def settings(self) -> dict[str, Any]:
        """As of `Opened`."""
        names = hashlib.sha256(json.dumps(self.names).encode()).hexdigest()
        return {**self.common_settings(), **self.images, "class names": names, "top": TOP}

    @torch.inference_mode()
    def rows(self, items: Sequence[Item], images: Tensor, out: Store | None) -> list[Row]:
        """ "class", "index" and "probability" of the best class, and the best ones as "top"."""
        logits = self.model(images.to(self.device, non_blocking=True))
        probability = logits.float().softmax(dim=-1).cpu()
        values, indices = probability.topk(min(TOP, len(self.names)))
        return [self._row(*best) for best in zip(values, indices, strict=True)]

    def _row(self, values: Tensor, indices: Tensor) -> Row:
        try:
            require_finite(values)
        except NotFiniteError as error:
            return {"error": str(error)}
        top = [
            {"class": self.names[index], "index": index, "probability": value}
            for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        ]
        return {**top[0], "top": top}

    def columns(self) -> pyarrow.Schema:
        """As of `Opened`."""
        import pyarrow

        best = [
            ("class", pyarrow.string()),
            ("index", pyarrow.int64()),
            ("probability", pyarrow.float64()),
        ]
        return pyarrow.schema([*best, ("top", pyarrow.list_(pyarrow.struct(best)))])

    def describe(self, row: Row, out: Store) -> str:
        """As of `Opened`."""
        return f"{row['class']} {row['probability']:.1%}"

    def finish(self, rows: Callable[[], Iterator[Row]], out: Store) -> list[str]:
        """Write predictions.jsonl, and predictions.png of the first images."""
        first: list[Row] = []
        count = 0
        with out.writing("predictions.jsonl") as draft:
            for row in rows():
                draft.file.write(json_line(_line(row)))
                if row["error"] is None:
                    count += 1
                    if len(first) < SHEET_IMAGES:
                        first.append(row)
        lines = [f"written to {out.path('predictions.jsonl')}"]
        if shown := list(self._read_again(first)):
            title = f"{len(shown)} of {count:,} images" if len(shown) < count else ""
            mean, std = self.images["mean"], self.images["std"]
            drawn = draw_predictions(shown, self.names, mean, std, title)
            out.write("predictions.png", png(drawn))
            lines.append(f"drawn in {out.path('predictions.png')}")
        return lines

    def _read_again(self, rows: Iterable[Row]) -> Iterator[Prediction]:
        """The images of rows, to be drawn; without those that are gone since."""
        for row in rows:
            with suppress(UserError):
                image = self.read(row["path"])
                yield Prediction(image, row["index"], None, row["probability"])


def _line(row: Row) -> dict[str, Any]:
    """A row in predictions.jsonl: "file", and either the classes or "error"."""
    if row["error"] is not None:
        return {"file": row["path"], "error": row["error"]}
    names = {"path": "file"}
    return {names.get(key, key): value for key, value in row.items() if key != "error"}
