"""Every end of a command is a line that a terminal shows as it is."""

from __future__ import annotations

import copy
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from small_weights import SMALL, TINY, write_autoencoder
from test_main import RECIPE

from fastvim.data.images import ImageData
from fastvim.tasks.callbacks.checkpointing import ExportWeights
from fastvim.tasks.callbacks.run_log import RunLog, SeedSteps
from fastvim_cli import main
from fastvim_cli.console import printable, table
from fastvim_cli.train import TrainingCLI

OWN = """
import lightning as L
from lightning.pytorch.loggers import CSVLogger
from fastvim.data.images import ImageData

class Faulty(L.Callback):
    def __init__(self, hook):
        if hook == "__init__":
            raise KeyError("lost")
        setattr(type(self), hook, Faulty.fail)
    def fail(self, *args, **kwargs):
        raise KeyError("lost\\n[bold]\\x1b[31m")

class FaultyLogger(CSVLogger):
    def log_metrics(self, *args, **kwargs):
        raise RuntimeError("lost")

class Broken:
    def __init__(self, images):
        self.images = images
    def __len__(self):
        return len(self.images)
    def __getitem__(self, key):
        raise RuntimeError("lost")

class FaultyData(ImageData):
    def __init__(self, stage, **kwargs):
        self.stage = stage
        super().__init__(**kwargs)
    def prepare_data(self):
        if self.stage == "prepare_data":
            return {}["lost"]
        super().prepare_data()
    def setup(self, stage):
        super().setup(stage)
        if self.stage == "setup":
            raise OSError("lost")
        if self.stage in self._datasets:
            self._datasets[self.stage] = Broken(self._datasets[self.stage])
"""
HOOKS = (
    *("__init__", "setup", "on_fit_start", "on_train_start", "on_train_batch_end"),
    *("on_validation_epoch_end", "on_save_checkpoint", "teardown"),
)


@pytest.fixture
def own(tmp_path, monkeypatch, image_folder) -> list[str]:
    """The words of a short training; `own.py` has classes that fail."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    Path("own.py").write_text(OWN)
    Path("small.yaml").write_text(yaml.safe_dump(RECIPE))
    limits = [f"--trainer.limit_{part}_batches=1" for part in ("train", "val")]
    return ["fit", "--config=small.yaml", f"--data.root={image_folder}", *limits]


def error_of(capsys, *words: str, code: int = 2) -> str:
    assert main([str(word) for word in words]) == code
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("fastvim: error: ") for line in lines].count(True) == 1, lines
    assert lines[-1].startswith("fastvim: error: ")
    return lines[-1]


@pytest.mark.parametrize("hook", HOOKS)
def test_an_error_of_an_own_callback_is_one_line(own, capsys, hook):
    given = f"{{class_path: own.Faulty, init_args: {{hook: {hook}}}}}"
    error = error_of(capsys, *own, f"--trainer.callbacks={given}")
    assert "own.Faulty" in error
    assert "lost" in error
    assert hook == "__init__" or "KeyError: " in error
    assert hook == "__init__" or "own.py, line " in error
    assert error.isprintable()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stage", ["prepare_data", "setup", "train", "val"])
def test_an_error_of_own_data_is_one_line(own, capsys, stage, workers):
    words = [f"--data.init_args.num_workers={workers}", f"--data.init_args.stage={stage}"]
    error = error_of(capsys, *own, "--data.class_path=own.FaultyData", *words)
    assert "own" in error
    assert "lost" in error
    assert "own.py, line " in error


def test_an_error_of_an_own_logger_is_one_line(own, capsys):
    logger = "{class_path: own.FaultyLogger, init_args: {save_dir: logs}}"
    error = error_of(capsys, *own, f"--trainer.logger={logger}")
    assert "own.FaultyLogger.log_metrics: RuntimeError: lost (own.py, line 16)" in error


def test_an_error_of_the_library_in_a_worker_is_its_line(own, capsys, image_folder, monkeypatch):
    copy = Path("images")
    subprocess.run(["cp", "-r", str(image_folder), copy], check=True)
    for file in copy.glob("val/*/*"):
        file.write_bytes(b"no image")
    monkeypatch.setattr("fastvim_cli.train.fitting.check_before_fit", lambda *_: None)
    error = error_of(capsys, *own, f"--data.root={copy}", "--data.num_workers=1")
    assert error.startswith("fastvim: error: images/val/")
    assert "Traceback" not in error


@pytest.mark.parametrize("content", [b"\xff\xfe", "model: ü".encode("latin-1")])
def test_a_recipe_in_another_encoding(own, capsys, content):
    Path("odd.yaml").write_bytes(content)
    error = error_of(capsys, *own, "--config=odd.yaml")
    assert "odd.yaml: expected a text in UTF-8" in error


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\u202egnp", "\x9b1m", "\udcff", "\u2028"])
def test_names_show_as_they_are(name):
    shown = printable(name)
    assert shown.isprintable()
    assert shown.encode("utf-8")
    cells = table(("name",), [(name,)])
    assert cells == f"name\n{shown}"[: len(cells)]
    assert printable("[bold]größe[/bold] 漢字") == "[bold]größe[/bold] 漢字"


def test_a_memory_that_is_too_small_is_the_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_autoencoder(Path("mae.safetensors"))
    Image.new("RGB", (32, 32)).save("a.png")

    def none(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("fastvim.reconstruction.reconstruct", none)
    words = ["reconstruct", "--model", "mae.safetensors", "a.png"]
    assert "not enough memory" in error_of(capsys, *words, code=1)


def test_an_unexpected_error_is_one_line_too(capsys, monkeypatch):
    monkeypatch.setattr("fastvim_cli.models._models", lambda: {}["a\nb"])
    assert "unexpected KeyError: 'a\\nb' at " in error_of(capsys, "models", code=1)
    with pytest.raises(KeyError):
        main(["--debug", "models"])


def test_warnings_show_as_they_are(capsys):
    main(["--version"])
    logging.lastResort.stream.flush()
    record = logging.LogRecord("fastvim", logging.WARNING, "", 0, "%s\nx", ("\x1b[31m",), None)
    assert logging.lastResort.format(record) == "\\x1b[31m\nx"


@pytest.fixture
def images(tmp_path) -> Path:
    """Weights, and images whose names are no text, or what a terminal would act upon."""
    import timm

    from fastvim.weights import save

    options = {**SMALL, "num_classes": 2}
    told = {
        "model": TINY,
        "model_args": options,
        "class_names": ["[red]a[/red]", "\x1b[31mb\u202e"],
    }
    save(tmp_path / "weights.safetensors", timm.create_model(TINY, **options).state_dict(), told)
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name in (b"\xff.png", b"\x1b[31m.png", "\u202ea\nb.png".encode(), "ü.png".encode()):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            Image.fromarray(noise).save(file, "PNG")
    return folder


def command(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    words = ["predict", "--model", "weights.safetensors", "images", "--out", "out"]
    return subprocess.Popen(
        [sys.executable, "-m", "fastvim_cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder.parent,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["ascii", "C"],
)
def test_names_of_any_bytes_in_any_locale(images, environment):
    with command(images, **environment) as process:
        output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert not error
    assert b"\x1b" not in output
    assert output.count(b"\n") == 1 + 4 + 2  # header, images, files
    assert len((images.parent / "out" / "predictions.jsonl").read_text("utf-8").splitlines()) == 4


@pytest.mark.slow
def test_results_are_there_though_nobody_reads_the_output(images):
    process = command(images)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(120) == 1
    assert not error
    assert {path.name for path in (images.parent / "out").iterdir()} == {
        "parts",
        "predictions.jsonl",
        "predictions.png",
    }


STAGES = {
    "construction": (TrainingCLI, "instantiate_trainer"),
    "set-up": (ImageData, "setup"),
    "first batch": (SeedSteps, "on_train_batch_start"),
    "validation": (RunLog, "on_validation_epoch_end"),
    "checkpoint": (ExportWeights, "on_save_checkpoint"),
    "export": (ExportWeights, "teardown"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_is_one_line_in_each_stage(own, capsys, monkeypatch, stage):
    owner, name = STAGES[stage]
    method = getattr(owner, name)

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(owner, name, method)
        os.kill(os.getpid(), signal.SIGINT)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    assert main([*own, "--data.num_workers=1"]) == 130
    assert re.fullmatch(r"fastvim: interrupted(; .*)?\n", capsys.readouterr().err)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_counts_in_a_destructor_and_not_in_a_fork(capsys, monkeypatch):
    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def work() -> str:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        Dropped()
        time.sleep(60)
        return ""

    monkeypatch.setattr("fastvim_cli.models._models", work)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "fastvim: interrupted\n"


@pytest.mark.parametrize(
    "option", ["--data.root", "--trainer.default_root_dir", "--model.checkpoint"]
)
def test_options_that_a_recipe_cannot_hold_are_refused(own, capsys, option):
    error = error_of(capsys, *own, f"{option}=a\udcff")
    assert f"{option}=a\\udcff: expected text in UTF-8" in error


def test_tables_and_results_whose_names_are_no_text(tmp_path, capsys):
    root = tmp_path / "a\udcff"
    root.mkdir()
    np.save(root / "x.npy", np.full((1, 8, 8), 3, np.uint8))
    (root / "table.csv").write_text("path,split\nx.npy,train\n")
    assert main(["data", "stats", str(root / "table.csv")]) == 0
    assert "a\\udcff/table.csv" in capsys.readouterr().out
    words = ["fastvim_tiny_patch16_224", "--size", "32", "--batch", "1", "--warmup", "1"]
    target = str(tmp_path / "b\udcff.json")
    assert main(["benchmark", *words, "--repeats", "1", "--no-check", "--out", target]) == 0
    assert main(["benchmark", "--from", target]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "ü"])
def test_a_locale_that_is_no_utf_8(name, own):
    """Recipes are UTF-8 there too; a folder that cannot be written there says so."""
    recipe = copy.deepcopy(RECIPE)
    recipe["trainer"]["default_root_dir"] = f"runs/{name}"
    Path("odd.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True) + "# ü\n", "utf-8")
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "fastvim_cli", *own, "--config=odd.yaml"],
        capture_output=True,
        env={**os.environ, **environment},
    )
    if name == "small":
        assert ended.returncode == 0
        return
    assert ended.returncode == 1
    assert b"PYTHONUTF8=1" in ended.stderr
    assert ended.stderr.count(b"\n") == 1
