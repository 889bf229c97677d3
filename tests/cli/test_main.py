"""The command line as a person meets it: help, mistakes in one line, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from fastvim_cli import COMMANDS, main
from fastvim_cli.train import TrainingCLI

RECIPE = {
    "model": {
        "class_path": "fastvim.tasks.Classification",
        "init_args": {
            "model": "fastvim_tiny_patch16_224",
            "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2},
            "warmup_epochs": 0,
        },
    },
    "data": {
        "class_path": "fastvim.data.images.ImageData",
        "init_args": {"img_size": 32, "batch_size": 8, "num_workers": 0},
    },
    "trainer": {"accelerator": "cpu", "max_epochs": 1},
}


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe without a data folder; what runs write lands in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


def error_of(capsys, *words: str) -> str:
    """The one line on standard error of a mistake."""
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastvim: error: ")
    assert error.count("\n") == 1
    assert error.count("--help") <= 1
    return error


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(f"  {name} " in page for name in COMMANDS)
    assert main([]) == 0
    assert capsys.readouterr().out == page


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastvim ")


def test_help_needs_no_torch():
    code = (
        "import contextlib, sys; from fastvim_cli import COMMANDS, main\n"
        "main(['--help'])\n"
        "for name in COMMANDS.keys() - {'fit', 'validate', 'test'}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([name, '--help'])\n"
        "assert main(['predict', '--no-such-option', 'a.png']) == 2\n"
        "print('heavy:', *({'torch', 'timm', 'numpy', 'PIL', 'rich'} & sys.modules.keys()))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "heavy:"


def test_a_command_has_its_own_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--help"])
    assert exit_info.value.code == 0
    assert "--ckpt_path" in capsys.readouterr().out


def test_unknown_command(capsys):
    assert "'fitt' (nearest: fit" in error_of(capsys, "fitt")


def test_missing_arguments(capsys):
    assert "IMAGES; see fastvim predict --help\n" in error_of(capsys, "predict")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.lrr=1"], "fastvim.tasks.Classification has no option 'lrr' (nearest: lr"),
        (["--data.bach_size=1"], "fastvim.data.images.ImageData has no option 'bach_size' (nea"),
        (["--trainer.max_epoch=3"], "unknown key 'trainer.max_epoch' (nearest: trainer.max_epo"),
        (["--trainr.max_epochs=3"], "unknown key 'trainr.max_epochs' (nearest: trainer.max_epo"),
        (["--ckpt_pth=last"], "unknown key 'ckpt_pth' (nearest: ckpt_path"),
        (["--trainer.max_epochs=many"], "trainer.max_epochs"),
        (["--model.lr=fast"], "float"),
        (["--trainer.accelerator=abacus", "--data.root=images"], "abacus"),
        (["--model.model=fastvim_tinny", "--data.root=images"], "no model 'fastvim_tinny'"),
        (["--data.root=nowhere"], "nowhere"),
        (["--data.root=images", "--ckpt_path=gone.ckpt"], "no checkpoint at gone.ckpt"),
        ([], "ImageData needs a value for root"),
        (["--data.root=images", "--trainer.logger=CometLogger"], "Requirement 'comet-ml"),
        (["--config"], "argument -c/--config: expected one argument"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_on_the_command_line(recipe, image_folder, capsys, arguments, expected):
    Path("images").symlink_to(image_folder)
    assert expected in error_of(capsys, "fit", "--config", recipe, *arguments)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trainer": {"max_epoch": 3}}, "unknown key 'trainer.max_epoch' (nearest: trainer.max_"),
        ({"optimiser": {"lr": 3}}, "unknown key 'optimiser"),
        (
            {"model": {"class_path": "fastvim.tasks.Clasification"}},
            "fastvim.tasks.Clasification",
        ),
        (
            {
                "model": {
                    "class_path": "fastvim.tasks.Classification",
                    "init_args": {"model": "fastvim_tiny_patch16_224", "mixupp": 0.8},
                }
            },
            "fastvim.tasks.Classification has no option 'mixupp' (nearest: mixup",
        ),
    ],
    ids=["trainer", "section", "class", "option"],
)
def test_mistakes_in_a_recipe(recipe, capsys, change, expected):
    recipe.write_text(yaml.safe_dump({**RECIPE, **change}))
    assert expected in error_of(capsys, "fit", "--config", recipe, "--data.root=images")


def test_a_recipe_that_is_missing_or_no_yaml(recipe, capsys):
    assert "gone.yaml" in error_of(capsys, "fit", "--config", "gone.yaml")
    recipe.write_text("model: [")
    assert "small.yaml" in error_of(capsys, "fit", "--config", recipe)


def test_nothing_to_test_without_a_checkpoint(recipe, image_folder, capsys):
    arguments = ["test", "--config", recipe, f"--data.root={image_folder}"]
    assert "give --ckpt_path" in error_of(capsys, *arguments)
    assert "no last checkpoint in runs/small" in error_of(capsys, *arguments, "--ckpt_path=last")


def test_a_damaged_checkpoint(recipe, image_folder, capsys):
    Path("damaged.ckpt").write_bytes(b"PK\x03\x04 and nothing more")
    arguments = ["test", "--config", recipe, f"--data.root={image_folder}"]
    assert "damaged.ckpt" in error_of(capsys, *arguments, "--ckpt_path=damaged.ckpt")


def test_a_checkpoint_of_another_architecture(recipe, image_folder, capsys):
    arguments = ["--config", str(recipe), f"--data.root={image_folder}"]
    assert main(["fit", *arguments]) == 0
    capsys.readouterr()
    error = error_of(
        capsys, "test", *arguments, "--ckpt_path=last", "--model.model_args.embed_dim=24"
    )
    assert "model.model_args.embed_dim is 24, 16 in the checkpoint" in error


def test_debug_shows_the_traceback(recipe):
    with pytest.raises(ValueError, match="unknown key"):
        main(["--debug", "fit", "--config", str(recipe), "--ckpt_pth=last"])


def test_a_second_run_overwrites_no_checkpoint(recipe, image_folder):
    arguments = ["fit", "--config", str(recipe), f"--data.root={image_folder}"]
    assert main(arguments) == 0
    first = {file: file.read_bytes() for file in Path("runs/small").rglob("*.ckpt")}
    logs = {file: file.read_bytes() for file in Path("runs/small").rglob("*.csv")}
    assert len(first) == 2
    assert len(logs) == 1
    assert main(arguments) == 0
    for file, content in {**first, **logs}.items():
        assert file.read_bytes() == content


def test_a_recipe_may_stand_behind_its_options(recipe, image_folder):
    words = ["--data.root", str(image_folder), "--trainer.max_epochs", "3"]
    config = TrainingCLI("validate", [*words, "--config", str(recipe)]).config
    assert config.data.init_args.root == str(image_folder)
    assert config.data.init_args.img_size == 32
    assert config.trainer.max_epochs == 3  # 1 in the recipe: the command line wins


@pytest.mark.parametrize(
    "logger", ["false", "[]", "{class_path: CSVLogger, init_args: {save_dir: .}}"]
)
def test_a_run_has_its_files_with_any_logger_and_starts_again(recipe, image_folder, logger, caplog):
    home = Path("home")
    arguments = ["fit", "--config", str(recipe), "--data.root", str(image_folder)]
    arguments += ["--trainer.logger", logger, "--trainer.profiler", "simple"]
    arguments += ["--trainer.default_root_dir", "~/run", "--trainer.limit_train_batches", "2"]
    for start in range(2):
        epochs = ["--trainer.max_epochs", str(start + 1), "--ckpt_path", "last"]
        assert main([*arguments, *epochs]) == 0
        logs = home / "run" / "logs" / f"version_{start}"
        assert {file.name for file in logs.iterdir()} >= {"config.yaml", "metrics.csv"}
        assert caplog.text.count("Profiler Report") == start + 1
    assert (home / "run" / "curves.png").exists()
    assert not Path("~").exists()
    assert not Path("config.yaml").exists()


class ServiceError(Exception):
    """As packages of loggers have their own."""


class OfflineLogger(CSVLogger):
    def __init__(self) -> None:
        raise ServiceError("the service is in maintenance")


def test_a_logger_that_cannot_start_is_one_line(recipe, image_folder, capsys):
    arguments = ["--data.root", image_folder, "--trainer.logger", f"{__name__}.OfflineLogger"]
    line = error_of(capsys, "fit", "--config", recipe, *arguments)
    assert "trainer: the service is in maintenance" in line


def test_torchrun_is_told_the_mistake(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["fitt"]) == 2
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "error: unknown command 'fitt'" in message["extraInfo"]["py_callstack"]


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line(recipe, image_folder):
    command = ["fit", "--config", str(recipe), f"--data.root={image_folder}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvim_cli", *command, "--trainer.max_epochs=10000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # What a shell starts in the background ignores the signal, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "fastvim: interrupted; --ckpt_path last resumes\n"
