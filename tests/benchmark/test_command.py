"""`fastvim benchmark`, as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import CONV, OURS, WRONG

import fastvim.benchmark
from fastvim.benchmark import Bench, Record, timing
from fastvim.benchmark.training import LOOP
from fastvim_cli import benchmark as command
from fastvim_cli import main

QUICK = ["--device", "cpu", "--warmup", "1", "--repeats", "1"]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "GROUP_SECONDS", {"cuda": 1e-3, "cpu": 1e-3})


def benchmark(*words: str) -> int:
    return main(["benchmark", *words, *(QUICK if "--from" not in words else [])])


def rows():
    return json.loads(Path("results.json").read_text())["rows"]


def test_a_record_without_rows(capsys):
    Path("results.json").write_text('{"device": "a machine", "runs": [], "rows": []}')
    assert benchmark("--from", "results.json") == 0
    assert capsys.readouterr().out.startswith("a machine")


@pytest.mark.slow
def test_table_file_and_picture(capsys):
    words = ["--size", "32", "48x40", "--batch", "3", "2", "--out", "results.json"]
    assert benchmark(OURS, *words, "--plot", "picture.png") == 0
    output = capsys.readouterr().out
    assert "float32, inference" in output
    assert "48x40" in output
    assert "GiB" not in output  # nothing counts it on a CPU
    found = rows()
    assert [(r["model"], r["size"], r["batch"]) for r in found] == [
        (OURS, [32, 32], 3),
        (OURS, [48, 40], 2),
    ]
    assert all(r["failure"] is None and r["engine_error"] < 1e-3 for r in found)
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    (run,) = json.loads(Path("results.json").read_text())["runs"]
    assert run["command"].startswith(f"fastvim benchmark {OURS} --size 32 48x40")
    assert {"torch", "timm", "triton", "cuda", "fastvim"} <= run["versions"].keys()
    assert set(run["engines"]) == {"add_norm", "conv_pool", "selective_scan", "expand_gate"}


@pytest.mark.slow
def test_models_may_follow_options(capsys):
    assert benchmark("--dtype", "bfloat16", "--size", "32", "--markdown", OURS, CONV) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| images/s | 32 (32) |"
    assert [line.split()[1] for line in lines[2:]] == [OURS, CONV]


def test_an_engine_on_request(capsys):
    words = [OURS, "--size", "32", "--batch", "2", "--out", "results.json", "--engine"]
    assert benchmark(*words, "reference") == 0
    (run,) = json.loads(Path("results.json").read_text())["runs"]
    assert set(run["engines"].values()) == {"reference"}
    assert benchmark(*words, "numbra") == 2
    assert "engine 'numbra'" in capsys.readouterr().err


@pytest.mark.slow
def test_training(capsys):
    words = [OURS, "--train", "--size", "32", "--batch", "2", "--out", "results.json"]
    assert benchmark(*words) == 0
    output = capsys.readouterr().out
    assert "float32, training step" in output
    assert "loop images/s" in output
    (row,) = rows()
    assert row["loop_images_per_second"] == pytest.approx(2e3 / row["loop_ms"])
    assert row["loop_error"] < row["bound"]
    (run,) = json.loads(Path("results.json").read_text())["runs"]
    assert run["loop"] == LOOP


def test_a_wrong_row_is_marked_and_the_code_is_1(capsys):
    pytest.importorskip("numba")
    with pytest.raises(SystemExit) as exit_info:
        benchmark(WRONG, OURS, "--size", "32", "--out", "results.json")
    assert exit_info.value.code == 1
    streams = capsys.readouterr()
    assert f"{WRONG} 32 (32) eager: wrong: relative error" in streams.err
    assert "failed" in streams.out
    assert [r["failure"] is None for r in rows()] == [False, True]


def test_append_keeps_the_other_rows():
    benchmark(OURS, "--size", "32", "--out", "results.json")
    benchmark(CONV, OURS, "--size", "32", "--out", "results.json", "--append")
    assert [(r["model"], r["run"]) for r in rows()] == [(CONV, 1), (OURS, 1)]
    benchmark(OURS, "--size", "40", "--out", "results.json", "--append")
    assert [r["run"] for r in rows()] == [1, 1, 2]
    benchmark(OURS, "--size", "32", "--out", "results.json")
    assert len(rows()) == 1


def test_append_to_the_results_of_another_device(tmp_path, capsys):
    Record("abacus").save(tmp_path / "results.json")
    assert benchmark(OURS, "--size", "32", "--out", "results.json", "--append") == 2
    assert "results.json was measured on abacus, this is" in capsys.readouterr().err


def test_show_a_file(capsys):
    benchmark(OURS, CONV, "--size", "32", "--out", "results.json")
    capsys.readouterr()
    assert benchmark("--from", "results.json", "--plot", "picture.png") == 0
    assert OURS in capsys.readouterr().out
    assert benchmark("--from", "results.json", "--markdown") == 0
    assert capsys.readouterr().out.startswith("| images/s | 32 (32) |\n")


def test_an_interruption_loses_nothing(monkeypatch, capsys):
    measure = Bench.measure

    def interrupted(self, case):
        if case.model == CONV:
            raise KeyboardInterrupt
        return measure(self, case)

    monkeypatch.setattr(Bench, "measure", interrupted)
    assert benchmark(OURS, CONV, "--size", "32", "--out", "results.json") == 130
    streams = capsys.readouterr()
    assert OURS in streams.out
    assert "fastvim: interrupted; the rows so far are in results.json" in streams.err
    assert [r["model"] for r in rows()] == [OURS]
    assert benchmark(CONV, "--size", "32") == 130
    assert capsys.readouterr() == ("", "fastvim: interrupted\n")  # nothing is measured yet


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the name of at least one model"),
        (["fastvim_tinny_patch16_224"], "nearest: fastvim_tiny_patch16_224"),
        ([OURS, "resnet188"], "nearest: resnet18"),
        ([OURS, "--size", "32by32"], "'32by32'"),
        ([OURS, "--size", "32", "--batch", "1", "2"], "2 batches for 1 sizes"),
        ([OURS, "--batch", "0"], "--batch: 0"),
        ([OURS, "--repeats", "0"], "--repeats: 0"),
        ([OURS, "--dtype", "int8"], "--dtype"),
        ([OURS, "--mode", "graph"], "mode graph needs a CUDA device"),
        ([OURS, "--train", "--mode", "eager", "graph"], "mode graph needs a CUDA device"),
        ([OURS, "--device", "gpu"], "--device gpu"),
        ([OURS, "--append"], "--append needs --out"),
        (["--from", "none.json"], "no results at none.json"),
        ([OURS, "--from", "none.json"], "expected no models"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    # QUICK goes first: what the user gives last counts.
    assert main(["benchmark", *QUICK, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fastvim: error: ")
    assert error.count("\n") == 1


def test_the_choices_are_the_librarys():
    assert command.MODES == fastvim.benchmark.MODES
    assert list(command.DTYPES) == list(fastvim.benchmark.PRECISIONS)
