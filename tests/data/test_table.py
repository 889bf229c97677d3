"""Columns of a table: none is overlooked, and none is one of two."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim.data.channels import ChannelData
from fastvim.data.checks import check_data, findings
from fastvim.data.table import MOST_UNPACKED, list_images, read_table
from fastvim.errors import UserError
from fastvim.inference.parts.tables import table_paths
from fastvim_cli import main

pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


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


def columns(folder: Path, text: str, name: str = "table.csv") -> dict[str, list]:
    (folder / name).write_bytes(text.encode())
    return read_table(str(folder / name)).to_dict("list")


@pytest.mark.parametrize(
    "text",
    [
        "path,split\na.npy,train\nb.npy,val\n",
        "\ufeffpath,split\r\na.npy,train\r\nb.npy,val\r\n",
        "path,split\na.npy,train,\nb.npy,val,\n",
        "path,split,\na.npy,train,\nb.npy,val,\n",
        "path,split,,\na.npy,train\nb.npy,val\n",
        "path,split\n\na.npy,train\nb.npy,val\n\n,\n,,\n",
        '"path","split"\n"a.npy","train"\n"b.npy",val',
    ],
    ids=["plain", "mark", "ends", "all ends", "end of the names", "blank lines", "quoted"],
)
def test_cells_stay_in_their_columns(text, tmp_path):
    assert columns(tmp_path, text) == {"path": ["a.npy", "b.npy"], "split": ["train", "val"]}
    assert columns(tmp_path, text.replace(",", "\t"), "table.tsv")["split"] == ["train", "val"]


def test_a_cell_may_hold_separators_lines_and_quotes(tmp_path):
    found = columns(tmp_path, 'path,label\n"a,\nb.npy","the ""first"""\nNA,\n')
    assert found == {"path": ["a,\nb.npy", "NA"], "label": ['the "first"', None]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path;split\na;train\n", "separated by ';'; expected ','"),
        ("path\tsplit\na,b\ttrain\n", "separated by '\\t'; expected ','"),
        ("path,split\na,train\nb,c,val\n", "line 3 has 3 cells; expected at most 2"),
        ('path,split\n"a"b,train\n', "unreadable table"),
        ('path,split\n"a,train\n', "unreadable table"),
        ("path,split\na,train\nb\n", "row 2 has no 'split' (1 such rows)"),
        ("path,split\na,train\n,val\n", "row 2 has no 'path' (1 such rows)"),
    ],
)
def test_cells_out_of_their_columns_are_named(text, message, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        list_images(str(tmp_path / "table.csv"), split="train")


def test_files_listed_twice_and_in_two_splits(tmp_path):
    rows = ["0,a,train", "1,b,train", "0,a,train", "1,a,train", "2,b,val", "2,b,val"]
    rows.append(f"../{tmp_path.name}/1,b,val")
    lines = [row.replace(",", ".npy,", 1) for row in rows]
    (tmp_path / "table.csv").write_text("\n".join(["path,label,split", *lines]))
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", np.random.default_rng(index).random((1, 16, 16)))
    data = ChannelData(str(tmp_path), 1, (0.5,), (0.3,), img_size=16)
    reports = check_data(data, ("train", "val"), sample=0)
    _, warnings, _ = findings(reports)
    assert warnings == {
        "train: file listed twice": (1, str(tmp_path / "0.npy")),
        "train: file listed under two classes": (1, f"{tmp_path / '1.npy'}, as b and a"),
        "val: file listed twice": (1, str(tmp_path / "2.npy")),
        "val: file that train has too": (1, f"{tmp_path}/../{tmp_path.name}/1.npy"),
    }
    _, val = check_data(data, ("train", "val"))
    assert val.warnings == reports[1].warnings  # its content is not counted too


def test_a_name_that_no_file_can_have_is_missing(tmp_path, capsys):
    for name in "abc":
        np.save(tmp_path / f"{name}.npy", np.full((1, 8, 8), ord(name), np.uint8))
    text = "path,label,split\na.npy,0,train\nx\0y.npy,1,train\nb.npy,1,train\nc.npy,0,val\n"
    (tmp_path / "table.csv").write_text(text)
    data = ChannelData(str(tmp_path), 1, (99.0,), (9.0,), img_size=16)
    assert any("missing image file" in error for error in findings(check_data(data))[0])
    assert main(["data", "stats", str(tmp_path / "table.csv")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"x\x00y.npy: no such file" in line


def repeated(value: str, rows: int) -> pa.Array:
    """A column of one value, which a file has once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))


UNPACKED = {
    "many rows": lambda: {"path": repeated("a.npy", 1_000_000)},
    "a long cell": lambda: {"path": ["x" * 20_000_000]},
    "a long cell, often": lambda: {"path": repeated("x" * 10_000, 10_000)},
    "a long list": lambda: {
        "path": ["a.npy"],
        "list": pa.ListArray.from_arrays([0, 4_000_000], pa.nulls(4_000_000, pa.int8())),
    },
}


@pytest.mark.parametrize("content", UNPACKED)
def test_a_small_file_of_too_much(content, tmp_path, monkeypatch):
    """Of a sixteenth of what the limit is."""
    monkeypatch.setattr("fastvim.data.table.MOST_UNPACKED", MOST_UNPACKED // 16)
    file = str(tmp_path / "small.parquet")
    parquet.write_table(pa.table(UNPACKED[content]()), file, compression="zstd")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    for read in (read_table, lambda file: list(table_paths(file, file))):
        with pytest.raises(UserError, match=r"small\.parquet: [\d,]+ rows in [\d,]+ bytes, which"):
            read(file)
    assert time.monotonic() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_paths_that_differ_are_no_small_file(tmp_path):
    rows = {"path": [f"s3://bucket/plate/{index:08d}.npy" for index in range(20_000)]}
    rows |= {"label": ["a"] * 20_000, "note": ["much longer than a path " * 20] * 20_000}
    parquet.write_table(pa.table(rows), tmp_path / "t.parquet", compression="zstd")
    assert len(read_table(str(tmp_path / "t.parquet"))) == 20_000


def test_a_list_of_values_nested_too_deep(tmp_path):
    (tmp_path / "list.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"list\.jsonl: line 1: no JSON"):
        list(table_paths(str(tmp_path / "list.jsonl"), "list.jsonl"))


ENDS_AT_ONCE = """
import os, sys
from pathlib import Path
from fastvim.data.table import decode_parquet
count = lambda: len(os.listdir("/proc/self/task"))
from pyarrow import parquet
data, before = Path(sys.argv[1]).read_bytes(), count()
rows = decode_parquet(data).num_rows
print(rows, count() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted on Linux")
def test_decoding_leaves_no_thread_with_objects_of_python(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"path": ["a.png", "b.png"]}), file)
    command = [sys.executable, "-c", ENDS_AT_ONCE, str(file)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["2", "0"]
