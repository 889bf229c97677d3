"""Configurations as files: what jsonargparse may read at all, always as UTF-8."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import yaml
from jsonargparse import Path

from fastvim.errors import UserError
from fastvim.storage import require_file

MOST_BYTES = 4 * 2**20
MOST_VALUES = 1_000_000  # with all aliases written out
MOST_DEPTH = 100
MOST_SHOWN = 40  # characters of a value
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@contextmanager
def checked_configs(tell: Callable[[str], None]) -> Iterator[list[UserError]]:
    """Within the block jsonargparse reads every file as `read_config` does.

    Such files are those of `--config` and those that stand for a section or a value, as in
    `--data FILE`, at any depth.

    Args:
        tell: takes each text before anything is made of it.

    Yields:
        The mistakes so far: where a value may be of several kinds, jsonargparse goes on with the
        next one.
    """
    mistakes: list[UserError] = []

    def read_text(path: Path) -> str:
        try:
            text = read_config(path.absolute)
        except UserError as error:
            mistakes.append(error)
            raise
        tell(text)
        return text

    own = Path.read_text
    Path.read_text = read_text  # type: ignore[method-assign, assignment]
    try:
        yield mistakes
    finally:
        Path.read_text = own  # type: ignore[method-assign]


def read_config(file: str) -> str:
    """The text of a configuration.

    Raises:
        UserError: no file, one that is no text or too large, aliases that stand for themselves or
            for too many values, values nested too deep.
    """
    if not os.path.exists(file):
        raise UserError(f"configuration {file}: no such file")
    require_file(file)
    if os.path.isdir(file):
        raise UserError(f"configuration {file}: a folder, expected a file")
    if (size := os.path.getsize(file)) > MOST_BYTES:
        raise UserError(f"{file}: {size:,} bytes, expected a configuration")
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: expected a text in UTF-8 ({error})") from error
    check_size(text, file)
    return text


def check_size(text: str, where: str) -> None:
    """Raise UserError for a text of YAML that is far larger, or deeper, once it is read.

    Args:
        text: of a file, or a value of the command line. Damaged YAML is left to jsonargparse.
        where: it is from, for the message.
    """
    try:
        with suppress(yaml.YAMLError):
            _check_size(text, again=True)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_size(text: str, again: bool = False) -> None:
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
            if again:  # jsonargparse reads a text where no text is expected
                with suppress(yaml.YAMLError):
                    _check_size(event.value)
        if len(open_nodes) > MOST_DEPTH:
            raise UserError(f"values nested more than {MOST_DEPTH} deep")
        if total > MOST_VALUES:
            raise UserError(f"aliases stand for more than {MOST_VALUES:,} values")
