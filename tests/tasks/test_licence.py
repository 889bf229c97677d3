"""The licence of the weights that a run starts from goes on to what it writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from harness import ONE_EPOCH
from small_published import publish, use_folders

from fastvim.tasks import Classification
from fastvim.weights import METADATA_KEY, read, save
from fastvim.weights.table import ENTRIES
from fastvim_cli import main

NAME = "fastvim_tiny_patch16_224.in1k"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}  # those of `write_recipe`
ORIGIN = {"started_from": NAME, "licence": "CC-BY-NC-SA-4.0"}


@pytest.fixture(autouse=True)
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_folders(tmp_path, monkeypatch)
    publish(monkeypatch, NAME, SIZES)


def origin(path: Path) -> dict[str, str]:
    """What a file of weights or a checkpoint says of where its weights come from."""
    if path.suffix == ".safetensors":
        told = read(path).metadata
    else:
        told = torch.load(path, weights_only=True)[METADATA_KEY]
    return {key: told[key] for key in ORIGIN if key in told}


def fit(recipe: Path, *options: str) -> Path:
    """The folder of the run."""
    assert main(["fit", "--config", str(recipe), *options]) == 0
    return recipe.with_suffix("")


def test_by_name_and_from_run_to_run(write_recipe, caplog) -> None:
    """By name; then resumed, without the published file; then from the result."""
    run = fit(write_recipe(ONE_EPOCH), f"--model.checkpoint={NAME}")
    assert origin(run / "model.safetensors") == ORIGIN
    assert origin(run / "checkpoints" / "last.ckpt") == ORIGIN
    assert "license: cc-by-nc-sa-4.0\n" in (run / "README.md").read_text()
    assert f"the training started from: `{NAME}`" in (run / "README.md").read_text()
    said = f"started from {NAME}: its licence CC-BY-NC-SA-4.0, not for commercial use, goes on"
    assert caplog.text.count(said) == 1

    shutil.rmtree("weights")
    shutil.rmtree("cache")
    (run / "model.safetensors").rename(run / "first.safetensors")
    caplog.clear()
    fit(write_recipe({**ONE_EPOCH, "trainer.max_epochs": 2}), "--ckpt_path=last")
    assert origin(run / "model.safetensors") == ORIGIN
    assert caplog.text.count(said) == 1

    again = write_recipe({**ONE_EPOCH, "model.init_args.num_classes": 7}, name="again")
    second = fit(again, f"--model.checkpoint={run / 'model.safetensors'}")
    assert origin(second / "model.safetensors") == ORIGIN


def test_of_a_published_file(write_recipe) -> None:
    run = fit(write_recipe(ONE_EPOCH), f"--model.checkpoint=weights/{ENTRIES[NAME].file}")
    assert origin(run / "model.safetensors") == ORIGIN


def test_a_published_file_of_another_name_is_said_to_tell_none(write_recipe, caplog) -> None:
    shutil.copy(Path("weights", ENTRIES[NAME].file), "renamed.ckpt")
    run = fit(write_recipe(ONE_EPOCH), "--model.checkpoint=renamed.ckpt")
    assert origin(run / "model.safetensors") == {}
    assert "renamed.ckpt, under published names, does not tell its licence" in caplog.text


def test_weights_without_one_give_none(tmp_path: Path, write_recipe, caplog) -> None:
    """The untrained model of the recipe, in a file of our own."""
    own = Classification("fastvim_tiny_patch16_224", SIZES).create_network(num_classes=6)
    save(tmp_path / "own.safetensors", own.state_dict(), {"model": "x", "model_args": SIZES})
    run = fit(write_recipe(ONE_EPOCH), f"--model.checkpoint={tmp_path / 'own.safetensors'}")
    assert origin(run / "model.safetensors") == {}
    assert "licence" not in caplog.text


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("fastvim_tiny_patch16_224.in2k", "no published weights 'fastvim_tiny_patch16_224.in2k'"),
        ("missing.safetensors", "no checkpoint at missing.safetensors"),
        ("vim_base_patch16_224.in1k", "Vim_base_withlayernorm.ckpt is missing"),
    ],
)
def test_weights_that_cannot_be_had(
    checkpoint: str, message: str, write_recipe, capsys: pytest.CaptureFixture
) -> None:
    assert main(["fit", "--config", str(write_recipe()), f"--model.checkpoint={checkpoint}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
