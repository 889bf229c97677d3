"""Boxes and masks of the objects in images of any size: what `fastvim detect` computes.

C, H, W: channels, height and width of an image
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fastvim.data.dense_data import prepare_objects
from fastvim.errors import NotFiniteError, require_finite
from fastvim.inference.inputs import Pictures, with_stems
from fastvim.inference.models import ImageWork, OpenedModel
from fastvim.inference.parts.store import Store
from fastvim.inference.parts.work import Item, Row
from fastvim.models import CascadeMaskRCNN
from fastvim.models.heads.results import Result, coco_results
from fastvim.pictures.detections import draw_detections
from fastvim.pictures.sheet import png

if TYPE_CHECKING:
    import pyarrow

_MOST_ID = 2**63 - 1


@dataclass(frozen=True)
class Detect(ImageWork):
    """Find objects as the test of a detector does.

    Args:
        score: draw and count what has at least this; the results hold all.
        img_size: longer side that an image is resized to; None for the evaluation's.
    """

    command: ClassVar[str] = "detect"
    score: float = 0.5
    img_size: int | None = None

    def open(self, device: torch.device) -> Detector:
        """Load the model."""
        return Detector(self, device)


class Detector(OpenedModel):
    """A detector on a device, as `Opened` says."""

    def __init__(self, work: Detect, device: torch.device) -> None:
        super().__init__(work.command, work, device, ("img_size", "class_names", "category_ids"))
        metadata = self.metadata
        self.score = work.score
        self.side = work.img_size or metadata.get("eval_size") or metadata["img_size"]
        self.antialias = metadata.get("antialias", True)
        self.ids = metadata["category_ids"]
        self.names = dict(zip(self.ids, metadata["class_names"], strict=True))
        self.turned = metadata.get("orientation") != "stored"  # as the training images were
        self.read = Pictures(self.read_picture, pil_to_tensor, self.turned)

    def settings(self) -> dict[str, Any]:
        """As of `Opened`."""
        return {
            **self.common_settings(),
            "img_size": self.side,
            "antialias": self.antialias,
            "turned upright": self.turned,
            "score": self.score,
            "classes": list(self.names.items()),
        }

    def items(self, found: Iterable[Item]) -> Iterator[Item]:
        """As of `Opened`, with the "image_id" of the results.

        It is the number that a file is called by, as in COCO, if all are called by one; else the
        place in the list, from 1 on.
        """
        numbers: set[int] | None = set()
        with tempfile.TemporaryFile("w+") as kept:  # of millions of images
            for item in with_stems(found):
                kept.write(json.dumps(item) + "\n")
                number = _number(item["path"])
                if number is None or (numbers is not None and number in numbers):
                    numbers = None
                elif numbers is not None:
                    numbers.add(number)
            kept.seek(0)
            for place, line in enumerate(kept, 1):
                item = json.loads(line)
                number = place if numbers is None else _number(item["path"])
                yield {**item, "image_id": number}

    @torch.inference_mode()
    def rows(self, items: Sequence[Item], images: Tensor, out: Store | None) -> list[Row]:
        """ "drawn", a file in `out`, and "results" in COCO's format."""
        assert out is not None
        assert isinstance(self.model, CascadeMaskRCNN)
        (item,), (pixels,) = items, images
        image = Image.fromarray(pixels.movedim(0, -1).numpy())
        prepared = prepare_objects(image, self.side, self.antialias).to(self.device)
        try:
            (found,) = self.model.detect([prepared])
            require_finite(found["boxes"], found["scores"])
        except NotFiniteError as error:
            return [{"error": str(error)}]
        seen, size = (prepared.shape[1], prepared.shape[2]), (image.height, image.width)
        results = coco_results(found, seen, size, item["image_id"], self.ids)
        drawn = f"{item['stem']}_detections.png"
        out.write(drawn, png(draw_detections(image, self.sure(results), self.names)))
        return [{"drawn": drawn, "results": results}]

    def sure(self, results: Iterable[Result]) -> list[Result]:
        """The results that are drawn and counted."""
        return [result for result in results if result["score"] >= self.score]

    def columns(self) -> pyarrow.Schema:
        """As of `Opened`."""
        import pyarrow

        as_text = any(isinstance(number, str) for number in self.ids)
        runs = [("size", pyarrow.list_(pyarrow.int64())), ("counts", pyarrow.string())]
        result = [
            ("image_id", pyarrow.int64()),
            ("category_id", pyarrow.string() if as_text else pyarrow.int64()),
            ("bbox", pyarrow.list_(pyarrow.float64())),
            ("segmentation", pyarrow.struct(runs)),
            ("score", pyarrow.float64()),
        ]
        found = pyarrow.list_(pyarrow.struct(result))
        return pyarrow.schema([("drawn", pyarrow.string()), ("results", found)])

    def describe(self, row: Row, out: Store) -> str:
        """As of `Opened`."""
        names = (self.names[result["category_id"]] for result in self.sure(row["results"]))
        counts = Counter(names).most_common(3)
        text = ", ".join(f"{number} x {name}" for name, number in counts) or "nothing"
        return f"{text}, drawn in {out.path(row['drawn'])}"

    def finish(self, rows: Callable[[], Iterator[Row]], out: Store) -> list[str]:
        """Write the results of all images as detections.json."""
        count = 0
        with out.writing("detections.json") as draft:
            draft.file.write(b"[")
            for row in rows():
                for result in row.get("results") or ():
                    text = json.dumps({**result, "file_name": row["path"]})
                    draft.file.write(f", {text}".encode() if count else text.encode())
                    count += 1
            draft.file.write(b"]")
        return [f"{count:,} results in {out.path('detections.json')}"]


def _number(path: str) -> int | None:
    """The number that a file is called by."""
    stem = PurePath(path).stem
    number = int(stem) if stem.isdecimal() and len(stem) < 20 else _MOST_ID + 1
    return number if number <= _MOST_ID else None
