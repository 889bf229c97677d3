"""Processes that end before those of their run have found each other."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastvim.tasks.cluster.gathering import Gathering

SITE = "import os, signal\nif os.environ.get('LOCAL_RANK') == '1': os.kill(os.getpid(), {how})\n"


class Left:
    """What would end this process."""

    def __init__(self) -> None:
        self.with_: tuple[str, int] | None = None
        self.told: list[str] = []
        self.happened = threading.Event()

    def leave(self, line: str, code: int) -> None:
        self.with_ = line, code
        self.happened.set()

    def tell(self, line: str) -> None:
        self.told.append(line)
        self.happened.set()


def started(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", code])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; os.kill(os.getpid(), 9)", ("process 1 was ended by signal 9 before all 2", 1)),
        ("pass", ("process 1 ended before all 2 had found each other", 1)),
        ("raise SystemExit(2)", ("", 2)),  # it has told why
    ],
)
def test_a_started_process_ends(code, expected):
    left = Left()
    with Gathering(2, [started(code)], left.leave, left.tell):
        assert left.happened.wait(30)
    assert left.with_ is not None
    assert left.with_[0].startswith(expected[0])
    assert left.with_[1] == expected[1]
    assert left.told == []


def test_waiting_is_told_once(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    left = Left()
    with Gathering(4, [], left.leave, left.tell, patience=0.1):
        assert left.happened.wait(30)
        left.happened.clear()
        assert not left.happened.wait(1)
    assert left.told == [
        "waiting until all 4 processes of the run have begun, at node1:29500",
    ]


@pytest.mark.cluster
def test_a_command_whose_process_is_killed_at_once(write_recipe, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE.format(how="signal.SIGKILL"))
    recipe = write_recipe({"trainer.devices": 2, "trainer.strategy": "ddp"})
    paths = os.pathsep.join([str(site), str(Path(__file__).parents[2])])
    ended = subprocess.run(
        [sys.executable, "-m", "fastvim_cli", "fit", "--config", str(recipe)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert "process 1 was ended by signal 9 before all 2 had found each other" in ended.stderr
