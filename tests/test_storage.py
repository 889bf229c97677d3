"""Files are written whole; what kills leave behind is removed, and what others write is not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

from fastvim.storage import alone, remove_parts, written


def _write(path, ready, done) -> None:
    with written(path) as file:
        file.write(b"whole")
        ready.set()
        done.wait()


def test_parts_of_killed_writers_are_removed(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = {}
    for name in ("killed", "writing"):
        ready, done = context.Event(), context.Event()
        process = context.Process(target=_write, args=(tmp_path / name, ready, done))
        process.start()
        ready.wait()
        processes[name] = process, done
    os.kill(processes["killed"][0].pid, signal.SIGKILL)
    processes["killed"][0].join()
    remove_parts(tmp_path.glob("*.part"))
    assert [file.name for file in tmp_path.iterdir()] == ["writing.part"]
    process, done = processes["writing"]
    done.set()
    process.join()
    assert (tmp_path / "writing").read_bytes() == b"whole"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        done.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append(("rename", path.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    with written(tmp_path / "weights.bin") as file:
        file.write(b"content")
    assert done == [
        ("fsync", "weights.bin.part"),
        ("rename", "weights.bin.part"),
        ("fsync", tmp_path.name),
    ]


def test_one_at_a_time(tmp_path):
    """Locks are of open files, so a thread waits as another process does."""
    inside, most = [], []

    def enter() -> None:
        with alone(tmp_path / "lock"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
