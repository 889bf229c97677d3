"""The class of every pixel of images of any size: what `fastvim segment` computes.

C, H, W: channels, height and width of an image
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fastvim.data.dense_data import prepare_scene
from fastvim.errors import NotFiniteError, UserError, require_finite
from fastvim.inference.inputs import Pictures, with_stems
from fastvim.inference.models import ImageWork, OpenedModel
from fastvim.inference.parts.store import Store
from fastvim.inference.parts.work import Item, Row
from fastvim.models.heads.sliding import multi_scale_flip, sliding_window
from fastvim.pictures.segmentation import draw_classes, index_image
from fastvim.pictures.sheet import png

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Segment(ImageWork):
    """Label every pixel as the test of a segmentor does.

    Args:
        window: side of the windows; None for the training's.
        stride: from one window to the next; None for the training's, two thirds of a `window`.
        scales: average over these factors on the sides of the image.
        flip: average over the mirror images as well.
    """

    command: ClassVar[str] = "segment"
    window: int | None = None
    stride: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def open(self, device: torch.device) -> Segmentor:
        """Load the model."""
        return Segmentor(self, device)


class Segmentor(OpenedModel):
    """A segmentor on a device, as `Opened` says."""

    def __init__(self, work: Segment, device: torch.device) -> None:
        required = ("mean", "std", "base_size", "class_names")
        super().__init__(work.command, work, device, required)
        self.work = work
        self.names = self.metadata["class_names"]
        self.images = {name: self.metadata[name] for name in ("base_size", "mean", "std")}
        self.images["antialias"] = self.metadata.get("antialias", True)
        self.window, self.stride = self._windows(self.metadata["segmentation"])
        self.read = Pictures(self.read_picture, pil_to_tensor)

    def _windows(self, trained: dict[str, Any]) -> tuple[int | None, int]:
        """Side of the windows, None for the whole image at once, and from one to the next."""
        window, stride = self.work.window, self.work.stride
        if window is not None:
            return window, stride or max(1, round(window * 2 / 3))
        if stride and trained["window"] is None:
            raise UserError("--stride: this model sees whole images, expected --window as well")
        return trained["window"], stride or trained["stride"]

    def settings(self) -> dict[str, Any]:
        """As of `Opened`."""
        windows = {"window": self.window, "stride": self.stride}
        averages = {"scales": self.work.scales, "flip": self.work.flip}
        names = {"class names": self.names}
        return {**self.common_settings(), **self.images, **windows, **averages, **names}

    def items(self, found: Iterable[Item]) -> Iterator[Item]:
        """As of `Opened`."""
        return with_stems(found)

    def rows(self, items: Sequence[Item], images: Tensor, out: Store | None) -> list[Row]:
        """The files "overlay" and "classes" in `out`, and "shares" of the classes, sorted."""
        assert out is not None
        (item,), (pixels,) = items, images
        image = Image.fromarray(pixels.movedim(0, -1).numpy())
        try:
            scores = self._scores(image)
        except NotFiniteError as error:
            return [{"error": str(error)}]
        classes = scores[0].argmax(dim=0).byte().cpu().numpy()
        files = {"overlay": f"{item['stem']}_overlay.png", "classes": f"{item['stem']}_classes.png"}
        out.write(files["classes"], png(index_image(classes, self.names)))
        out.write(files["overlay"], png(draw_classes(image, classes, self.names)))
        counts = np.bincount(classes.ravel(), minlength=len(self.names))
        order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
        shares = [{"class": self.names[i], "share": float(counts[i] / classes.size)} for i in order]
        return [{**files, "shares": shares}]

    @torch.inference_mode()
    def _scores(self, image: Image.Image) -> Tensor:
        """Of each class, (1, classes, H, W)."""
        prepared = prepare_scene(image, **self.images)[None].to(self.device)
        size = (image.height, image.width)
        scores = multi_scale_flip(self._logits, prepared, size, self.work.scales, self.work.flip)
        require_finite(scores)
        return scores

    def _logits(self, images: Tensor) -> Tensor:
        if self.window is None:
            return self.model(images)
        return sliding_window(self.model, images, self.window, self.stride)

    def columns(self) -> pyarrow.Schema:
        """As of `Opened`."""
        import pyarrow

        share = pyarrow.struct([("class", pyarrow.string()), ("share", pyarrow.float64())])
        files = [(name, pyarrow.string()) for name in ("overlay", "classes")]
        return pyarrow.schema([*files, ("shares", pyarrow.list_(share))])

    def describe(self, row: Row, out: Store) -> str:
        """As of `Opened`."""
        shown = ", ".join(f"{share['class']} {share['share']:.1%}" for share in row["shares"][:3])
        return f"{shown}, drawn in {out.path(row['overlay'])}"

    def finish(self, rows: Callable[[], Iterator[Row]], out: Store) -> list[str]:
        """Nothing: the files are those of the images."""
        return []
