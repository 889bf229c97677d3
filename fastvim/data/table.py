"""Tables of images: CSV, TSV and Parquet files, their columns and splits."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from io import BytesIO, StringIO
from pathlib import PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvim.data.folders import SPLIT_NAMES
from fastvim.data.remote import UnreadableFileError, is_url, join, read_bytes
from fastvim.errors import UserError, nearest
from fastvim.extras import install

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
PARQUET = (".parquet", ".pq")
# What a Parquet file unpacks to: at most so many bytes, or so many times its own. Paths that differ
# are far below. A value counts as BYTES_OF_VALUE beside its text.
MOST_UNPACKED, MOST_TIMES = 1 << 28, 1000
BYTES_OF_VALUE = 64
SPLITS = ("train", "val", "test")
SPLIT_COLUMN = "split"  # the usual name


def import_pandas() -> ModuleType:
    """pandas, or a UserError that says how to install it."""
    try:
        import pandas
        import pyarrow  # noqa: F401  # what pandas reads Parquet with
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: {install('microscopy')}") from error
    return pandas


def read_table(
    url: str,
    *,
    attempts: int = 4,
    wait: float = 0.5,
    storage_options: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """A table. CSV and TSV are read as text; an empty cell is a missing value.

    Args:
        url: a path or URL ending in .csv, .tsv or .txt (tabs), .parquet or .pq.

    The other arguments are passed to `read_bytes`.

    Raises:
        UserError: for another ending, a table without rows, or a package that is not installed;
            `UnreadableFileError` for a file that cannot be fetched or decoded.
    """
    suffix = PurePosixPath(url).suffix.lower()
    if suffix not in SEPARATORS and suffix not in PARQUET:
        endings = ", ".join((*SEPARATORS, *PARQUET))
        raise UserError(f"{url}: expected a table ending in {endings}")
    pandas = import_pandas()
    from pyarrow import ArrowException

    data = read_bytes(url, attempts=attempts, wait=wait, storage_options=storage_options)
    try:
        if suffix in PARQUET:
            check_parquet(data, url)
            table = decode_parquet(data).to_pandas(use_threads=False)
        else:
            head, rows = _cells(data.decode("utf-8-sig"), SEPARATORS[suffix], url)
            table = pandas.DataFrame(rows, columns=head, dtype=object)
            table.attrs["repeated"] = [name for name in head if head.count(name) > 1]
    except (UserError, MemoryError):
        raise
    except (csv.Error, ValueError, OSError, ArrowException) as error:
        raise UnreadableFileError(f"{url}: unreadable table ({error})") from error
    if table.empty:
        raise UserError(f"{url}: no rows")
    return table


def decode_parquet(data: bytes) -> pyarrow.Table:
    """The table that the content of a Parquet file holds, decoded by this thread alone.

    `pyarrow.parquet.read_table` may leave Python objects to a thread of its own, which aborts a
    process that ends meanwhile.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(BytesIO(data), pre_buffer=False) as file:
        return file.read(use_threads=False, use_pandas_metadata=True)


def check_parquet(source: bytes | str, url: str) -> None:
    """Compare what a Parquet file unpacks to with its size, before its rows are read.

    Args:
        source: its content, or its path.
        url: its name, for messages.

    Raises:
        UserError: a small file of too much, as a value that it has once for millions of rows.
    """
    from pyarrow import BufferReader, DictionaryArray, compute, parquet

    size = os.path.getsize(source) if isinstance(source, str) else len(source)
    most = max(MOST_UNPACKED, MOST_TIMES * size)

    def opened(**options: Any) -> Any:
        content = source if isinstance(source, str) else BufferReader(source)
        return parquet.ParquetFile(content, **options)

    with opened() as file:
        told, leaves = file.metadata, [file.schema.column(i) for i in range(len(file.schema))]
        groups = (told.row_group(i) for i in range(told.num_row_groups))
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    total = sum(
        max(BYTES_OF_VALUE * each.num_values, each.total_uncompressed_size) for each in columns
    )
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    # Each text once, and the numbers of those of the rows: small, whatever the rows would take.
    with opened(read_dictionary=texts) as file:
        batches = file.iter_batches(columns=texts) if total <= most else ()
        for column in (column for batch in batches for column in batch.columns):
            if not isinstance(column, DictionaryArray):
                continue
            lengths = compute.binary_length(column.dictionary)
            total += compute.sum(lengths.take(column.indices)).as_py() or 0
            if total > most:
                break
    if total > most:
        raise UserError(
            f"{url}: {told.num_rows:,} rows in {size:,} bytes, which unpack to more than "
            f"{most:,}; expected a table of files that differ"
        )


def _cells(text: str, separator: str, url: str) -> tuple[list[str], list[list[str | None]]]:
    """The names of the columns and the cells of each row; None for an empty one.

    Separators at the end of a line, as spreadsheets write them, and lines without a cell do not
    count.

    Raises:
        UserError: another separator, or a line of more cells than columns.
    """
    lines = csv.reader(StringIO(text, newline=""), delimiter=separator, strict=True)
    head = _without_end(next(lines, []))
    for other in (",", ";", "\t"):
        if len(head) == 1 and other in head[0]:
            raise UserError(f"{url}: separated by {other!r}; expected {separator!r}")
    rows: list[list[str | None]] = []
    for line in lines:
        cells = _without_end(line)
        if len(cells) > len(head):
            raise UserError(
                f"{url}: line {lines.line_num} has {len(cells)} cells; expected at most "
                f"{len(head)}, as there are columns: {', '.join(head)}"
            )
        if cells:
            rows.append([cell or None for cell in cells] + [None] * (len(head) - len(cells)))
    return head, rows


def _without_end(cells: list[str]) -> list[str]:
    """The cells of a line up to the last one that is not empty."""
    return cells[: max((place for place, cell in enumerate(cells, 1) if cell), default=0)]


def list_images(
    url: str,
    *,
    root: str | None = None,
    path_column: str = "path",
    split_column: str = "split",
    split: str | None = None,
    split_seed: int = 0,
    count: int | None = None,
    **reading: Any,
) -> list[str]:
    """The files that a table names, in its order.

    Args:
        url: of the table.
        root: folder or URL of relative paths; None for the table's.
        path_column: the files.
        split_column: their splits; a permutation divides a table that lacks it.
        split: "train", "val" or "test"; None for all files.
        split_seed: of the permutation.
        count: size of a random choice of the files; None for all.
        reading: further arguments of `read_table`.

    Raises:
        UserError: a column or a value is missing, or the split has no rows; and as `read_table`.
    """
    table = read_table(url, **reading)
    require_columns(table, [path_column], url)
    require_values(table, path_column, url)
    paths = table[path_column].astype(str).to_numpy(dtype=object)
    if split is not None:
        paths = paths[splits_of(table, split_column, split_seed, url) == split]
        if not len(paths):
            raise UserError(f"{url}: no rows of the split {split!r}")
    if count is not None and count < len(paths):
        chosen = np.random.RandomState(0).permutation(len(paths))[:count]
        paths = paths[np.sort(chosen)]
    if root is None:
        root = url.rpartition("/")[0] if is_url(url) else os.path.dirname(url)
    return [join(root, path) for path in paths]


def require_columns(table: pd.DataFrame, columns: Iterable[str], url: str) -> None:
    """Raises UserError for a column that the table lacks."""
    found = [str(column) for column in table.columns]
    for column in columns:
        if column not in found:
            raise UserError(
                f"{url}: no column {column!r}{nearest(column, found)}; it has {', '.join(found)}"
            )
        if column in table.attrs.get("repeated", ()):
            raise UserError(f"{url}: two columns {column!r}; expected one")


def require_values(table: pd.DataFrame, column: str, url: str) -> None:
    """Raises UserError where a cell of the column is missing or blank, naming the first row."""
    missing = np.flatnonzero(texts(table[column]) == "")
    if len(missing):
        raise UserError(f"{url}: row {missing[0] + 1} has no {column!r} ({len(missing)} such rows)")


def texts(values: pd.Series) -> pd.Series:
    """Text without blanks around it; empty where a cell is missing."""
    return values.astype(object).where(values.notna(), "").astype(str).str.strip()


def splits_of(table: pd.DataFrame, column: str, seed: int, url: str) -> np.ndarray:
    """The split of each row: what the column says, or a permutation where the table lacks it.

    Args:
        table: of images.
        column: its name.
        seed: of the permutation.
        url: of the table, for messages.

    Raises:
        UserError: for a value that is not the name of a split; a column that is missing, unless it
            has the usual name and no column has one like it.
    """
    like = [name for name in table.columns if str(name).strip().lower() == column.lower()]
    if like or column not in ("", SPLIT_COLUMN):
        require_columns(table, [column], url)
        require_values(table, column, url)
        return split_names(table[column], url)
    return random_splits(len(table), seed)


def split_names(values: pd.Series, url: str) -> np.ndarray:
    """ "train", "val" or "test" of each row, from a column that says so.

    Raises:
        UserError: for a value that is not the name of a split.
    """
    known = {alias: name for name, aliases in SPLIT_NAMES.items() for alias in aliases}
    known["test"] = "test"
    texts = values.astype(str).str.strip().str.lower()
    unknown = np.flatnonzero(~texts.isin(list(known)))
    if len(unknown):
        row = unknown[0]
        raise UserError(
            f"{url}: split {values.iloc[row]!r} in row {row + 1}: expected {', '.join(SPLITS)}"
        )
    return texts.map(known).to_numpy(dtype=object)


def random_splits(size: int, seed: int) -> np.ndarray:
    """ "train", "val" or "test" of each of `size` rows, by a seeded permutation.

    The first 60 % of it train and the next 20 % validate, both rounded down; the rest is the test
    split. As published for cells, with the seed 0.
    """
    # RandomState, unlike newer generators, never changes its order.
    order = np.random.RandomState(seed).permutation(size)
    ends = [size * 3 // 5, size * 3 // 5 + size // 5]
    names = np.empty(size, dtype=object)
    for name, rows in zip(SPLITS, np.split(order, ends), strict=True):
        names[rows] = name
    return names
