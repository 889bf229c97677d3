"""The paths of a long list, read a few thousand at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from fastvim.data.table import PARQUET, check_parquet
from fastvim.errors import UserError, first_few, nearest, one_line
from fastvim.extras import install

PATH = "path"  # the usual column
SEPARATORS = {".csv": ",", ".tsv": "\t"}  # .txt is a path a line here
LINES = (".jsonl", ".txt")
ENDINGS = (*SEPARATORS, *PARQUET, *LINES)
_ROWS = 10_000  # of a Parquet file at a time


def table_paths(file: str, table: str) -> Iterator[str]:
    """The paths or addresses that a table lists, in its order, as they are written.

    Args:
        file: the table, on this machine.
        table: its name, whose ending says what it is: .csv, .tsv or .parquet with a column `path`,
            or with one column alone; .jsonl with a text, or an object with a key `path`, a line;
            .txt with a path a line.

    Raises:
        UserError: another ending, no such column, a cell without a path, a damaged file.
    """
    ending = PurePath(table).suffix.lower()
    if ending in SEPARATORS:
        return _of_csv(file, table, SEPARATORS[ending])
    if ending in PARQUET:
        return _of_parquet(file, table)
    if ending in LINES:
        return _of_lines(file, table, ending == ".jsonl")
    raise UserError(f"{table}: expected a list ending in {', '.join(ENDINGS)}")


def _of_csv(path: str, table: str, separator: str) -> Iterator[str]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        try:
            header = next(rows, [])
            place = header.index(_path_column(header, table))
            for row in rows:
                if not row:
                    continue  # an empty line, as at a file's end
                if len(row) != len(header):
                    found = f"{len(row)} cells, expected {len(header)}"
                    raise UserError(f"{table}: line {rows.line_num}: {found}")
                yield _required(row[place], table, f"line {rows.line_num}")
        except csv.Error as error:
            raise UserError(f"{table}: line {rows.line_num}: {error}") from error


def _of_parquet(path: str, table: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{table}: pyarrow is not installed: {install('microscopy')}") from error
    number = 0
    try:
        check_parquet(path, table)
        with parquet.ParquetFile(path) as file:
            column = _path_column(file.schema_arrow.names, table)
            for batch in file.iter_batches(_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _required(value, table, f"row {number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{table}: unreadable table ({one_line(error)})") from error


def _of_lines(path: str, table: str, as_json: bool) -> Iterator[str]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            text: Any = line.rstrip("\r\n")
            if not text.strip():
                continue
            if as_json:
                try:
                    text = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{table}: line {number}: no JSON ({error})") from error
                if isinstance(text, dict):
                    text = text[_path_column(list(text), f"{table}: line {number}")]
            yield _required(text, table, f"line {number}")


def _path_column(names: Sequence[str], where: str) -> str:
    """The column `path`, or the only one."""
    if names.count(PATH) > 1:
        raise UserError(f"{where}: two columns {PATH!r}; expected one")
    if PATH in names:
        return PATH
    if len(names) == 1:
        return names[0]
    shown = f"it has {first_few(names, 10)}" if names else "it has none"
    raise UserError(f"{where}: no column {PATH!r}{nearest(PATH, names)}; {shown}")


def _required(value: Any, table: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        shown = "nothing" if value is None or value == "" else repr(value)
        raise UserError(f"{table}: {where}: {shown}, expected a path or an address")
    return value
