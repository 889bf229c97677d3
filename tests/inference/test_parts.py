"""Parts: computed whole or not at all, the same rows whoever computes them and however often."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest
import torch
from toy_work import Quiet, Toy, ToyRead, write_files

from fastvim.errors import MachineError, UserError
from fastvim.inference.parts.collect import write_table
from fastvim.inference.parts.formats import decode, encode
from fastvim.inference.parts.manifest import read_manifest
from fastvim.inference.parts.run import Plan, run_parts
from fastvim.inference.parts.shards import Shard
from fastvim.inference.parts.sources import Source
from fastvim.inference.parts.status import status
from fastvim.inference.parts.store import open_store

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_files(folder, 45)
    return folder


def run(folder, out, work=None, **plan):
    listener = Quiet()
    plan = {"part_size": 10, **plan}
    source = plan.pop("source", Source((str(folder),)))
    outcome = run_parts(work or Toy(), source, str(out), Plan(CPU, **plan), listener)
    return outcome, listener


def parts_of(out):
    """Names and bytes of the parts."""
    return {p.name: p.read_bytes() for p in sorted((out / "parts").glob("part-*"))}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The parts of one process, and their rows."""
    out = tmp_path_factory.mktemp("whole")
    outcome, _ = run(folder, out)
    return parts_of(out), list(outcome.rows())


def test_rows_in_order_with_errors_in_place(folder, whole):
    parts, rows = whole
    assert list(parts) == [f"part-{i:06d}.parquet" for i in range(5)]
    assert [row["path"] for row in rows] == [str(folder / f"{i}.bin") for i in range(45)]
    for number, row in enumerate(rows):
        if number % 7 == 6:
            assert row["error"] == "no bytes"
            assert row["value"] is None
        elif number == 3:
            assert "not finite" in row["error"]
        else:
            assert row == {
                "path": row["path"],
                "value": number % 200,
                "number": number,
                "error": None,
            }


def test_shards_compute_the_same_bytes(folder, whole, tmp_path):
    for index in (1, 0, 2):  # in any order
        outcome, listener = run(folder, tmp_path, shard=Shard(index, 3))
    assert parts_of(tmp_path) == whole[0]
    assert outcome.missing == 0
    assert list(outcome.rows()) == whole[1]
    assert listener.begun == (10, 0)  # the third share of five parts


def test_a_finished_run_computes_nothing(folder, whole, tmp_path):
    run(folder, tmp_path)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    outcome, listener = run(folder, tmp_path, part_size=None)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()} == written
    assert listener.images == 0
    assert any("5 of 5 parts are done" in line for line in listener.lines)
    assert list(outcome.rows()) == whole[1]


def test_missing_parts_alone_are_computed(folder, whole, tmp_path):
    run(folder, tmp_path)
    (tmp_path / "parts" / "part-000001.parquet").unlink()
    (tmp_path / "parts" / "part-000004.parquet").unlink()
    _, listener = run(folder, tmp_path)
    assert listener.images == 15
    assert listener.begun == (45, 30)
    assert parts_of(tmp_path) == whole[0]


def _run_slowly(folder, out, shard):
    run(folder, out, Toy(seconds=0.01), shard=shard)


def test_kills_lose_no_row_and_double_none(folder, whole, tmp_path):
    """Processes are killed at random moments, with another number of them each time."""
    context = multiprocessing.get_context("fork")
    for turn, count in enumerate((2, 3, 1, 2)):
        processes = [
            context.Process(target=_run_slowly, args=(folder, tmp_path, Shard(i, count)))
            for i in range(count)
        ]
        for process in processes:
            process.start()
        time.sleep(0.05 + 0.03 * turn)
        for process in processes:
            process.kill()
            process.join()
    outcome, _ = run(folder, tmp_path)
    assert parts_of(tmp_path) == whole[0]
    assert list(outcome.rows()) == whole[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"work": Toy(weights="w1")}, "other weights: w0 there, w1 here"),
        ({"work": Toy(scale=2.0)}, "other settings: scale: 1.0 there, 2.0 here"),
        ({"work": Toy(command="other")}, "other command: toy there, other here"),
        ({"part_size": 20}, "other --part-size: 10 there, 20 here"),
        ({"words": 44}, "other number of images: 45 there, 44 here"),
        ({"words": 45}, "other list of images"),
    ],
)
def test_another_run_in_the_folder_is_refused(folder, tmp_path, change, message):
    run(folder, tmp_path)
    before = parts_of(tmp_path)
    change = dict(change)
    if number := change.pop("words", None):
        names = [str(folder / f"{i}.bin") for i in reversed(range(number))]
        change["source"] = Source(tuple(names))
    with pytest.raises(UserError, match=message) as error:
        run(folder, tmp_path, **change)
    assert "expected another --out" in str(error.value)
    assert parts_of(tmp_path) == before


def test_a_list_is_the_same_however_it_is_given(folder, whole, tmp_path):
    run(folder, tmp_path)
    names = tuple(str(folder / f"{i}.bin") for i in range(45))
    outcome, _ = run(folder, tmp_path, source=Source(names))
    assert list(outcome.rows()) == whole[1]
    table = tmp_path / "list.txt"
    table.write_text("\n".join(names))
    run(folder, tmp_path, source=Source(table=str(table)))
    table.write_text("\n".join(names[1:]))
    with pytest.raises(UserError, match="number of images: 45 there, 44 here"):
        run(folder, tmp_path, source=Source(table=str(table)))


def test_an_unfinished_run_keeps_its_list(tmp_path):
    """Images that come while a run is interrupted are not in it; once it is done, that is said."""
    folder, out = tmp_path / "files", tmp_path / "out"
    write_files(folder, 25)
    run(folder, out, shard=Shard(0, 2))
    (folder / "30.bin").write_bytes(b"a")
    outcome, _ = run(folder, out)
    assert outcome.images == 25
    with pytest.raises(UserError, match="number of images: 25 there, 26 here"):
        run(folder, out)


def test_names_of_any_bytes(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9 \\ \xc3\xa9.bin")
    (folder / name).write_bytes(b"\1")
    outcome, _ = run(folder, tmp_path / "out")
    (row,) = outcome.rows()
    assert row["path"] == str(folder / name)
    assert row["value"] == 1
    run(folder, tmp_path / "out")  # the same list


def test_texts_of_any_bytes_fit_into_parquet():
    pyarrow = pytest.importorskip("pyarrow")
    columns = pyarrow.schema([("files", pyarrow.list_(pyarrow.string())), ("n", pyarrow.int64())])
    row = {"path": "\udcff.png", "files": ["\udcff", "é"], "n": 3, "error": "\udcff.png: damaged"}
    (found,) = decode(encode([row], "parquet", columns), "parquet", "part")
    names = {"path": r"\udcff.png", "files": [r"\udcff", "é"], "error": r"\udcff.png: damaged"}
    assert found == {**row, **names}


def test_without_pyarrow_parts_are_json_lines(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    run(folder, tmp_path, shard=Shard(0, 2))
    assert list(parts_of(tmp_path)) == [f"part-{i:06d}.jsonl" for i in (0, 2, 4)]
    with pytest.raises(UserError, match="pyarrow is not installed"):
        run(folder, tmp_path, table=str(tmp_path / "t.parquet"))
    monkeypatch.undo()  # chosen once: a machine with pyarrow goes on in the same format
    outcome, _ = run(folder, tmp_path)
    assert list(parts_of(tmp_path)) == [f"part-{i:06d}.jsonl" for i in range(5)]
    rows = [{"value": None, "number": None, **row} for row in outcome.rows()]
    assert rows == whole[1]
    assert status(open_store(str(tmp_path))).failed == sum(bool(r["error"]) for r in whole[1])


def test_damaged_files_of_a_run(folder, tmp_path):
    run(folder, tmp_path)
    part = tmp_path / "parts" / "part-000002.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:-20])
    for act in (run, lambda *_: status(open_store(str(tmp_path)))):
        with pytest.raises(UserError, match=r"part-000002.parquet: damaged .*remove it"):
            act(folder, tmp_path)
    part.write_bytes((tmp_path / "parts" / "part-000001.parquet").read_bytes())
    with pytest.raises(UserError, match="rows of other images"):
        run(folder, tmp_path)
    part.write_bytes(content)
    manifest = tmp_path / "parts" / "manifest.json"
    told = json.loads(manifest.read_text())
    for text, message in (
        ("{", "manifest.json: damaged"),
        ("[]", "manifest.json: damaged"),
        (json.dumps({**told, "version": 2}), "version 2, expected 1"),
        (json.dumps({k: v for k, v in told.items() if k != "rows" and k != "weights"}), "damaged"),
    ):
        manifest.write_text(text)
        with pytest.raises(UserError, match=message):
            run(folder, tmp_path)
    manifest.unlink()
    with pytest.raises(UserError, match=r"a part without .*manifest.json"):
        run(folder, tmp_path)


def test_the_first_manifest_wins(folder, tmp_path):
    store = open_store(str(tmp_path / "parts"))
    run(folder, tmp_path)
    first = store.read("manifest.json")
    store.write_first("manifest.json", b"other")
    assert store.read("manifest.json") == first
    assert read_manifest(store).listing.rows == 45


def test_what_a_killed_process_has_begun_is_removed(folder, tmp_path):
    """Of a process that is gone; one that runs keeps its file."""
    gone = multiprocessing.get_context("fork").Process(target=int)
    gone.start()
    gone.join()
    host = socket.gethostname()
    (tmp_path / "parts").mkdir()
    for process in (gone.pid, os.getppid()):
        (tmp_path / "parts" / f"draft-{host}-{process}.part").touch()
    run(folder, tmp_path)
    left = [path.name for path in (tmp_path / "parts").glob("draft*")]
    assert left == [f"draft-{host}-{os.getppid()}.part"]


@pytest.mark.slow
def test_devices_compute_the_same_bytes(folder, whole, tmp_path):
    outcome, listener = run(folder, tmp_path, devices=2)
    assert parts_of(tmp_path) == whole[0]
    assert listener.images == 45
    assert sorted(listener.failures) == sorted(
        (row["path"], row["error"]) for row in whole[1] if row["error"]
    )
    assert sum(outcome.opened.heard) == 45 - 6  # what the processes have read
    assert list(outcome.rows()) == whole[1]


class TellsItsMethod(Toy):
    """Where a child opens it: how that child would start processes of its own."""

    def open(self, device):
        if multiprocessing.parent_process() is not None:
            raise UserError(f"starts by {multiprocessing.get_start_method()}")
        return super().open(device)


@pytest.mark.slow
def test_readers_of_a_process_start_as_those_of_the_command(folder, tmp_path):
    """By fork where that is the default: a spawned reader imports torch, which takes seconds."""
    with pytest.raises(UserError, match=f"starts by {multiprocessing.get_start_method()}$"):
        run(folder, tmp_path, TellsItsMethod(), devices=2)


class Dies(Toy):
    """Its process is killed by the first image."""

    def open(self, device):
        opened = super().open(device)
        if multiprocessing.parent_process() is not None:
            opened.rows = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return opened


class OtherWeights(Toy):
    """A file of weights that changes between two readings."""

    def open(self, device):
        opened = super().open(device)
        if multiprocessing.parent_process() is not None:
            opened.weights = "w9"
        return opened


@pytest.mark.slow
def test_a_process_that_dies_is_named(folder, tmp_path):
    with pytest.raises(MachineError, match=r"process \d of 2 on cpu was ended by signal 9; .*safe"):
        run(folder, tmp_path, Dies(), devices=2)
    with pytest.raises(UserError, match="other weights than the run's: w9"):
        run(folder, tmp_path, OtherWeights(), devices=2)


class LosesReaders(Toy):
    """A process that reads images is killed, as where memory ends."""

    def open(self, device):
        opened = super().open(device)
        opened.read = KillsItself()
        return opened


class KillsItself(ToyRead):
    def __call__(self, path):
        if path.endswith("12.bin"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(path)


def test_a_reader_that_dies_is_named(folder, whole, tmp_path):
    # torch's, which the command explains, where its signal comes between two batches
    named = r"worker \d of the loader .* was killed \(SIGKILL\)|DataLoader worker .* is killed"
    with pytest.raises((MachineError, RuntimeError), match=named):
        run(folder, tmp_path, LosesReaders(), workers=1)
    run(folder, tmp_path)
    assert parts_of(tmp_path) == whole[0]


def test_status(folder, tmp_path):
    with pytest.raises(UserError, match="no run, expected"):
        status(open_store(str(tmp_path)))
    run(folder, tmp_path, shard=Shard(0, 2))
    parts = tmp_path / "parts"
    for number, when in ((0, 1000), (2, 1010), (4, 1020)):
        os.utime(parts / f"part-{number:06d}.parquet", (when, when))
    now = status(open_store(str(tmp_path)), now=1030)
    assert (now.parts, now.all_parts, now.images, now.all_images) == (3, 5, 25, 45)
    assert now.failed == 5  # 3, 6, 20, 27 and 41
    assert now.rate == pytest.approx(15 / 30)
    assert now.remaining == pytest.approx(20 / (15 / 30))
    assert status(open_store(str(tmp_path)), now=9000).remaining is None
    run(folder, tmp_path)
    assert status(open_store(str(tmp_path))).remaining == 0


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_tables(folder, whole, tmp_path, ending):
    pandas = pytest.importorskip("pandas")
    table = tmp_path / "tables" / f"rows{ending}"
    run(folder, tmp_path, table=str(table))
    read = {
        ".parquet": pandas.read_parquet,
        ".csv": pandas.read_csv,
        ".jsonl": lambda path: pandas.read_json(path, lines=True),
    }[ending](table)
    assert list(read.columns) == ["path", "value", "number", "error"]
    assert read["path"].tolist() == [row["path"] for row in whole[1]]
    assert read["value"].fillna(-1).tolist() == [
        -1 if row["value"] is None else row["value"] for row in whole[1]
    ]
    assert read["error"].notna().tolist() == [bool(row["error"]) for row in whole[1]]


def test_nested_values_of_a_csv_are_json(tmp_path):
    rows = [{"path": "a", "top": [{"class": "ant, black"}], "error": None}]
    write_table(str(tmp_path / "t.csv"), rows, lambda: None)
    assert (tmp_path / "t.csv").read_bytes().splitlines() == [
        b"path,top,error",
        b'a,"[{""class"": ""ant, black""}]",',
    ]


def test_a_table_of_another_ending(folder, tmp_path):
    with pytest.raises(UserError, match=r"t\.xlsx: expected a file ending in \.parquet"):
        run(folder, tmp_path, table=str(tmp_path / "t.xlsx"))
    assert not (tmp_path / "parts").exists()


def test_an_address(folder, whole):
    out = "memory://parts-of-a-test/run"
    outcome, _ = run(folder, out, shard=Shard(0, 2))
    assert outcome.missing == 20
    outcome, _ = run(folder, out, table="memory://parts-of-a-test/t.jsonl")
    assert list(outcome.rows()) == whole[1]
    assert status(open_store(out)).failed == sum(bool(row["error"]) for row in whole[1])
    lines = open_store("memory://parts-of-a-test").read("t.jsonl").splitlines()
    assert [json.loads(line)["number"] for line in lines] == [r["number"] for r in whole[1]]
    with pytest.raises(UserError, match="other weights"):
        run(folder, out, Toy(weights="w1"))


def test_workers_read_the_same(folder, whole, tmp_path):
    outcome, _ = run(folder, tmp_path, workers=2)
    assert parts_of(tmp_path) == whole[0]
    assert sum(outcome.opened.heard) == 45 - 6
