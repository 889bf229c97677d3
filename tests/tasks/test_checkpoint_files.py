"""A checkpoint is what was written, or is named; a disk that refuses one loses no earlier one."""

from __future__ import annotations

import datetime
import errno
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ONE_EPOCH, last

from fastvim import UserError
from fastvim.errors import MachineError
from fastvim.tasks.checkpoints import CheckedCheckpointIO, newest_whole
from fastvim.weights import archive, read
from fastvim_cli import main

CONTENT = {
    "state_dict": {"weight": torch.randn(64, 64), "bias": torch.randn(64)},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.randn(64, 64)}}}],
    "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 3}}}},
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "last.ckpt"
    CheckedCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def flip(path: Path, byte: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def places(path: Path) -> list[tuple[str, int, int]]:
    """Name, first byte and length of every record of an archive."""
    found = []
    with zipfile.ZipFile(path) as records:
        for info in records.infolist():
            with path.open("rb") as file:
                file.seek(info.header_offset + 26)
                name, extra = np.frombuffer(file.read(4), "<u2")
            start = info.header_offset + 30 + int(name) + int(extra)
            found.append((info.filename, start, info.file_size))
    return found


def test_every_reader_of_torchs_files_reads_it(checkpoint):
    for options in ({}, {"mmap": True}):
        found = torch.load(checkpoint, weights_only=True, **options)
        torch.testing.assert_close(found, CONTENT, rtol=0, atol=0)
    assert archive.check_archive(checkpoint)


@pytest.mark.parametrize("of", ["/data/", "data.pkl"])
def test_a_flipped_bit_is_noticed(checkpoint, of):
    """In tensors, and in the pickle with the loop's state and the names."""
    records = [(start, size) for name, start, size in places(checkpoint) if of in name]
    weights = np.array([size for _, size in records]) / sum(size for _, size in records)
    generator = np.random.default_rng(0)
    for _ in range(200):
        start, size = records[generator.choice(len(records), p=weights)]
        byte, bit = start + int(generator.integers(size)), int(generator.integers(8))
        flip(checkpoint, byte, bit)
        for reader in (CheckedCheckpointIO().load_checkpoint, read):
            with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
                reader(checkpoint)
        flip(checkpoint, byte, bit)
    CheckedCheckpointIO().load_checkpoint(checkpoint)


def test_a_record_with_its_checksum_from_another_checkpoint_is_noticed(checkpoint, tmp_path):
    other = tmp_path / "other.ckpt"
    CheckedCheckpointIO().save_checkpoint({**CONTENT, "loops": {"fit_loop": {}}}, other)
    content, others = checkpoint.read_bytes(), other.read_bytes()
    seal = content[content.rindex(b"fastvim sha256") :]
    other.write_bytes(others[: others.rindex(b"fastvim sha256")] + seal)
    with pytest.raises(UserError, match=r"other\.ckpt is damaged"):
        CheckedCheckpointIO().load_checkpoint(other)


@pytest.mark.parametrize("computed", [True, False])
def test_without_a_seal_it_loads_and_this_is_said(tmp_path, caplog, computed):
    torch.serialization.set_crc32_options(computed)
    try:
        torch.save(CONTENT, tmp_path / "old.ckpt")
        CheckedCheckpointIO().save_checkpoint(CONTENT, tmp_path / "new.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    found = CheckedCheckpointIO().load_checkpoint(tmp_path / "old.ckpt")
    torch.testing.assert_close(found, CONTENT, rtol=0, atol=0)
    assert "old.ckpt has no checksum" in caplog.text
    caplog.clear()
    CheckedCheckpointIO().load_checkpoint(tmp_path / "new.ckpt")
    assert not caplog.records


def test_what_is_refused_is_not_called_damaged(tmp_path):
    path = tmp_path / "last.ckpt"
    CheckedCheckpointIO().save_checkpoint({**CONTENT, "when": datetime.date(2026, 1, 1)}, path)
    with pytest.raises(UserError, match=r"datetime\.date.*nothing in a file is executed") as caught:
        CheckedCheckpointIO().load_checkpoint(path)
    assert "damaged" not in str(caught.value)


def test_last_goes_on_from_the_newest_whole_checkpoint(write_recipe, caplog, capsys):
    config = write_recipe(ONE_EPOCH)
    assert main(["fit", "--config", str(config)]) == 0
    folder = config.with_suffix("") / "checkpoints"
    content = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(content[: len(content) // 2])
    longer = ["fit", "--config", str(config), "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    caplog.clear()
    assert main(longer) == 0
    assert "last.ckpt is damaged" in caplog.text
    assert "the newest whole checkpoint is" in caplog.text
    assert "best.ckpt" in caplog.text
    assert last(config)["epoch"] == 1

    for file in folder.glob("*.ckpt"):
        file.write_bytes(b"")
    capsys.readouterr()
    assert main(longer) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no whole checkpoint is left" in line
    # One that is named is never replaced by another.
    assert main([*longer[:3], "--ckpt_path", str(folder / "last.ckpt")]) == 2
    assert "last.ckpt" in capsys.readouterr().err


def test_the_newest_whole_one_is_taken(tmp_path, checkpoint):
    whole = shutil.copy(checkpoint, tmp_path / "whole.ckpt")
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
    assert newest_whole([tmp_path / "a.ckpt", tmp_path / "b.ckpt", whole, checkpoint]) == whole


class FullDisk:
    """Refuses to put files of some names on the disk, a number of times.

    Args:
        monkeypatch: of the test.
        name: of the files.
        first: attempt that is refused, counted from 0.
        last: the first attempt after that which is not.
    """

    def __init__(self, monkeypatch, name: str, first: int = 0, last: int = 10**9) -> None:
        self.name, self.refused, self.attempts = name, range(first, last), 0
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(f"/{self.name}.part"):
            self.attempts += 1
            if self.attempts - 1 in self.refused:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(descriptor)


def test_a_refused_checkpoint_ends_the_run_with_a_line(write_recipe, monkeypatch, capsys):
    config = write_recipe(ONE_EPOCH)
    disk = FullDisk(monkeypatch, "last.ckpt", first=1)
    assert main(["fit", "--config", str(config)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "last.ckpt: the disk is full" in line
    assert f"the last good checkpoint is {os.path.relpath(config.with_suffix(''))}" in line
    assert disk.attempts == 2
    assert last(config)["global_step"] == 2
    assert not list(config.with_suffix("").rglob("*.part"))


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_the_next_checkpoint_is_tried_again(write_recipe, monkeypatch, caplog, name):
    whole, full = write_recipe(name="whole"), write_recipe(name="full")
    assert main(["fit", "--config", str(whole)]) == 0
    FullDisk(monkeypatch, name, first=0, last=1)
    assert main(["fit", "--config", str(full), "--retry_checkpoints", "true"]) == 0
    assert f"{name}: the disk is full" in caplog.text
    assert "trying again at the next checkpoint" in caplog.text
    one, other = (read(run.with_suffix("") / "model.safetensors").state for run in (whole, full))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert last(whole)["global_step"] == last(full)["global_step"]


def test_a_disk_that_stays_full_is_told_at_the_end(write_recipe, monkeypatch, capsys, caplog):
    config = write_recipe(ONE_EPOCH)
    FullDisk(monkeypatch, "last.ckpt", first=1)
    assert main(["fit", "--config", str(config), "--retry_checkpoints", "true"]) == 1
    assert caplog.text.count("trying again") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "last.ckpt: the disk is full" in line
    assert (config.with_suffix("") / "model.safetensors").exists()


def test_a_script_gets_the_error(tmp_path, monkeypatch):
    FullDisk(monkeypatch, "last.ckpt")
    with pytest.raises(MachineError, match=r"last\.ckpt: the disk is full"):
        CheckedCheckpointIO().save_checkpoint(CONTENT, tmp_path / "last.ckpt")
