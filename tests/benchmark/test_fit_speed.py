"""`fastvim benchmark --fit`: the parts of a run, on the CPU."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fastvim.benchmark import fit_speed
from fastvim.benchmark.fit_speed import FitSpeed
from fastvim.data.files import ImageFiles
from fastvim.tasks import Classification
from fastvim_cli import main

SPEED = FitSpeed(8, 2.0, 10.0, 10.5, 0.5, None, (9, 9, 9))
RECIPE = {
    "model": {
        "class_path": "fastvim.tasks.Classification",
        "init_args": {
            "model": "fastvim_tiny_patch16_224",
            "model_args": {"img_size": 32, "depth": 1, "embed_dim": 16},
            "warmup_epochs": 0,
            "ema_decay": 0.9,
        },
    },
    "data": {
        "class_path": "fastvim.data.images.ImageData",
        "init_args": {"img_size": 32, "batch_size": 4, "num_workers": 0},
    },
    "trainer": {"accelerator": "cpu", "max_epochs": 2},
}


@pytest.fixture(autouse=True)
def short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit_speed, "WARM", 1)
    Path("recipes").mkdir()
    Path("recipes", "small.yaml").write_text(yaml.safe_dump(RECIPE))


def benchmark(*words: str) -> int:
    fixed = ["--fit", "small", "--seconds", "0.1", "--images", "64", "--out", "speed.json"]
    return main(["benchmark", *fixed, *words])


def test_the_bottleneck_has_a_name():
    assert "is the step: it takes 95%" in SPEED.sentence().replace(" %", "%")
    assert replace(SPEED, loader=30.0, both=31.0, waiting=20.0).bottleneck == "data loading"
    assert replace(SPEED, both=20.0, waiting=9.0).bottleneck == "data loading"
    assert replace(SPEED, host=5.0).bottleneck == "the step"
    assert "9.8 of the 10.0 ms" in replace(SPEED, host=9.8).sentence()
    assert SPEED.rate(SPEED.step) == 800


def test_one_line_for_a_mistake(capsys):
    assert main(["benchmark", "--fit", "none"]) == 2
    assert "--fit none: no such file" in capsys.readouterr().err
    assert benchmark("--trainer.devices", "x") == 2
    assert benchmark("--batch", "4") == 2
    assert "unrecognized arguments: --batch" in capsys.readouterr().err
    Path("recipes", "small.yaml").write_text(
        yaml.safe_dump({**RECIPE, "data": {"class_path": "fastvim.data.detection.DetectionData"}})
    )
    assert benchmark() == 2
    assert "images are made for ImageData" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_a_slow_loader(capsys, monkeypatch, decode):
    read = ImageFiles.__getitem__

    def slow(self, index):
        time.sleep(0.05)
        return read(self, index)

    monkeypatch.setattr(ImageFiles, "__getitem__", slow)
    assert benchmark("--data.decode", decode) == 0
    output = capsys.readouterr().out
    assert "The bottleneck is data loading" in output
    assert [line.split()[0] for line in output.splitlines()[2:5]] == ["loader", "step", "fit:"]
    found = json.loads(Path("speed.json").read_text())
    assert found["bottleneck"] == "data loading"
    assert found["loader"] > 200
    assert found["waiting_share"] > 0.5
    assert {"device", "versions", "command"} <= found.keys()
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_slow_step(capsys, monkeypatch):
    step = Classification.training_step

    def slow(self, batch, batch_idx):
        time.sleep(0.5)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", slow)
    assert benchmark("--data.num_workers", "1") == 0
    assert "The bottleneck is the step" in capsys.readouterr().out
    found = json.loads(Path("speed.json").read_text())
    assert found["step"] > 500
    assert found["batches"][2] >= 3
