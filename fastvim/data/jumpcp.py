"""Cell Painting images in the layout in which JUMP-CP is published."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from timm.utils.misc import natural_key

from fastvim.constants import JUMPCP_MEAN, JUMPCP_STD
from fastvim.data.channels import ChannelData, Rows
from fastvim.data.remote import join
from fastvim.data.table import random_splits, read_table, require_columns, require_values
from fastvim.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

_logger = logging.getLogger(__name__)


class CellData(ChannelData):
    """Cells of a plate with the perturbation of their well as the class.

    The cell table has each cell's file and well, the plate map each well's sample, the metadata
    each sample's label. An empty sample counts as a sample: in the published plate maps it stands
    for wells with solvent alone. Class 0 is the negative control; the labels of the plate's other
    wells follow in natural order. The cell table is split 60/20/20 by a permutation drawn with
    `split_seed`. Then cells of wells without a label are left out; a log line counts them.

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
        control_column: of the metadata: which kind of control a sample is.
        control: the negative control's value there, and the name of class 0.
        kwargs: further arguments of `ChannelData`.

    Raises:
        UserError: in `setup`, for a table that is missing, lacks a column or contradicts itself,
            and when no cell has a label.
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
        control_column: str = "control_type",
        control: str = "negcon",
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
        self.control_column = control_column
        self.control = control

    def _read_rows(self) -> Rows:
        url = self._table_url()
        cells = read_table(url, **self._reading)
        require_columns(cells, (self.path_column, self.well_column), url)
        require_values(cells, self.path_column, url)
        label_by_well = self._label_by_well()
        wells = _texts(cells[self.well_column])
        known = wells.isin(list(label_by_well)).to_numpy()
        if not known.any():
            raise UserError(f"{url}: none of its wells, such as {wells.iloc[0]!r}, has a label")
        if not known.all():
            _logger.warning(
                "%s: %d of %d cells left out: their wells have no label",
                url,
                (~known).sum(),
                len(cells),
            )
        names = sorted({*label_by_well.values()} - {self.control}, key=natural_key)
        return Rows(
            cells[self.path_column].astype(str).to_numpy(dtype=object)[known],
            wells[known].map(label_by_well).to_numpy(dtype=object),
            random_splits(len(cells), self.split_seed)[known],
            [self.control, *names],
        )

    def _label_by_well(self) -> dict[str, str]:
        """The class of each well that has one."""
        url, plate = self._read(self.plate_map)
        sample_by_well = _pairs(plate, self.position_column, self.sample_column, url)
        url, metadata = self._read(self.metadata)
        control_by_sample = _pairs(metadata, self.sample_column, self.control_column, url)
        label_by_sample = _pairs(metadata, self.sample_column, self.label, url)
        controls = [sample for sample, kind in control_by_sample.items() if kind == self.control]
        if not controls:
            raise UserError(f"{url}: no sample whose {self.control_column!r} is {self.control!r}")
        label_by_sample |= dict.fromkeys(controls, self.control)
        labels = {well: label_by_sample.get(name, "") for well, name in sample_by_well.items()}
        return {well: label for well, label in labels.items() if label}

    def _read(self, table: str) -> tuple[str, pd.DataFrame]:
        url = join(self.directory(), table)
        return url, read_table(url, **self._reading)


def _pairs(table: pd.DataFrame, key: str, value: str, url: str) -> dict[str, str]:
    """Two columns as a mapping; a missing cell is an empty text."""
    require_columns(table, (key, value), url)
    pairs: dict[str, str] = {}
    for name, text in zip(_texts(table[key]), _texts(table[value]), strict=True):
        if pairs.setdefault(name, text) != text:
            raise UserError(f"{url}: {key} {name!r} has {value} {pairs[name]!r} and {text!r}")
    return pairs


def _texts(values: pd.Series) -> pd.Series:
    """Text without blanks around it; empty where a cell is missing."""
    return values.astype(object).where(values.notna(), "").astype(str).str.strip()
