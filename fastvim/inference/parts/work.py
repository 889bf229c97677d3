"""What is computed for each image: the side of a command that the loop over parts knows.

C, H, W: channels, height and width of an image; B: images of a batch
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    import pyarrow
    import torch

    from fastvim.errors import UserError
    from fastvim.inference.parts.store import Store

# A line of the list: "path", what else the work says of an image, "error" where there is none.
Item = dict[str, Any]
Row = dict[str, Any]  # a result: "path", the work's columns, and "error", None where there is none


class Failure(NamedTuple):
    """A file that gave no image, and why."""

    path: str
    reason: str


class Read(Protocol):
    """From a file to an image; called in the workers of a loader."""

    def __call__(self, path: str) -> Any:
        """The image of a path or an address.

        Raises:
            UserError: it cannot be read.
        """
        ...

    def batch(self, images: list[Any]) -> Any:
        """Several images, as they go to the process that computes."""
        ...

    def told(self) -> Any:
        """What it has seen since the last call, for `Opened.hear`; can be pickled."""
        ...


class Opened(Protocol):
    """A work with its model on a device."""

    @property
    def batch_size(self) -> int:
        """Images at a time; above 1 all of them have one shape."""
        ...

    @property
    def weights(self) -> str:
        """Digest of the model's tensors."""
        ...

    @property
    def endings(self) -> Collection[str] | None:
        """Of the image files in folders, in small letters; None for what Pillow reads."""
        ...

    @property
    def read(self) -> Read:
        """Reads an image; knows nothing of the model."""
        ...

    @property
    def remarks(self) -> list[str]:
        """Lines about all images, from what was heard."""
        ...

    def settings(self) -> dict[str, Any]:
        """All beside the weights that changes rows, as JSON values."""
        ...

    def items(self, found: Iterable[Item]) -> Iterator[Item]:
        """What is found, with all that the rows of an image need to know of the whole list."""
        ...

    def prepare(self, images: Any) -> tuple[Any, dict[int, UserError]]:
        """What `rows` takes of a batch; on a GPU, a thread makes it while earlier ones are used.

        Args:
            images: of `Read.batch`.

        Returns:
            Prepared images, and why there is none at some places of the batch.
        """
        ...

    def rows(self, items: Sequence[Item], images: Any, out: Store | None) -> list[Row]:
        """The columns of each image, or its "error" alone.

        Args:
            items: of the images.
            images: as `prepare` gives them, such as (B, C, H, W).
            out: for files by image; None where nothing is written.
        """
        ...

    def hear(self, told: Any) -> None:
        """Take in what a copy of `read` tells, or the same work in another process."""
        ...

    def pass_on(self) -> Any:
        """What it has heard since the last call, for `hear` in another process."""
        ...

    def columns(self) -> pyarrow.Schema:
        """Names and types of the columns, without "path" and "error"."""
        ...

    def describe(self, row: Row, out: Store) -> str:
        """What a person is told of a row without an error."""
        ...

    def finish(self, rows: Callable[[], Iterator[Row]], out: Store) -> list[str]:
        """Write the last files of a run, and say which.

        Args:
            rows: reads all rows in the list's order, from the first on with each call.
            out: folder of the files.
        """
        ...


class Work(Protocol):
    """A work to be opened in each process: a dataclass of plain fields, which can be pickled.

    Attributes:
        command: that does it.
    """

    command: ClassVar[str]

    def open(self, device: torch.device) -> Opened:
        """Load the model."""
        ...
