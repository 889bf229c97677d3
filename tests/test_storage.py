"""What kills leave behind is removed, and what another process writes is not."""

from __future__ import annotations

import multiprocessing
import os
import signal

from fastvim.storage import remove_parts, written


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
