"""The walks that the layers of a FastVim or Vim take in turn."""

from __future__ import annotations

from torch import Tensor

from fastvim.errors import UserError
from fastvim.ops import Segments, Traversal
from fastvim.ops.traversal import Mirror

POOLINGS = ("mean", "max", "none")
SCAN_PATHS = ("row", "column")


def grid_traversals(
    pooling: str, scan_path: str, alternate: bool, class_token: bool = False
) -> tuple[Traversal, ...]:
    """The walks that the layers take in turn (the first two of them: FastVim, section 3.2).

    Raises:
        UserError: a class token among tokens that are pooled or walked by columns.
    """
    if class_token and pooling != "none":
        raise UserError("class_token=True needs pooling='none': it has no row and no column")
    if class_token and scan_path != "row":
        raise UserError("class_token=True needs scan_path='row': its sequence is not a grid")
    if class_token:
        return (Traversal("l"),)
    walks = [("h w", "w"), ("w h", "h")]
    if scan_path == "column":
        walks.reverse()
    if pooling == "none":
        return (Traversal(walks[0][0]),)
    return tuple(Traversal(path, pool) for path, pool in (walks if alternate else walks[:1]))


def walk_over(
    traversal: Traversal,
    sizes: dict[str, int],
    ids_keep: Tensor | None = None,
    mirror: Mirror = "published",
) -> Segments:
    """`Traversal.over`."""
    return traversal.over(sizes, ids_keep, mirror)
