"""Where the splits of a set of class folders are, under any of their usual names."""

from __future__ import annotations

from pathlib import Path

from fastvim.data.folders import SPLIT_NAMES, ClassFolder, ClassFolders
from fastvim.data.packed import PackedFolders, packed_splits
from fastvim.errors import UserError


def find_split(root: str, split: str) -> Path | None:
    """`root/SPLIT/` or `root/SPLIT.tar`, under any of the names of that split.

    Of a packed set it is the folder that the split would have there.
    """
    packed = packed_splits(root)
    names = next((names for names in SPLIT_NAMES.values() if split in names), ())
    for name in (split, *names):
        if packed is not None and name in packed:
            return Path(root, name)
        for path in (Path(root, name), Path(root, f"{name}.tar")):
            if packed is None and path.exists():
                return path
    return None


def open_folder(root: str, split: str, class_folder: ClassFolder = "outer") -> ClassFolders:
    """The images of a split in the folder layout, or of a packed set.

    Raises:
        UserError: when there is no such split, or no image in it.
    """
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such directory; expected one with {split}/CLASS/*.jpg")
    path = find_split(root, split)
    packed = packed_splits(root)
    if path is None and packed is not None:
        raise UserError(f"{root}: no split {split!r} in this pack; it has {', '.join(packed)}")
    if path is None:
        raise UserError(f"{root}: no split {split!r}; expected {root}/{split}/CLASS/*.jpg")
    return (ClassFolders if packed is None else PackedFolders)(path, class_folder)
