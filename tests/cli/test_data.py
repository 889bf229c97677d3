"""`fastvim data stats`, as a person calls it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from fastvim.data.moments import Moments
from fastvim.data.table import random_splits
from fastvim_cli import main

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

GENERATOR = np.random.default_rng(0)
# Of different sizes, so that an average of the images' averages would be wrong.
IMAGES = [GENERATOR.normal(1e5, 0.5, (3, 8 + index, 9)).astype(np.float32) for index in range(10)]
SPLITS = ["train"] * 6 + ["val"] * 4


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table beside the folder of its ten images."""
    (tmp_path / "images").mkdir()
    paths = [f"images/{index}.npy" for index in range(len(IMAGES))]
    for path, image in zip(paths, IMAGES, strict=True):
        np.save(tmp_path / path, image)
    frame = pd.DataFrame({"path": paths, "label": "a", "split": SPLITS})
    frame.to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "table.csv"


def statistics(capsys: pytest.CaptureFixture, *words: object) -> tuple[str, dict]:
    """What the command prints, and the YAML at its end."""
    assert main(["data", "stats", *map(str, words)]) == 0
    output = capsys.readouterr().out
    return output, yaml.safe_load("\n".join(output.splitlines()[-2:]))


def error_of(capsys: pytest.CaptureFixture, *words: object) -> str:
    assert main(["data", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def expected(images: list[np.ndarray]) -> dict[str, list[float]]:
    pixels = np.concatenate([image.reshape(3, -1) for image in images], axis=1).astype(np.float64)
    return {"mean": pixels.mean(axis=1).tolist(), "std": pixels.std(axis=1).tolist()}


def assert_close(got: dict, wanted: dict) -> None:
    for name in ("mean", "std"):
        np.testing.assert_allclose(got[name], wanted[name], rtol=6e-6)


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ([], IMAGES[:6]),
        (["--split", "val"], IMAGES[6:]),
        (["--split", "all"], IMAGES),
        (["--split", "all", "--workers", "1"], IMAGES),
    ],
)
def test_statistics(table: Path, capsys, options: list[str], images: list[np.ndarray]) -> None:
    output, got = statistics(capsys, table, *options)
    assert_close(got, expected(images))
    assert output.startswith(f"{len(images)} images of {table}\n")
    assert f"{got['std'][2]:.6g}" in output.splitlines()[-3]


def test_moments_do_not_cancel() -> None:
    whole = GENERATOR.normal(1e8, 0.1, (1, 40, 50))
    joined = Moments.of(whole[:, :7]) | Moments.of(whole[:, 7:8]) | Moments.of(whole[:, 8:])
    assert joined.number == 2000
    np.testing.assert_allclose(joined.squares / joined.number, whole.var(), rtol=1e-6)


def test_a_table_without_splits_is_divided_as_a_run_divides_it(table: Path, capsys) -> None:
    frame = pd.read_csv(table).drop(columns="split")
    frame.to_csv(table, index=False)
    for seed in (0, 7):
        chosen = np.flatnonzero(random_splits(len(IMAGES), seed) == "train")
        _, got = statistics(capsys, table, "--split-seed", seed)
        assert_close(got, expected([IMAGES[index] for index in chosen]))


def test_some_of_the_images(table: Path, capsys) -> None:
    output, got = statistics(capsys, table, "--split", "all", "--images", 4)
    assert output.startswith("4 images of ")
    assert statistics(capsys, table, "--split", "all", "--images", 4)[1] == got
    assert statistics(capsys, table, "--split", "all", "--images", 99)[0].startswith("10 images")


def test_a_root_and_another_column(table: Path, capsys, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "cells.parquet"
    pd.read_csv(table).rename(columns={"path": "file"}).to_parquet(elsewhere)
    options = ["--root", table.parent, "--path-column", "file"]
    assert_close(statistics(capsys, elsewhere, *options)[1], expected(IMAGES[:6]))


def test_a_table_in_the_working_directory(table: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(table.parent)
    assert_close(statistics(capsys, "table.csv")[1], expected(IMAGES[:6]))


def test_an_unreadable_image(table: Path, capsys) -> None:
    bad = table.parent / "images" / "2.npy"
    bad.write_bytes(b"")
    assert f"{bad}: unreadable image (" in error_of(capsys, "stats", table)
    assert main(["data", "stats", str(table), "--skip-unreadable"]) == 0
    output, error = capsys.readouterr()
    assert error.startswith(f"skipped {bad}: unreadable image (")
    assert error.count("\n") == 1
    assert output.startswith("5 images of ")
    got = yaml.safe_load("\n".join(output.splitlines()[-2:]))
    assert_close(got, expected([image for index, image in enumerate(IMAGES[:6]) if index != 2]))


def test_no_readable_image(table: Path, capsys) -> None:
    for path in (table.parent / "images").iterdir():
        path.unlink()
    assert main(["data", "stats", str(table), "--skip-unreadable"]) == 2
    error = capsys.readouterr().err
    assert error.count("skipped ") == 6
    assert f"{table}: none of 6 images could be read" in error


def test_different_numbers_of_channels(table: Path, capsys) -> None:
    np.save(table.parent / "images" / "3.npy", np.zeros((4, 5, 5)))
    error = error_of(capsys, "stats", table)
    assert "3.npy: 4 channels; those before have 3" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND; see fastvim data --help"),
        (["stat", "x.csv"], "invalid choice: 'stat'"),
        (["stats"], "required: TABLE; see fastvim data stats --help"),
        (["stats", "none.csv"], "none.csv: no such file"),
        (["stats", "table.xls"], "table.xls: expected a table ending in .csv"),
        (["stats", "TABLE", "--images", "0"], "--images: 0: expected 1 or more"),
        (["stats", "TABLE", "--split-seed", "-1"], "--split-seed: -1: expected 0 or more"),
        (["stats", "TABLE", "--split", "test"], "table.csv: no rows of the split 'test'"),
        (["stats", "TABLE", "--path-column", "pth"], "no column 'pth' (nearest: path"),
        (["stats", "TABLE", "--storage-options", "{"], "'{' is not JSON"),
        (["stats", "TABLE", "--storage-options", "[]"], "'[]': expected an object such as {}"),
    ],
)
def test_mistakes(table: Path, capsys, words: list[str], message: str) -> None:
    words = [str(table) if word == "TABLE" else word for word in words]
    assert message in error_of(capsys, *words)
