"""Classes of images: what `fastvim predict` computes.

B: images of a batch; C, H, W: channels, height and width of an image
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastvim.cudagraph import compile_for
from fastvim.data.gpu.finish import DecodeAndFinish
from fastvim.data.gpu.sending import send
from fastvim.errors import NOT_FINITE, UserError
from fastvim.inference.captured import Predictor
from fastvim.inference.encoded import DECODES, read_for_gpu
from fastvim.inference.inputs import reader
from fastvim.inference.models import ImageWork, OpenedModel
from fastvim.inference.parts.collect import json_line
from fastvim.inference.parts.store import Store
from fastvim.inference.parts.work import Item, Row
from fastvim.options import check_choice
from fastvim.pictures.predictions import Prediction, draw_predictions
from fastvim.pictures.sheet import png
from fastvim.weights.usage import class_names, image_settings

if TYPE_CHECKING:
    import pyarrow

TOP = 5  # classes written for each image
FEW, MANY = 32, 128  # images at a time by default: of a CPU, and of a GPU unless they are large
LARGE = 3 * 256 * 256  # values of an image
SHEET_IMAGES = 100  # pictures on the contact sheet at most


@dataclass(frozen=True)
class Classify(ImageWork):
    """Predict classes; channel models take every file that `fastvim.data.arrays` reads.

    Args:
        batch_size: images at a time; None for what suits the device.
        decode: who decodes JPEG files: "cpu" is Pillow, "gpu" the model's device, in batches, with
            probabilities that differ a little; "auto" takes a GPU where there is one that can.

    Raises:
        UserError: another `decode`.
    """

    command: ClassVar[str] = "predict"
    batch_size: int | None = None
    decode: str = "cpu"

    def __post_init__(self) -> None:
        check_choice(DECODES, decode=self.decode)

    def open(self, device: torch.device) -> Classifier:
        """Load the model."""
        return Classifier(self, device)


class Classifier(OpenedModel):
    """A classifier on a device, as `Opened` says."""

    def __init__(self, work: Classify, device: torch.device) -> None:
        super().__init__(work.command, work, device)
        self.names = class_names(self.model, self.metadata)
        self.images = image_settings(self.model, self.metadata)
        self.batch_size = work.batch_size or self._usual_batch()
        self.read, self.transform, self.endings = reader(self.model, self.images, self.read_picture)
        self._see = self.read
        self.decode = work.decode
        self._finish: DecodeAndFinish | None = None
        known = self.read, self.transform, device, self.batch_size
        if (for_gpu := read_for_gpu(work.decode, *known)) is not None:
            self.read, self._finish = for_gpu
        self._run: Callable[[Tensor], Tensor] | None = None

    def settings(self) -> dict[str, Any]:
        """As of `Opened`."""
        names = hashlib.sha256(json.dumps(self.names).encode()).hexdigest()
        decode = {} if self.decode == "cpu" else {"decode": self.decode}
        common = self.common_settings()
        return {**common, **self.images, "class names": names, "top": TOP, **decode}

    def prepare(self, images: Any) -> tuple[Tensor, dict[int, UserError]]:
        """Images of the model: float32 (B, C, H, W) on its device."""
        if self._finish is not None:
            return self._finish.each(images, self.device)
        images = send(images, self.device)
        if self.transform is not None:
            images = self.transform.finish(images, self.device)
        return images, {}

    @torch.inference_mode()
    def rows(self, items: Sequence[Item], images: Tensor, out: Store | None) -> list[Row]:
        """ "class", "index" and "probability" of the best class, and the best ones as "top"."""
        probability = self._model_for(images)(images).float().softmax(dim=-1)
        found = probability.topk(min(TOP, len(self.names)))
        values, indices = found.values.cpu(), found.indices.tolist()
        finite = values.isfinite().all(-1).tolist()
        return [
            self._row(*best) if sound else {"error": NOT_FINITE}
            for *best, sound in zip(values.tolist(), indices, finite, strict=True)
        ]

    def _model_for(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """The model, on a GPU captured with the first whole batch."""
        if self._run is not None:
            return self._run
        # What an exported file computes is not on the GPU.
        if self.device.type != "cuda" or next(self.model.parameters(), None) is None:
            self._run = self.model
        elif len(images) == self.batch_size:
            dtype = images.dtype
            self._run = Predictor(self.model, images.shape, dtype=dtype, copy_model=False)
        else:
            compile_for(self.model, images)
        return self._run or self.model

    def _usual_batch(self) -> int:
        """Images at a time."""
        size, channels = self.images["img_size"], self.images["in_chans"]
        values = channels * (size**2 if isinstance(size, int) else math.prod(size))
        return MANY if self.device.type == "cuda" and values <= LARGE else FEW

    def _row(self, values: list[float], indices: list[int]) -> Row:
        top = [
            {"class": self.names[index], "index": index, "probability": value}
            for value, index in zip(values, indices, strict=True)
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
                image = self._see(row["path"])
                if self.transform is not None:
                    image = self.transform.finish(image)
                yield Prediction(image, row["index"], None, row["probability"])


def _line(row: Row) -> dict[str, Any]:
    """A row in predictions.jsonl: "file", and either the classes or "error"."""
    if row["error"] is not None:
        return {"file": row["path"], "error": row["error"]}
    names = {"path": "file"}
    return {names.get(key, key): value for key, value in row.items() if key != "error"}
