"""What a masked autoencoder makes of image files: what `fastvim reconstruct` computes.

B: images of a batch; C, H, W: channels, height and width of an image
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastvim import reconstruction
from fastvim.data.transforms import IMAGE_MODES, evaluation_transform
from fastvim.errors import NotFiniteError, require_finite
from fastvim.inference.inputs import Pictures, with_stems
from fastvim.inference.models import ImageWork, OpenedModel
from fastvim.inference.parts.store import Store
from fastvim.inference.parts.work import Item, Row
from fastvim.models import MaskedAutoencoder
from fastvim.pictures.reconstruction import draw_reconstruction
from fastvim.pictures.sheet import png
from fastvim.weights.usage import image_settings

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Reconstruct(ImageWork):
    """Hide patches, and predict them.

    Args:
        mask_ratio: hidden part; None for the model's.
        seed: of the mask, the same for every image.
        size: side of the images in pixels; None for that of the training.
    """

    command: ClassVar[str] = "reconstruct"
    mask_ratio: float | None = None
    seed: int = 0
    size: int | None = None

    def open(self, device: torch.device) -> Reconstructor:
        """Load the model."""
        return Reconstructor(self, device)


class Reconstructor(OpenedModel):
    """A masked autoencoder on a device, as `Opened` says."""

    def __init__(self, work: Reconstruct, device: torch.device) -> None:
        super().__init__(work.command, work, device)
        self.work = work
        self.images = image_settings(self.model, self.metadata)
        if work.size is not None:
            self.images["img_size"] = work.size
        reader = replace(self.read_picture, mode=IMAGE_MODES[self.images["in_chans"]])
        self.read = Pictures(reader, evaluation_transform(**self.images))

    def settings(self) -> dict[str, Any]:
        """As of `Opened`."""
        masks = {"mask ratio": self.work.mask_ratio, "seed": self.work.seed}
        return {**self.common_settings(), **self.images, **masks}

    def items(self, found: Iterable[Item]) -> Iterator[Item]:
        """As of `Opened`."""
        return with_stems(found)

    def rows(self, items: Sequence[Item], images: Tensor, out: Store | None) -> list[Row]:
        """ "loss" of the model, and "drawn", a file in `out`."""
        assert out is not None
        assert isinstance(self.model, MaskedAutoencoder)
        mean, std = self.images["mean"], self.images["std"]
        ratio, seed = self.work.mask_ratio, self.work.seed
        result = reconstruction.reconstruct(
            self.model, images, mean, std, mask_ratio=ratio, seed=seed
        )
        try:
            require_finite(result.loss)
        except NotFiniteError as error:
            return [{"error": str(error)}]
        drawn = f"{items[0]['stem']}_reconstruction.png"
        out.write(drawn, png(draw_reconstruction(result)))
        return [{"loss": float(result.loss), "drawn": drawn}]

    def columns(self) -> pyarrow.Schema:
        """As of `Opened`."""
        import pyarrow

        return pyarrow.schema([("loss", pyarrow.float64()), ("drawn", pyarrow.string())])

    def describe(self, row: Row, out: Store) -> str:
        """As of `Opened`."""
        return f"loss {row['loss']:.4f}, drawn in {out.path(row['drawn'])}"

    def finish(self, rows: Callable[[], Iterator[Row]], out: Store) -> list[str]:
        """Nothing: the files are those of the images."""
        return []
