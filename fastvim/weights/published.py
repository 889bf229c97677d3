"""The published weights by name: fetched, read, checked and converted once."""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from fastvim.errors import UserError
from fastvim.labels import ADE20K_CLASSES, COCO_CATEGORIES
from fastvim.weights import fetch
from fastvim.weights.build import build_model
from fastvim.weights.files import METADATA_KEY, PICKLED, Checkpoint, read, save
from fastvim.weights.fit import differences
from fastvim.weights.metadata import parse
from fastvim.weights.resolve import resolve
from fastvim.weights.table import NON_COMMERCIAL, Entry, find_entry

_logger = logging.getLogger(__name__)


def is_file_name(text: str) -> bool:
    """Whether a word means a file of weights: it exists, is a path, or ends as a file does."""
    path = os.path.expanduser(text)
    return os.path.isfile(path) or os.sep in text or text.endswith((".safetensors", *PICKLED))


def find(name_or_file: str | os.PathLike[str], *, ema: bool | None = None) -> Checkpoint:
    """The weights of a name of the table, or of a file.

    Args:
        name_or_file: see `is_file_name`; all else is a name of the table.
        ema: True for averaged weights, False for those that are not, where a file has both. None,
            and by name True as well, for those that the published number belongs to.

    Raises:
        UserError: no such name or file, or one that cannot be had or read.
    """
    if is_file_name(os.fspath(name_or_file)):
        return read(name_or_file, ema=ema)
    return read(published_file(os.fspath(name_or_file), ema=False if ema is False else None))


def published_file(name: str, *, ema: bool | None = None) -> Path:
    """Our `.safetensors` of published weights; fetched, checked and converted when first asked for.

    Args:
        name: of the table, with or without its tag.
        ema: take the averaged weights, or the raw ones. None: those that the published number
            belongs to.

    Raises:
        UserError: no such name; a file that cannot be had (see `fetch.fetch`), or that does not
            hold the weights of this model.
    """
    entry = find_entry(name)
    averaged = entry.averaged if ema is None else ema
    other = "" if averaged == entry.averaged else "-ema" if averaged else "-raw"
    kept = fetch.cache_folder() / f"{entry.name}{other}.safetensors"
    if _is_current(kept, entry):
        return kept
    source = fetch.fetch(entry.url, entry.sha256)
    target = kept if _is_writable(kept.parent) else _temporary_folder() / kept.name
    if _is_current(target, entry):
        return target
    state, metadata = _converted(entry, source, averaged)
    save(target, state, metadata)
    return target


def read_metadata(path: Path) -> dict[str, Any]:
    """What this library wrote beside the weights of one of its files."""
    with safetensors.safe_open(path, framework="pt") as file:
        return parse(path, (file.metadata() or {}).get(METADATA_KEY, "{}"))


@cache
def _temporary_folder() -> Path:
    """A folder that goes with the process, where the cache cannot be written; said once."""
    folder = tempfile.mkdtemp(prefix="fastvim-")
    message = "%s cannot be written: weights are converted anew in every process"
    _logger.warning(message, fetch.cache_folder())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_current(target: Path, entry: Entry) -> bool:
    """Whether a converted file is of this entry, and of the published file as it is now."""
    try:
        made = read_metadata(target)["source"]
    except (OSError, safetensors.SafetensorError, ValueError, KeyError):
        return False
    if made.get("entry") != _mark(entry):
        return False
    source = fetch.here(entry.url)
    if source is None:  # the converted file is enough, unless the user names a folder of files
        return not os.environ.get(fetch.WEIGHTS_FOLDER)
    status = source.stat()
    if status.st_size != made.get("size"):
        return False
    return status.st_mtime_ns == made.get("time") or fetch.digest(source) == made.get("sha256")


def _mark(entry: Entry) -> str:
    """Changes with what the table says."""
    return hashlib.sha256(repr(entry).encode()).hexdigest()[:16]


def _converted(
    entry: Entry, source: Path, averaged: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under our names, checked against the entry's model, and their metadata."""
    try:
        checkpoint = read(source, ema=averaged)
    except UserError as error:
        gone = "; it is removed from the cache" if fetch.forget(entry.url, source) else ""
        raise UserError(f"{error} (of {entry.url}){gone}") from error
    status = source.stat()
    made = {
        "url": entry.url,
        "size": status.st_size,
        "time": status.st_mtime_ns,
        "sha256": fetch.digest(source),
        "entry": _mark(entry),
    }
    found = f"from {entry.url}, {made['size']:,} bytes, SHA-256 {made['sha256']}"
    try:
        state, metadata = resolve(checkpoint, entry.model_args, entry=entry)
    except UserError as error:
        raise UserError(f"{error}; {found}") from error
    metadata |= {
        "model": entry.backbone,
        "model_args": dict(entry.model_args),
        **entry.head,
        **entry.images,
        "weights": checkpoint.weights,
        "licence": entry.licence,
        "published": entry.name,
        "number": dict(entry.number),
        "source": made,
    }
    with torch.device("meta"):
        model = build_model(metadata)
    if problems := differences(model.state_dict(), state):
        raise UserError(
            f"{source} does not hold the weights of {entry.name}: {'; '.join(problems)}; {found}"
        )
    metadata |= _classes(entry, model, metadata.pop("class_names", None))
    _logger.warning("%s: weights from %s, %s", entry.name, entry.url, terms(entry.licence))
    return state, metadata


def terms(licence: str) -> str:
    """What a licence allows, in words."""
    return f"licence {licence}" + (", not for commercial use" if licence == NON_COMMERCIAL else "")


def _classes(entry: Entry, model: nn.Module, told: list[str] | None) -> dict[str, Any]:
    """Names of a model's classes: the file's own, else those of the published data."""
    names = told or _names_of(entry.data)
    if not names or len(names) != getattr(model, "num_classes", 0):
        return {}
    if entry.data == "coco" and names == list(COCO_CATEGORIES.values()):
        return {"class_names": names, "category_ids": list(COCO_CATEGORIES)}
    return {"class_names": names}


def _names_of(data: str) -> list[str]:
    """Names of a data set's classes; none where none are published."""
    if data == "imagenet":
        info = ImageNetInfo()
        return [info.index_to_description(label) for label in range(info.num_classes())]
    named = {"ade20k": ADE20K_CLASSES, "coco": tuple(COCO_CATEGORIES.values())}
    return list(named.get(data, ()))
