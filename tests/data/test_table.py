"""Columns of a table: none is overlooked, and none is one of two."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim.data.channels import ChannelData
from fastvim.data.table import list_images
from fastvim.errors import UserError

pytest.importorskip("pandas")
pytest.importorskip("pyarrow")


def table(folder: Path, head: str, row: str = "{}.npy,a,train") -> str:
    lines = [head, *(row.format(index) for index in range(10))]
    (folder / "table.csv").write_text("\n".join(lines))
    return str(folder / "table.csv")


@pytest.mark.parametrize("name", ["Split", " split", "SPLIT "])
def test_a_column_of_splits_by_another_spelling(tmp_path, name):
    """A permutation would divide the rows otherwise, without a word."""
    with pytest.raises(UserError, match=rf"no column 'split'.*it has .*{name}"):
        list_images(table(tmp_path, f"path,label,{name}"), split="train")


def test_a_column_of_splits_that_was_named(tmp_path):
    url = table(tmp_path, "path,label,part")
    assert len(list_images(url, split_column="part", split="train")) == 10
    with pytest.raises(UserError, match=r"no column 'fold'.*it has path, label, part"):
        list_images(url, split_column="fold", split="train")


def test_no_column_of_splits(tmp_path):
    url = table(tmp_path, "path,label,note")
    for column in ("split", ""):
        assert len(list_images(url, split_column=column, split="train")) == 6


def test_two_columns_of_one_name(tmp_path):
    with pytest.raises(UserError, match=r"table\.csv: two columns 'path'; expected one"):
        list_images(table(tmp_path, "path,label,path"))
    assert len(list_images(table(tmp_path, "path,note,note"))) == 10


@pytest.mark.filterwarnings("error")
def test_pictures_are_read_without_a_warning(tmp_path):
    url = table(tmp_path, "path,label,split", "picture.png,{},train")
    Image.fromarray(np.full((16, 16, 3), 7, np.uint8)).save(tmp_path / "picture.png")
    data = ChannelData(os.path.dirname(url), 3, (7.0,), (1.0,), img_size=16)
    image, _ = data.opened("train")[0]
    assert image.shape == (3, 16, 16)
