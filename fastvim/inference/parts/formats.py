"""A part as bytes, and back: Parquet, or JSON lines. The bytes follow from the rows alone."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from fastvim.data.table import decode_parquet
from fastvim.errors import UserError, one_line
from fastvim.extras import install
from fastvim.inference.parts.work import Row

if TYPE_CHECKING:
    import pyarrow


def encode(rows: list[Row], form: str, columns: pyarrow.Schema | None) -> bytes:
    """Rows as the content of a file.

    Args:
        rows: of one part.
        form: "parquet" or "jsonl".
        columns: of the work, for Parquet; see `schema`.
    """
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    from pyarrow import parquet

    assert columns is not None
    buffer = io.BytesIO()
    parquet.write_table(arrow_table(rows, schema(columns)), buffer)
    return buffer.getvalue()


def arrow_table(rows: list[Row], form: pyarrow.Schema) -> pyarrow.Table:
    """Rows as a table of Arrow, whose texts are Unicode: see `printable`."""
    import pyarrow

    try:
        return pyarrow.Table.from_pylist(rows, form)
    except UnicodeEncodeError:  # of a file's name, in a path or in an error
        return pyarrow.Table.from_pylist([_printable(row) for row in rows], form)


def _printable(value: Any) -> Any:
    """A value with all texts inside it `printable`."""
    if isinstance(value, dict):
        return {name: _printable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_printable(each) for each in value]
    return printable(value) if isinstance(value, str) else value


def decode(content: bytes, form: str, name: str) -> list[Row]:
    """The rows of a part.

    Args:
        content: of its file.
        form: "parquet" or "jsonl".
        name: of the file, for messages.

    Raises:
        UserError: a damaged file.
    """
    with _named(name):
        if form == "jsonl":
            return [json.loads(line) for line in content.splitlines()]
        import_parquet(name)
        return decode_parquet(content).to_pylist()


def errors_in(file: IO[bytes], form: str, name: str) -> int:
    """The number of rows with an error; of Parquet the last bytes alone are read.

    Args:
        file: a part, open.
        form: "parquet" or "jsonl".
        name: of the file, for messages.
    """
    if form == "jsonl":
        return sum(not line.endswith(b'"error": null}\n') for line in file)
    parquet = import_parquet(name)
    with _named(name):
        told = parquet.ParquetFile(file).metadata
        groups = [told.row_group(i) for i in range(told.num_row_groups)]
        columns = [group.column(leaf) for group in groups for leaf in range(group.num_columns)]
        errors = [column for column in columns if column.path_in_schema == "error"]
        return sum(column.num_values - column.statistics.null_count for column in errors)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """The error of a damaged part names its file, and what to do."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, AttributeError) as error:  # pyarrow's errors are some of these
        raise UserError(
            f"{name}: damaged ({one_line(error)}); remove it, and start again to compute it anew"
        ) from error


def schema(columns: pyarrow.Schema) -> pyarrow.Schema:
    """The columns of a part: "path", those of a work, "error"."""
    import pyarrow

    path, error = pyarrow.field("path", pyarrow.string()), pyarrow.field("error", pyarrow.string())
    return pyarrow.schema([path, *columns, error])


def printable(path: str) -> str:
    """A path as text of Unicode: bytes that are none, as a backslash and their number."""
    return path.encode("utf-8", "backslashreplace").decode()


def import_parquet(name: str) -> Any:
    """The module `pyarrow.parquet`, or a UserError that says how to install it."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{name}: pyarrow is not installed: {install('microscopy')}") from error
    return parquet
