"""All parts as one: the rows in the list's order, and tables of them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from fastvim.data.remote import is_url
from fastvim.errors import UserError
from fastvim.inference.parts.formats import (
    arrow_table,
    decode,
    errors_in,
    import_parquet,
    printable,
    schema,
)
from fastvim.inference.parts.listing import read_items
from fastvim.inference.parts.loop import Run
from fastvim.inference.parts.store import Draft, Store, open_store
from fastvim.inference.parts.work import Row

if TYPE_CHECKING:
    import pyarrow

ENDINGS = (".parquet", ".csv", ".jsonl")
_ROWS = 10_000  # of a group in a Parquet file


def collected(run: Run) -> Iterator[Row]:
    """The rows of a run whose parts all exist, in the list's order.

    Raises:
        UserError: a damaged part, or one of other rows than the list has.
    """
    manifest, parts = run.manifest, run.parts
    for part in range(manifest.parts):
        name = manifest.name(part)
        rows = decode(parts.read(name), manifest.format, parts.path(name))
        items = read_items(parts, manifest.listing, part)
        if [row["path"] for row in rows] != [_stored(item["path"], run) for item in items]:
            raise UserError(
                f"{parts.path(name)}: rows of other images than the list has; remove it, and "
                "start again to compute it anew"
            )
        for item, row in zip(items, rows, strict=True):
            yield {**row, "path": item["path"]}


def failures_in(run: Run, parts: Iterable[int]) -> int:
    """The number of rows with an error in parts that exist."""

    def count(part: int) -> int:
        name = run.manifest.name(part)
        with run.parts.open(name) as file:
            return errors_in(file, run.manifest.format, run.parts.path(name))

    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(count, parts))


def _stored(path: str, run: Run) -> str:
    return printable(path) if run.manifest.format == "parquet" else path


def json_line(row: dict[str, Any]) -> bytes:
    """A JSON object as a line of a file, in UTF-8."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # names of any bytes


def check_table(file: str) -> None:
    """Raise UserError for a table that `write_table` cannot write."""
    ending = PurePath(file).suffix.lower()
    if ending not in ENDINGS:
        raise UserError(f"--table {file}: expected a file ending in {', '.join(ENDINGS)}")
    if ending == ".parquet":
        import_parquet(f"--table {file}")


def write_table(file: str, rows: Iterable[Row], columns: Callable[[], pyarrow.Schema]) -> None:
    """Write rows as one table.

    Args:
        file: path or address, ending in .parquet, .csv (nested values as JSON) or .jsonl.
        rows: taken one by one.
        columns: gives those of the work, for Parquet.
    """
    ending = PurePath(file).suffix.lower()
    with _writing(file) as draft:
        if ending == ".jsonl":
            draft.file.writelines(map(json_line, rows))
        elif ending == ".csv":
            _write_csv(draft, rows)
        else:
            _write_parquet(draft, rows, columns())


def _write_csv(draft: Draft, rows: Iterable[Row]) -> None:
    text = io.TextIOWrapper(draft.file, "utf-8", "backslashreplace", newline="")
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, list(row))
            writer.writeheader()
        nested = (dict, list)
        cells = {k: json.dumps(v) if isinstance(v, nested) else v for k, v in row.items()}
        writer.writerow(cells)
    text.detach()


def _write_parquet(draft: Draft, rows: Iterable[Row], columns: pyarrow.Schema) -> None:
    from pyarrow import parquet

    form = schema(columns)
    group: list[Row] = []
    with parquet.ParquetWriter(draft.file, form) as writer:
        for row in rows:
            group.append(row)
            if len(group) == _ROWS:
                writer.write_table(arrow_table(group, form))
                group = []
        writer.write_table(arrow_table(group, form))


def _writing(file: str) -> AbstractContextManager[Draft]:
    """A file at any path or address, complete or not at all."""
    folder, _, name = file.rpartition("/") if is_url(file) else ("", "", "")
    if not is_url(file):
        folder, name = os.path.split(os.path.abspath(os.path.expanduser(file)))
    store: Store = open_store(folder)
    return store.writing(name)
