"""What a run over many images says of its progress."""

from __future__ import annotations

import pytest

from fastvim.inference.parts.loop import Spent
from fastvim.inference.parts.work import Failure
from fastvim_cli import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be moved on."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute_and_one_at_the_end(clock, capsys):
    told = progress.Progress("classifying")
    told.begin(images=4000, done=1000)
    for _ in range(3):
        clock[0] += 25
        told.advance(500, Spent(seconds=25.0, waiting=5.0))
    told.end()
    assert capsys.readouterr().err.splitlines() == [
        "classifying 2,500/4,000, 20.0 images/s, 75 s left",
        "classifying 2,500/4,000, 20.0 images/s, 75 s left; waited for images 20 % of the time",
    ]


def test_a_few_images_say_nothing(clock, capsys):
    told = progress.Progress("classifying")
    told.begin(images=5, done=0)
    clock[0] += 50
    told.advance(5, Spent(2.0, 1.0))
    told.end()
    assert capsys.readouterr().err == ""


def test_the_first_failures_are_named(capsys):
    told = progress.Progress("classifying")
    for number in range(progress.MOST_FAILURES + 3):
        told.failed(Failure(f"{number}.png", "damaged"))
    told.end()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "skipped 0.png: damaged"
    assert len(lines) == progress.MOST_FAILURES + 1
    assert lines[-1] == "… and 3 more"
