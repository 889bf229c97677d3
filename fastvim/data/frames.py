"""Which way up images were annotated: turned as their EXIF orientation says, or as stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fastvim.data.base import Orientation
from fastvim.data.decoding import stored_size
from fastvim.data.pixels import PictureReader, UnreadableImageError, stored

Size = tuple[int, int]  # width and height

OTHER_SIZE = "image of another size"
UNDECIDED = {  # by what is done
    "exif": "turned photograph (EXIF) whose annotations fit as stored too, taken as upright (or "
    "give --data.orientation stored)",
    "stored": "turned photograph (EXIF) whose annotations fit upright too, taken as stored, like "
    "most of the split (or give --data.orientation exif)",
}
UNLIKE_OTHERS = "image annotated another way up than others"


class FramedReader:
    """Reads images the way up that they were annotated.

    Args:
        read_picture: opens an image file.
        orientation: "exif" turns images as their EXIF orientation says, "stored" leaves them as
            stored. "auto" does what the annotated size fits, and where it fits both, what `frame`
            says.
        frame: "exif" or "stored", that of most images of the split.
    """

    def __init__(self, read_picture: PictureReader, orientation: Orientation, frame: str) -> None:
        self.read_picture, self.orientation, self.frame = read_picture, orientation, frame

    def __call__(self, path: Path, size: Size) -> Image.Image:
        """The image of a file.

        Args:
            path: of the file.
            size: as annotated.

        Raises:
            UnreadableImageError: it cannot be read, or is of another size.
        """
        turned = self.frame == "exif"
        image = self.read_picture(path, exif=turned)
        on_its_side = image.size != size and image.size[::-1] == size
        if on_its_side and self.orientation == "auto" and stored(image).orientation > 4:
            image = self.read_picture(path, exif=not turned)
        if image.size != size:
            raise UnreadableImageError(_of_another_size(path, image, size), OTHER_SIZE)
        return image

    def oddity(self, image: Image.Image) -> str:
        """What "auto" had to decide about an image that was read; "" for nothing."""
        width, height = stored(image).size
        orientation = stored(image).orientation
        if self.orientation != "auto" or orientation == 1:
            return ""
        if orientation <= 4 or width == height:
            return UNDECIDED[self.frame]
        as_stored = image.size == (width, height)
        return UNLIKE_OTHERS if as_stored == (self.frame == "exif") else ""


def find_frame(paths: Sequence[Path], sizes: Sequence[Size]) -> str:
    """Whether images were annotated "exif", turned upright, or as "stored", by their sizes.

    Args:
        paths: of some images; those that cannot be read tell nothing.
        sizes: as annotated.

    Returns:
        What most of those that tell it say; "exif" without any.
    """
    votes: Counter[str] = Counter()
    for path, size in zip(paths, sizes, strict=True):
        own, orientation = stored_size(path)
        if orientation > 4 and own[0] != own[1]:
            votes["exif"] += own[::-1] == size
            votes["stored"] += own == size
    return "stored" if votes["stored"] > votes["exif"] else "exif"


def _of_another_size(path: Path, image: Image.Image, size: Size) -> str:
    found = f"{image.width}x{image.height} pixels"
    if (orientation := stored(image).orientation) != 1:
        width, height = stored(image).size
        found += f" ({width}x{height} as stored, with EXIF orientation {orientation})"
    return f"{path}: {found}; expected {size[0]}x{size[1]}, as its instances say"
