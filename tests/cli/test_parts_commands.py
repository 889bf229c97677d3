"""`fastvim predict`, `segment` and `detect` in parts, as a person and a scheduler call them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_weights
import torch
import yaml
from PIL import Image

from fastvim.models import create_model
from fastvim.weights import save
from fastvim_cli import main

DOCS = Path(__file__).parents[2] / "docs" / "clusters.md"
MODEL = "fastvim_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 6}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    torch.manual_seed(0)
    state = create_model(MODEL, **SMALL).state_dict()
    save(path, state, {"model": MODEL, "model_args": SMALL, "img_size": 32})
    return path


@pytest.fixture(scope="module")
def photos(image_folder, tmp_path_factory):
    """36 photographs and two files that are none, in a folder."""
    folder = tmp_path_factory.mktemp("photos")
    for number, file in enumerate(sorted((image_folder / "val").rglob("*.jpg"))):
        (folder / f"{number}.jpg").write_bytes(file.read_bytes())
    (folder / "7.jpg").write_text("no image")
    (folder / "20.jpg").write_bytes((folder / "21.jpg").read_bytes()[:200])
    return folder


def predict(weights, *words, code=0):
    parts = ["--part-size", 5] if "--out" in words else []
    words = ["predict", "--model", weights, *parts, *words]
    assert main([str(word) for word in words]) == code


def lines(out):
    return (out / "predictions.jsonl").read_bytes().splitlines()


@pytest.fixture(scope="module")
def whole(weights, photos, tmp_path_factory):
    """The predictions of one process."""
    out = tmp_path_factory.mktemp("whole")
    predict(weights, photos, "--out", out)
    return lines(out)


def test_rows_are_in_the_order_of_the_list(whole, photos):
    rows = [json.loads(line) for line in whole]
    assert [row["file"] for row in rows] == [str(photos / f"{i}.jpg") for i in range(36)]
    assert [i for i, row in enumerate(rows) if "error" in row] == [7, 20]


def test_shares_and_what_each_says(weights, photos, whole, tmp_path, capsys):
    predict(weights, photos, "--out", tmp_path, "--shard", "2/2")
    told = capsys.readouterr()
    assert "shard 2/2 (--shard 2/2); --shard 1/1 for all images" in told.err
    assert "16 of 36 images are done, the rest is in other shares" in told.err
    assert not told.out
    assert not (tmp_path / "predictions.jsonl").exists()
    assert main(["predict", "--status", str(tmp_path)]) == 0
    assert "16 of 36 images are done" in capsys.readouterr().out
    predict(weights, photos, "--out", tmp_path, "--shard", "1/2")
    assert lines(tmp_path) == whole
    assert (tmp_path / "predictions.png").exists()
    assert main(["predict", "--status", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "36 of 36 images are done" in output
    assert re.search(r"no result\s+2 images", output)


def test_a_finished_run_writes_the_last_files_again(weights, photos, whole, tmp_path, capsys):
    predict(weights, photos, "--out", tmp_path)
    (tmp_path / "predictions.jsonl").unlink()
    (tmp_path / "predictions.png").unlink()
    table = tmp_path / "all.csv"
    predict(weights, photos, "--out", tmp_path, "--table", table)
    assert "8 of 8 parts are done, none is left" in capsys.readouterr().err
    assert lines(tmp_path) == whole
    assert (tmp_path / "predictions.png").exists()
    assert len(table.read_text().splitlines()) == 37


def test_strict(weights, photos, tmp_path, capsys):
    predict(weights, photos, "--out", tmp_path / "a", "--strict", code=1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "fastvim: error: 2 of 36 images have no result"
    predict(weights, photos, "--out", tmp_path / "a", "--strict", code=1)  # nor when it is done
    predict(weights, photos / "1.jpg", "--out", tmp_path / "b", "--strict")


def test_many_failures_are_counted(weights, photos, tmp_path, capsys):
    names = tmp_path / "list.txt"
    names.write_text("\n".join([str(photos / "1.jpg"), *(f"none-{i}.png" for i in range(30))]))
    predict(weights, "--list", names, "--out", tmp_path / "out")
    error = capsys.readouterr().err
    assert error.count("skipped ") == 20
    assert "… and 10 more" in error
    assert len(lines(tmp_path / "out")) == 31


def test_images_without_any_result_leave_no_parts(weights, photos, tmp_path, capsys):
    predict(weights, photos / "7.jpg", "--out", tmp_path, code=2)
    assert "no image among 1 files could be read" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    predict(weights, photos / "8.jpg", "--out", tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["PHOTOS", "--shard", "1/2"], "--shard: expected --out as well"),
        (["PHOTOS", "--part-size", "5"], "--part-size: expected --out as well"),
        (["PHOTOS", "--list", "a.csv", "--out", "OUT"], "IMAGES and --list a.csv"),
        (["--list", "a.csv", "--out", "OUT"], "a.csv: No such file"),
        (["PHOTOS", "--out", "OUT", "--shard", "3/2"], "--shard 3/2: expected I/N"),
        (["PHOTOS", "--out", "OUT", "--devices", "2", "--ray", "auto"], "--devices and --ray auto"),
        (["PHOTOS", "--out", "OUT", "--table", "a.xlsx"], "--table a.xlsx: expected a file ending"),
        (["--status", "OUT"], "no run, expected"),
        (["--list", "LIST", "--out", "OUT"], "no image in the list"),
    ],
)
def test_mistakes_are_one_line(words, message, weights, photos, tmp_path, capsys):
    (tmp_path / "empty.csv").write_text("path\n")
    known = {"PHOTOS": photos, "OUT": tmp_path / "out", "LIST": tmp_path / "empty.csv"}
    words = [str(known.get(word, word)) for word in words]
    assert main(["predict", "--model", str(weights), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("fastvim:")]) == 1
    assert not list((tmp_path / "out").glob("parts/part-*"))


def command(*words, **environment):
    """A command in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JOB_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "fastvim_cli", *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**clean, **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_the_unfinished_part_alone(weights, photos, whole, tmp_path, number):
    words = ("predict", "--model", weights, "--out", tmp_path, "--batch-size", 1, "--part-size", 5)
    process = command(*words, photos)
    parts = tmp_path / "parts"
    deadline = time.monotonic() + 60
    while not list(parts.glob("part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number == signal.SIGINT and process.returncode:
        assert process.returncode == 130
        assert "interrupted; the same command goes on from the parts that exist" in error
    assert "Traceback" not in error
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.parquet")}
    assert before
    predict(weights, photos, "--out", tmp_path, "--batch-size", 1)
    after = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.parquet")}
    assert before.items() <= after.items()
    rows = [json.loads(line) for line in lines(tmp_path)]
    assert [row["file"] for row in rows] == [json.loads(line)["file"] for line in whole]


def script(language):
    return re.search(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]


def test_the_slurm_script_of_the_docs(weights, photos, whole, tmp_path, capsys, monkeypatch):
    text = script("bash")
    array = re.search(r"--array=0-(\d+)", text)
    count = int(array[1]) + 1
    *_, line = text.strip().splitlines()
    names = tmp_path / "images.csv"
    names.write_text("path\n" + "\n".join(json.loads(row)["file"] for row in whole))
    monkeypatch.chdir(tmp_path)
    words = line.replace("images.parquet", "images.csv").replace(
        "weights.safetensors", str(weights)
    )
    for task in range(count):
        for name, value in (("ID", task), ("MIN", 0), ("MAX", count - 1), ("COUNT", count)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "1")
        assert main([*words.split()[1:], "--part-size", "5"]) == 0
        assert f"shard {task + 1}/{count} (SLURM_ARRAY_TASK_ID)" in capsys.readouterr().err
    assert lines(tmp_path / "results") == whole


def test_the_kubernetes_job_of_the_docs(weights, photos, whole, tmp_path, capsys, monkeypatch):
    job = yaml.safe_load(script("yaml"))["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert int(variables["JOB_COMPLETIONS"]) == job["completions"]
    names = tmp_path / "images.csv"
    names.write_text("path\n" + "\n".join(json.loads(row)["file"] for row in whole))
    known = {"s3://bucket/images.parquet": names, "s3://bucket/results": tmp_path / "results"}
    words = [str(known.get(word, word)) for word in container["command"][1:]]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for index in reversed(range(job["completions"])):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
        assert main([*words, "--model", str(weights), "--part-size", "5"]) == 0
    assert lines(tmp_path / "results") == whole


@pytest.mark.parametrize("command_name", ["segment", "detect"])
def test_files_by_image(command_name, tmp_path, capsys):
    """In two shares: the names of the files and the ids of the images are those of one process."""
    weights = tmp_path / "weights.safetensors"
    write = {"segment": small_weights.write_segmenter, "detect": small_weights.write_detector}
    write[command_name](weights)
    paths = []
    for number, folder in enumerate(("a", "b", "c")):
        (tmp_path / folder).mkdir()
        pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        paths.append(str(tmp_path / folder / "photo.png"))
        Image.fromarray(pixels).save(paths[-1])
    words = [command_name, "--model", str(weights), *paths, "--part-size", "1", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    expected = capsys.readouterr().out
    for shard in ("2/2", "1/2"):
        assert main([*words, str(tmp_path / "shares"), "--shard", shard]) == 0
    found = capsys.readouterr().out
    assert found == expected.replace(f"{tmp_path}/whole", f"{tmp_path}/shares")
    files = [
        {str(p.relative_to(tmp_path / out)): p.read_bytes() for p in (tmp_path / out).glob("*.*")}
        for out in ("whole", "shares")
    ]
    assert files[0] == files[1]
    assert any("photo-3_" in name for name in files[0])


def test_pictures_of_an_earlier_run_below_the_images_do_not_count(tmp_path):
    weights = tmp_path / "weights.safetensors"
    small_weights.write_segmenter(weights)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    words = ["segment", "--model", str(weights), str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert main(words) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of an S3 server."""
    moto_server = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("bucket")
    yield files
    server.stop()


def test_images_and_results_behind_addresses(weights, photos, whole, bucket, tmp_path, capsys):
    bucket.put(str(photos), "bucket/photos", recursive=True)
    words = ["s3://bucket/photos", "--out", "s3://bucket/results"]
    predict(weights, *words, "--shard", "1/2")
    predict(weights, *words, "--shard", "2/2", "--table", "s3://bucket/all.csv")
    rows = [
        json.loads(line) for line in bucket.cat("bucket/results/predictions.jsonl").splitlines()
    ]
    expected = [json.loads(line) for line in whole]
    for row, local in zip(rows, expected, strict=True):
        assert row["file"] == local["file"].replace(str(photos), "s3://bucket/photos")
        assert row.get("index") == local.get("index")
        assert row.get("probability") == pytest.approx(local.get("probability"))
    assert bucket.cat("bucket/results/predictions.png").startswith(b"\x89PNG")
    assert bucket.cat("bucket/all.csv").count(b"\n") == 37
    assert main(["predict", "--status", "s3://bucket/results"]) == 0
    assert "36 of 36 images are done" in capsys.readouterr().out
    predict(weights, "s3://bucket/photos/1.jpg", "s3://bucket/none.png")
    told = capsys.readouterr()
    assert "s3://bucket/photos/1.jpg" in told.out
    assert "skipped s3://bucket/none.png: no such file" in told.err
    predict(weights, "s3://nowhere/x.png", code=2)


def test_addresses_that_cannot_be_written_to(weights, photos, capsys):
    predict(weights, photos, "--out", "https://127.0.0.1:1/results", code=2)
    error = capsys.readouterr().err
    assert "127.0.0.1:1/results" in error
    assert "Traceback" not in error
