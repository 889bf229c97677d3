"""Configurations as files: what may be read at all, before jsonargparse reads it."""

from __future__ import annotations

import os

import yaml

from fastvim.errors import UserError

MOST_BYTES = 4 * 2**20
MOST_VALUES = 1_000_000  # with all aliases written out
MOST_DEPTH = 100
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_config(file: str) -> str:
    """The text of a configuration.

    Raises:
        UserError: no file, one that is no text or too large, aliases that stand for themselves or
            for too many values, values nested too deep.
    """
    if not os.path.exists(file):
        raise UserError(f"--config {file}: no such file")
    if not os.path.isfile(file):
        raise UserError(f"--config {file}: expected a file")
    if os.path.getsize(file) > MOST_BYTES:
        raise UserError(
            f"--config {file}: {os.path.getsize(file):,} bytes, expected a configuration"
        )
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise UserError(f"--config {file}: expected a text in UTF-8 ({error})") from error
    try:
        _check_size(text)
    except yaml.YAMLError:
        return text  # jsonargparse says what is wrong
    except UserError as error:
        raise UserError(f"--config {file}: {error}") from error
    return text


def _check_size(text: str) -> None:
    """Count values as they will be with all aliases written out, without writing them out."""
    sizes: dict[str, int | None] = {}  # of anchors; None while they are open
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and values before it
    total = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 0)
            if size is None:
                raise UserError(f"*{event.anchor} stands for itself")
            total += size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
            if event.anchor:
                sizes[event.anchor] = None
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if len(open_nodes) > MOST_DEPTH:
            raise UserError(f"values nested more than {MOST_DEPTH} deep")
        if total > MOST_VALUES:
            raise UserError(f"aliases stand for more than {MOST_VALUES:,} values")
