"""The list of a run: from words, from tables of every kind, from addresses."""

from __future__ import annotations

import json
import os
import tracemalloc

import fsspec
import pytest
from toy_work import write_files

from fastvim.data.folders import natural_key
from fastvim.errors import UserError
from fastvim.inference.parts.listing import read_items, write_list
from fastvim.inference.parts.sources import Source, sorted_in_runs
from fastvim.inference.parts.store import open_store

BIN = (".bin",)


def paths(source):
    return [item["path"] for item in source.items(BIN)]


def test_words(tmp_path, caplog):
    folder = tmp_path / "a"
    names = write_files(folder, 12)
    (folder / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    words = (names[3], str(folder), str(folder / "1*.bin"), str(tmp_path / "empty"), "no.bin")
    items = list(Source(words).items(BIN))
    assert [item["path"] for item in items] == [
        names[3],
        *(name for name in names if name != names[3]),
        str(tmp_path / "empty"),
        "no.bin",
    ]
    assert [item.get("error") for item in items[-2:]] == ["a folder without images", "no such file"]
    assert not any("error" in item for item in items[:-2])
    assert "left out 1 .txt" in caplog.text


def test_addresses():
    files = fsspec.filesystem("memory")
    for name in ("10.bin", "2.bin", "below/1.bin", ".hidden.bin", "notes.txt"):
        files.pipe_file(f"/source/{name}", b"1")
    root = "memory://source"
    assert paths(Source((root,))) == [
        f"memory:///source/{n}" for n in ("2.bin", "10.bin", "below/1.bin")
    ]
    assert paths(Source((f"{root}/*.bin",))) == paths(Source((root,)))[:2]
    assert paths(Source((f"{root}/2.bin", "https://a.org/b.png?c=*"))) == [
        f"{root}/2.bin",
        "https://a.org/b.png?c=*",
    ]


@pytest.mark.parametrize("size", [1, 3, 12, 13, 100])
def test_runs_are_merged_in_natural_order(size):
    names = ["a10", "a9", "b/2", "b/10", "b 1", "A9", os.fsdecode(b"\xff"), "c\nd", *"zyxw"]
    assert list(sorted_in_runs(names, size)) == sorted(names, key=natural_key)
    assert list(sorted_in_runs([], size)) == []


def write_table(path, rows, header="path,label"):
    if path.suffix == ".parquet":
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame({"path": rows, "label": range(len(rows))}).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"path": row, "label": 1}) + "\n" for row in rows))
    elif path.suffix == ".txt":
        path.write_text("".join(f"{row}\n" for row in rows))
    else:
        comma = "\t" if path.suffix == ".tsv" else ","
        lines = [header.replace(",", comma), *(f'"{row}"{comma}1' for row in rows)]
        path.write_text("\n".join(lines))


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".jsonl", ".txt"])
def test_tables(tmp_path, ending):
    table = tmp_path / f"list{ending}"
    rows = ["b, c.png", "/a/1.png", "s3://bucket/é.png", "/a/1.png"]
    write_table(table, rows)
    expected = [str(tmp_path / rows[0]), *rows[1:]]  # a row each, also where a path is there twice
    assert paths(Source(table=str(table))) == expected


def test_one_column_and_texts(tmp_path):
    one = tmp_path / "one.csv"
    one.write_text("image\n/a.png\n\n/b.png\n")
    assert paths(Source(table=str(one))) == ["/a.png", "/b.png"]
    texts = tmp_path / "texts.jsonl"
    texts.write_text('"/a.png"\n{"path": "/b.png"}\n{"file": "/c.png"}\n')
    assert paths(Source(table=str(texts))) == ["/a.png", "/b.png", "/c.png"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xlsx", "", "expected a list ending in .csv"),
        ("a.csv", "file,label\nb.png,1\n", "no column 'path'.*it has file, label"),
        ("a.csv", "", "no column 'path'; it has none"),
        ("a.csv", "path,path\na,b\n", "two columns 'path'"),
        ("a.csv", "path,label\na.png\n", "line 2: 1 cells, expected 2"),
        ("a.csv", "path,label\na.png,1\n,2\n", "line 3: nothing, expected a path"),
        ("a.jsonl", '"a"\n{\n', "line 2: no JSON"),
        ("a.jsonl", "5\n", "line 1: 5, expected a path"),
        ("a.jsonl", '{"a": "b", "c": "d"}\n', "line 1: no column 'path'"),
        ("a.parquet", "PAR1", "unreadable table"),
    ],
)
def test_faulty_tables(tmp_path, name, text, message):
    table = tmp_path / name
    table.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        paths(Source(table=str(table)))
    assert str(error.value).startswith(str(table))
    assert "\n" not in str(error.value)


def test_an_empty_list_is_an_error(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text("path\n")
    with pytest.raises(UserError, match="no image in the list"), open(tmp_path / "l", "wb") as file:
        write_list(file, Source(table=str(table)).items(BIN), 10)


def test_a_long_list_takes_little_memory(tmp_path):
    """Twenty times the paths take the same memory, but for the offsets of the parts."""

    def peak(count):
        table = tmp_path / f"{count}.csv"
        with table.open("w") as file:
            file.write("path\n")
            file.writelines(f"/a/long/folder/of/images/{i:012d}.jpg\n" for i in range(count))
        store = open_store(str(tmp_path / str(count)))
        tracemalloc.start()
        with store.writing() as draft:
            listing = write_list(draft.file, Source(table=str(table)).items(None), 1024)
            draft.name = listing.file
        last = read_items(store, listing, len(listing.offsets) - 2)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert last[-1]["path"] == f"/a/long/folder/of/images/{count - 1:012d}.jpg"
        return used

    small = peak(5_000)
    assert peak(100_000) < small + 200_000
