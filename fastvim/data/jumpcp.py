"""Cell Painting images in the layout in which JUMP-CP is published."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastvim.constants import JUMPCP_MEAN, JUMPCP_STD
from fastvim.data.channels import ChannelData, Rows
from fastvim.data.remote import join
from fastvim.data.table import (
    random_splits,
    read_table,
    require_columns,
    require_values,
    texts,
)
from fastvim.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

CONTROL = "negcon"  # as JUMP-CP's metadata call the negative control

_logger = logging.getLogger(__name__)


class CellData(ChannelData):
    """Cells of a plate with the perturbation of their well as the class.

    The cell table has each cell's file and well, the plate map each well's sample, the metadata
    each sample's label. An empty sample counts as a sample: in the published plate maps it stands
    for wells with solvent alone. As published, class 0 is the negative control: the samples without
    a label. The labels of the plate's other samples follow in the order in which the metadata first
    name them. The cell table is split 60/20/20 by a permutation drawn with `split_seed`. Then cells
    of wells whose sample the metadata lack are left out; a log line counts them.

    Args:
        root: directory or URL of relative paths, also those of the tables; "" for the working
            directory.
        cells: the cell table; this and the next two are CSV, TSV or Parquet files.
        plate_map: which sample is in which well.
        metadata: what each sample is.
        label: the metadata's column of labels: "target" for compounds, "gene" for genes.
        path_column: of the cell table: the file of a cell, an array (8, H, W).
        well_column: of the cell table: the well.
        position_column: of the plate map: the well.
        sample_column: of plate map and metadata: the sample.
        kwargs: further arguments of `ChannelData`.

    Raises:
        UserError: in `setup`, for a table that is missing, lacks a column or contradicts itself,
            when every sample has a label, and when no cell has a sample.
    """

    def __init__(
        self,
        root: str,
        cells: str,
        plate_map: str,
        metadata: str,
        label: str = "target",
        in_chans: int = 8,
        mean: tuple[float, ...] = JUMPCP_MEAN,
        std: tuple[float, ...] = JUMPCP_STD,
        path_column: str = "path",
        well_column: str = "well_loc",
        position_column: str = "well_position",
        sample_column: str = "broad_sample",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root,
            table=cells,
            in_chans=in_chans,
            mean=mean,
            std=std,
            path_column=path_column,
            label_column=label,
            split_column="",
            **kwargs,
        )
        self.plate_map = plate_map
        self.metadata = metadata
        self.label = label
        self.well_column = well_column
        self.position_column = position_column
        self.sample_column = sample_column

    def _read_rows(self) -> Rows:
        url = self._table_url()
        cells = read_table(url, **self._reading)
        require_columns(cells, (self.path_column, self.well_column), url)
        require_values(cells, self.path_column, url)
        label_by_well, class_names = self._labels()
        wells = texts(cells[self.well_column])
        known = wells.isin(list(label_by_well)).to_numpy()
        if not known.any():
            raise UserError(f"{url}: none of its wells, such as {wells.iloc[0]!r}, has a sample")
        if not known.all() and not self._examined:
            _logger.warning(
                "%s: %d of %d cells left out: the metadata lack the samples of their wells",
                url,
                (~known).sum(),
                len(cells),
            )
        splits = random_splits(len(cells), self.split_seed)
        return Rows(
            cells[self.path_column].astype(str).to_numpy(dtype=object)[known],
            wells[known].map(label_by_well).to_numpy(dtype=object),
            splits[known],
            class_names,
            splits[~known],
        )

    def _labels(self) -> tuple[dict[str, str], list[str]]:
        """The label of each well whose sample the metadata have, and the classes in order."""
        url, plate = self._read(self.plate_map)
        sample_by_well = _pairs(plate, self.position_column, self.sample_column, url)
        url, metadata = self._read(self.metadata)
        label_by_sample = _pairs(metadata, self.sample_column, self.label, url)
        placed = set(sample_by_well.values())
        labels = [label for sample, label in label_by_sample.items() if sample in placed]
        if "" not in labels:
            raise UserError(
                f"{url}: no sample of the plate without a {self.label!r}: expected one, "
                "the negative control"
            )
        names = {label: label or CONTROL for label in labels}  # in order of first appearance
        label_by_well = {
            well: names[label_by_sample[sample]]
            for well, sample in sample_by_well.items()
            if sample in label_by_sample
        }
        return label_by_well, list(dict.fromkeys([CONTROL, *names.values()]))

    def _read(self, table: str) -> tuple[str, pd.DataFrame]:
        url = join(self.directory(), table)
        return url, read_table(url, **self._reading)


def _pairs(table: pd.DataFrame, key: str, value: str, url: str) -> dict[str, str]:
    """Two columns as a mapping; a missing cell is an empty text."""
    require_columns(table, (key, value), url)
    pairs: dict[str, str] = {}
    for name, text in zip(texts(table[key]), texts(table[value]), strict=True):
        if pairs.setdefault(name, text) != text:
            raise UserError(f"{url}: {key} {name!r} has {value} {pairs[name]!r} and {text!r}")
    return pairs
