"""CellData: the published layout's tables, their join, labels, splits and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvim.constants import JUMPCP_MEAN, JUMPCP_STD
from fastvim.data.checks import check_data
from fastvim.data.jumpcp import CellData
from fastvim.data.table import random_splits
from fastvim.errors import UserError

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

# Of the published plate maps: solvent wells have no sample.
PLATE_MAP = """well_position\tbroad_sample\tsolvent
A01\tBRD-1\tDMSO
A02\t\tDMSO
A03\tBRD-2\tDMSO
B01\tBRD-3\tDMSO
B02\tBRD-4\tDMSO
B03	BRD-1	DMSO
B04\tBRD-5\tDMSO
"""
# In another order than the plate's; BRD-9 is not on the plate, of BRD-4 there is nothing.
METADATA = """broad_sample\ttarget\tgene\tcontrol_type
BRD-9\tUNUSED\tG9\t
BRD-5\tWHOLE\tG3\t
BRD-1\tTNF\tG10\t
BRD-3\t\t\t
BRD-2\tAKT1\tG2\tposcon_cp
\t\t\tnegcon
"""
WELLS = ("A01", "A02", "A03", "B01", "B02", "B03", "H12")
CLASS_OF_WELL = {"A01": "TNF", "A02": "negcon", "A03": "AKT1", "B01": "negcon", "B03": "TNF"}
CELLS = 70  # 10 of each well; two of the wells have no sample in the metadata


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A plate of 70 cells of 7 wells; the values of an image are the number of its cell."""
    (tmp_path / "cells").mkdir()
    paths = [f"cells/{index}.npy" for index in range(CELLS)]
    for index, path in enumerate(paths):
        np.save(tmp_path / path, np.full((8, 12, 12), index, np.uint8))
    wells = [WELLS[index % len(WELLS)] for index in range(CELLS)]
    table = pd.DataFrame({"ID": range(CELLS), "path": paths, "well_loc": wells})
    table.to_parquet(tmp_path / "cells.parquet")
    (tmp_path / "plate_map.txt").write_text(PLATE_MAP)
    (tmp_path / "metadata.tsv").write_text(METADATA)
    return tmp_path


def open_data(root: Path | str, stage: str = "fit", **settings: Any) -> CellData:
    tables = {"cells": "cells.parquet", "plate_map": "plate_map.txt", "metadata": "metadata.tsv"}
    settings = {"img_size": 12, "batch_size": 4, "num_workers": 0, **tables, **settings}
    data = CellData(root=str(root), **settings)
    data.prepare_data()
    data.setup(stage)
    return data


def test_a_check_counts_the_cells_of_each_label(root: Path) -> None:
    data = open_data(root)
    train, val, test = check_data(data)
    labels = [CLASS_OF_WELL[WELLS[index % len(WELLS)]] for index in cells_of(data, "train")]
    present = {name: labels.count(name) for name in ("negcon", "TNF", "AKT1")}
    assert train.classes == {**present, "WHOLE": 0}
    assert [report.modes for report in (train, val, test)] == [
        {"8 x uint8": len(report.files)} for report in (train, val, test)
    ]
    assert train.warnings == {"class without images": (1, "class WHOLE")}
    assert not [*train.errors, *val.errors, *val.warnings, *test.warnings]


def cells_of(data: CellData, role: str) -> list[int]:
    dataset = data._datasets[role]
    return [int(Path(dataset.filename(index)).stem) for index in range(len(dataset))]


def test_classes_and_labels(root: Path) -> None:
    data = open_data(root)
    data.setup("test")
    # Of the plate's wells, even if without cells, in the order of the metadata.
    assert data.class_names == ["negcon", "WHOLE", "TNF", "AKT1"]
    assert data.num_classes == 4
    seen = {}
    for role, dataset in data._datasets.items():
        for index, cell in enumerate(cells_of(data, role)):
            seen[cell] = data.class_names[dataset[index][1]]
    expected = {cell: CLASS_OF_WELL.get(WELLS[cell % len(WELLS)]) for cell in range(CELLS)}
    assert seen == {cell: name for cell, name in expected.items() if name}


def test_images_are_normalised_by_the_published_statistics(root: Path) -> None:
    data = open_data(root)
    image, _ = data._datasets["val"][0]
    cell = cells_of(data, "val")[0]
    expected = (cell - torch.tensor(JUMPCP_MEAN)) / torch.tensor(JUMPCP_STD)
    torch.testing.assert_close(image[:, 6, 6], expected)
    assert image.shape == (8, 12, 12)


def test_genes_are_labels_too(root: Path) -> None:
    assert open_data(root, label="gene").class_names == ["negcon", "G3", "G10", "G2"]


def test_classes_are_numbered_as_the_joined_table_is_factorised(root: Path) -> None:
    """Published: one more than pandas' code of a row, which is -1 where a value is missing."""
    plate, metadata = (
        pd.read_csv(root / name, sep="\t") for name in ("plate_map.txt", "metadata.tsv")
    )
    joined = metadata.merge(plate, how="inner", on="broad_sample")
    codes, _ = pd.factorize(joined["target"])
    expected = dict(zip(joined["well_position"], (codes + 1).tolist(), strict=True))
    data = open_data(root)
    data.setup("test")
    for role, dataset in data._datasets.items():
        for index, cell in enumerate(cells_of(data, role)):
            assert dataset[index][1] == expected[WELLS[cell % len(WELLS)]]


def test_cells_without_a_sample_are_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = open_data(root)
    data.setup("test")
    assert sum(len(dataset) for dataset in data._datasets.values()) == 50
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{root}/cells.parquet: 20 of 70 cells left out: the metadata lack the samples of their "
        "wells"
    ]


def test_the_split_is_of_the_whole_cell_table(root: Path) -> None:
    data = open_data(root, split_seed=5)
    data.setup("test")
    names = random_splits(CELLS, seed=5)
    known = [WELLS[cell % len(WELLS)] in CLASS_OF_WELL for cell in range(CELLS)]
    for role in ("train", "val", "test"):
        assert cells_of(data, role) == np.flatnonzero((names == role) & known).tolist()


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_other_table_formats(root: Path, ending: str) -> None:
    expected = open_data(root)
    names = {}
    for name, column in (("plate_map.txt", "plate_map"), ("metadata.tsv", "metadata")):
        table = pd.read_csv(root / name, sep="\t", dtype=str)
        names[column] = column + ending
        write = table.to_csv if ending == ".csv" else table.to_parquet
        write(root / names[column], index=False)
    data = open_data(root, **names)
    assert data.class_names == expected.class_names
    for role in ("train", "val"):
        got, wanted = data._datasets[role], expected._datasets[role]
        assert got._targets.tolist() == wanted._targets.tolist()


def test_other_column_names(root: Path) -> None:
    frame = pd.read_parquet(root / "cells.parquet")
    frame.rename(columns={"path": "file", "well_loc": "well"}).to_csv(root / "c.csv", index=False)
    for name, old, new in (
        ("plate_map.txt", "well_position\tbroad_sample", "position\tsample"),
        (
            "metadata.tsv",
            "broad_sample\ttarget\tgene\tcontrol_type",
            "sample\tt\tgene\tcontrol_type",
        ),
    ):
        (root / name).write_text((root / name).read_text().replace(old, new))
    columns = {"path_column": "file", "well_column": "well", "position_column": "position"}
    columns |= {"sample_column": "sample", "label": "t"}
    data = open_data(root, cells="c.csv", **columns)
    assert cells_of(data, "train") == cells_of(open_data_of_fixture(root), "train")


def open_data_of_fixture(root: Path) -> CellData:
    (root / "plate_map.txt").write_text(PLATE_MAP)
    (root / "metadata.tsv").write_text(METADATA)
    return open_data(root)


def test_tables_and_cells_behind_urls(root: Path) -> None:
    pytest.importorskip("fsspec")
    url = root.as_uri()
    data = open_data(url, metadata=str(root / "metadata.tsv"), num_workers=2)
    expected = list(open_data(root).val_dataloader())
    torch.testing.assert_close(list(data.val_dataloader()), expected, rtol=0, atol=0)


def test_the_working_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert len(next(iter(open_data("").val_dataloader()))[0]) == 4


def test_an_unreadable_cell(root: Path) -> None:
    data = open_data(root, on_error="skip")
    for cell in cells_of(data, "train")[:2]:
        (root / "cells" / f"{cell}.npy").write_bytes(b"")
    assert sum(len(targets) for _, targets in data.train_dataloader()) > 0
    assert data.skipped >= 2


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("metadata.tsv", "\t\t\t", "\tX\tX\t", "no sample of the plate without a 'target'"),
        ("metadata.tsv", "BRD-9\tUNUSED", "BRD-1\tAKT1", "broad_sample 'BRD-1' has target 'AKT1'"),
        ("plate_map.txt", "B03", "A01", "well_position 'A01' has|none"),
        ("plate_map.txt", "broad_sample", "sample", r"map\.txt: no column 'broad_sample'"),
        ("metadata.tsv", "target", "targets", r"no column 'target' \(nearest: targets\)"),
    ],
)
def test_odd_tables(root: Path, name: str, old: str, new: str, message: str) -> None:
    text = (root / name).read_text()
    assert old in text
    if old == "B03":  # the same well with another sample
        text = text.replace("B03\tBRD-1", "A01\tBRD-2")
    (root / name).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        open_data(root)


def test_wells_that_are_written_in_another_way(root: Path) -> None:
    text = PLATE_MAP.replace("A0", "A").replace("B0", "B")
    (root / "plate_map.txt").write_text(text)
    with pytest.raises(UserError, match="none of its wells, such as 'A01', has a sample"):
        open_data(root)


def test_a_configuration_may_name_the_settings_of_both_classes() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(CellData, "data")
    tables = {"root": "s3://b", "cells": "c.pq", "plate_map": "p.csv", "metadata": "m.tsv"}
    options = {"augment": {"min_size": 256}, "on_error": "skip", "storage_options": {"anon": True}}
    section = {"class_path": "fastvim.data.jumpcp.CellData", "init_args": {**tables, **options}}
    settings = parser.parse_object({"data": section}).data.init_args
    assert (settings.in_chans, settings.label, settings.batch_size) == (8, "target", 128)
    assert settings.augment == {"min_size": 256}
    # What the layout settles is not offered.
    assert not {"table", "label_column", "split_column"} & set(settings.keys())
    section["init_args"]["plates"] = 1
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_object({"data": section})
