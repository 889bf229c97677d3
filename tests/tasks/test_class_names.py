"""Classes of a checkpoint and of the data are compared by name, in every command and task."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from harness import MODEL_ARGS, ONE_EPOCH, PROBE, last, recipe, trainer

from fastvim.data.classes import KnownClasses
from fastvim.data.images import ImageData
from fastvim.errors import UserError
from fastvim.tasks import Classification, LinearProbe
from fastvim.weights import load_model, read, save
from fastvim_cli import main

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]


@pytest.fixture(scope="module")
def images(image_folder: Path) -> Path:
    return image_folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_folder) -> Path:
    """The recipe of a run of one epoch on six classes; the run lies beside it."""
    folder = tmp_path_factory.mktemp("trained")
    config = recipe(folder / "run", image_folder)
    config["trainer"]["max_epochs"] = 1
    config["model"]["init_args"]["warmup_epochs"] = 0
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "run.yaml")]) == 0
    return folder / "run.yaml"


def copy(images: Path, root: Path, split: str, folders: dict[str, str]) -> Path:
    """Class folders of a set under other names."""
    for old, new in folders.items():
        shutil.copytree(images / split / old, root / split / new)
    return root


def accuracy_of(model: torch.nn.Module, images: Path, names: list[str]) -> float:
    """Of the validation images of some classes, by the model's six outputs."""
    data = ImageData(str(images), img_size=32, eval_batch_size=36, num_workers=0)
    data.setup("validate")
    ((pixels, targets),) = data.val_dataloader()
    chosen = torch.isin(targets, torch.tensor([NAMES.index(name) for name in names]))
    with torch.inference_mode():
        found = model.eval()(pixels[chosen]).argmax(1)
    return (found == targets[chosen]).float().mean().item()


@pytest.mark.parametrize("source", ["last", "weights"])
@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_part_of_the_classes_is_evaluated_on_all(
    trained, images, tmp_path, capsys, source, command
):
    model = load_model(path=trained.parent / "run" / "model.safetensors")[0]
    root = copy(images, tmp_path, "val", {"dog": "dog", "fox": "fox"})
    weights = {
        "last": ["--ckpt_path", "last"],
        "weights": ["--model.checkpoint", str(trained.parent / "run" / "model.safetensors")],
    }
    words = [command, "--config", str(trained), "--data.root", str(root), *weights[source]]
    assert main(words) == 0
    stage = {"validate": "val", "test": "test"}[command]
    expected = accuracy_of(model, images, ["dog", "fox"])
    captured = capsys.readouterr()
    assert f"{stage} acc1 {expected:.2%}" in captured.out
    assert "gives classes" not in captured.err


@pytest.mark.parametrize("command", ["validate", "test", "fit"])
@pytest.mark.parametrize(
    "folders",
    [{"cat": "Cat"}, {"cat": "cat", "dog": "dogs"}, {"ant": "zebra", "bee": "bee"}],
    ids=["spelling", "one of two", "another"],
)
def test_other_names_stop_with_both_lists(trained, images, tmp_path, capsys, command, folders):
    root = copy(images, copy(images, tmp_path, "val", folders), "train", folders)
    words = [command, "--config", str(trained), "--data.root", str(root), "--ckpt_path", "last"]
    out = ["--trainer.default_root_dir", str(trained.parent / "run"), "--trainer.max_epochs=2"]
    assert main([*words, *out]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    wrong = next(new for old, new in folders.items() if new != old)
    assert f"class {wrong!r} is none of the 6 classes of " in error
    assert "last.ckpt, ant, bee, cat, dog, eel, fox; found " in error


def test_a_resumed_run_keeps_its_labels(write_recipe, image_folder, tmp_path):
    """Without the first class the others would move up by one; they stay."""
    config = write_recipe(ONE_EPOCH)
    assert main(["fit", "--config", str(config)]) == 0
    rest = {name: name for name in NAMES[1:]}
    root = copy(image_folder, copy(image_folder, tmp_path / "rest", "val", rest), "train", rest)
    words = ["--data.root", str(root), "--ckpt_path", "last", "--trainer.max_epochs=2"]
    assert main(["fit", "--config", str(config), *words]) == 0
    assert last(config)["fastvim"]["class_names"] == NAMES
    data = ImageData(str(root), num_workers=0, img_size=16)
    data.known = KnownClasses("last.ckpt", NAMES)
    data.setup("fit")
    files = data._datasets["train"]
    assert {files[index][1] for index in range(len(files))} == {1, 2, 3, 4, 5}


def test_a_checkpoint_of_other_classes_without_the_command_line(trained, images, tmp_path):
    root = copy(images, tmp_path, "val", dict(zip(NAMES, "zyxwvu", strict=True)))
    task = Classification("fastvim_tiny_patch16_224", {**MODEL_ARGS, "embed_dim": 32})
    data = ImageData(str(root), img_size=32, num_workers=0)
    path = trained.parent / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"is of other classes: ant, bee.*; the data have u, v, w"):
        trainer(tmp_path).validate(task, datamodule=data, ckpt_path=path)
    started = Classification(
        "fastvim_tiny_patch16_224", {**MODEL_ARGS, "embed_dim": 32}, checkpoint=str(path)
    )
    with pytest.raises(
        UserError, match=r"last\.ckpt is of other classes: ant.*; the data have u, v"
    ):
        trainer(tmp_path).validate(started, datamodule=data)


# Training that starts from weights.


def started(tmp_path: Path, images: Path, names: dict[str, str], weights: Path, task=None):
    """A model after a step at a rate of 0 on some of the classes, in their order."""
    root = copy(images, copy(images, tmp_path, "val", names), "train", names)
    classes = {name: name for name in names.values()}
    make = task or Classification
    model = make(
        "fastvim_tiny_patch16_224",
        {**MODEL_ARGS, "embed_dim": 32},
        checkpoint=str(weights),
        lr=0.0,
        warmup_epochs=0,
        min_lr=0.0,
    )
    data = ImageData(str(root), classes=classes, img_size=32, batch_size=8, num_workers=0)
    trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(model, datamodule=data)
    return model.model


@pytest.mark.parametrize("order", [NAMES, ["fox", "ant", "bee", "eel", "dog", "cat"]])
@pytest.mark.parametrize("count", [6, 3])
def test_known_classes_keep_their_outputs(trained, images, tmp_path, caplog, order, count):
    path = trained.parent / "run" / "model.safetensors"
    classes = {name: name for name in order[:count]}
    model = started(tmp_path, images, classes, path)
    state, rows = read(path).state, [NAMES.index(name) for name in classes]
    torch.testing.assert_close(model.head.weight, state["head.weight"][rows], rtol=0, atol=0)
    torch.testing.assert_close(model.head.bias, state["head.bias"][rows], rtol=0, atol=0)
    said = "the layers of classes are taken by name" in caplog.text
    assert said == (list(classes) != NAMES)


def test_other_classes_start_anew(trained, images, tmp_path, caplog):
    """As many as before, but others: their outputs have nothing to do with the old ones."""
    path = trained.parent / "run" / "model.safetensors"
    names = {name: f"new {name}" for name in NAMES}
    model = started(tmp_path, images, names, path)
    assert not model.head.bias.any()
    assert torch.equal(model.norm.weight, read(path).state["norm.weight"])
    assert "the data have new ant, new bee" in caplog.text
    assert "the layers of classes start anew" in caplog.text


def test_a_probe_has_a_head_of_its_own(trained, images, tmp_path):
    path = trained.parent / "run" / "model.safetensors"
    classes = {name: name for name in reversed(NAMES)}
    model = started(tmp_path, images, classes, path, LinearProbe)
    assert not model.head.bias.any()


def test_a_probe_is_evaluated_by_name(tmp_path, image_folder, capsys):
    config = recipe(tmp_path / "run", image_folder)
    config["model"] = {**PROBE, "init_args": {**PROBE["init_args"], "warmup_epochs": 0}}
    config["trainer"] |= {"max_epochs": 1}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(file)]) == 0
    root = copy(image_folder, tmp_path / "part", "val", {"bee": "bee", "eel": "eel"})
    model = load_model(path=tmp_path / "run" / "model.safetensors")[0]
    words = ["test", "--config", str(file), "--data.root", str(root), "--ckpt_path", "last"]
    assert main(words) == 0
    assert f"acc1 {accuracy_of(model, image_folder, ['bee', 'eel']):.2%}" in capsys.readouterr().out
    (root / "val" / "bee").rename(root / "val" / "wasp")
    assert main(words) == 2
    assert "'wasp' is none of the 6 classes" in capsys.readouterr().err


def test_labels_of_a_table(tmp_path, capsys):
    """A table with some of the labels, and one with another."""
    pytest.importorskip("pandas")
    generator = np.random.default_rng(0)
    for name in ("one", "part", "other"):
        (tmp_path / name).mkdir()
    for index in range(12):
        image = generator.integers(0, 255, (3, 32, 32), dtype=np.uint8)
        for name in ("one", "part", "other"):
            np.save(tmp_path / name / f"{index}.npy", image)
    tables = {
        "one": ["a", " b", "c "],
        "part": ["c", "b", "c"],
        "other": ["a", "d", "b"],
    }
    for name, labels in tables.items():
        with (tmp_path / name / "table.csv").open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label", "split"))
            for index in range(12):
                split = "train" if index < 6 and name != "part" else "val"
                writer.writerow((f"{index}.npy", labels[index % 3], split))
    config = recipe(tmp_path / "run", tmp_path / "one")
    config["trainer"] |= {"max_epochs": 1, "accumulate_grad_batches": 1}
    config["model"]["init_args"] |= {"warmup_epochs": 0, "mixup": 0.0, "cutmix": 0.0}
    config["data"] = {
        "class_path": "fastvim.data.channels.ChannelData",
        "init_args": {
            **{"root": str(tmp_path / "one"), "in_chans": 3, "mean": [128.0], "std": [60.0]},
            **{"img_size": 32, "batch_size": 4, "num_workers": 0},
            "augment": {"defocus": 0.0, "dropout": 0.0, "min_size": 16},
        },
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(file)]) == 0
    path = tmp_path / "run" / "model.safetensors"
    assert read(path).metadata["class_names"] == ["a", "b", "c"]
    words = ["test", "--config", str(file), "--ckpt_path", "last", "--data.root"]
    capsys.readouterr()
    assert main([*words, str(tmp_path / "part")]) == 0
    model = load_model(path=path)[0].eval()
    pixels = [np.load(tmp_path / "part" / f"{index}.npy") for index in range(12)]
    with torch.inference_mode():
        found = model((torch.tensor(np.stack(pixels)).float() - 128) / 60).argmax(1)
    expected = (found == torch.tensor([2, 1, 2] * 4)).float().mean().item()
    captured = capsys.readouterr()
    assert f"acc1 {expected:.2%}" in captured.out
    assert main([*words, str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "split 'val': class 'd' is none of the 3 classes of " in error
    assert "a, b, c; found a, b, d" in error


def test_weights_without_names_are_taken_by_number(images, tmp_path):
    torch.manual_seed(0)
    options = {**MODEL_ARGS, "num_classes": 6}
    task = Classification("fastvim_tiny_patch16_224", options)
    save(tmp_path / "w.safetensors", task.create_network().state_dict(), {"model": "x"})
    again = Classification(
        "fastvim_tiny_patch16_224", MODEL_ARGS, checkpoint=str(tmp_path / "w.safetensors")
    )
    data = ImageData(str(images), img_size=32, num_workers=0)
    trainer(tmp_path).validate(again, datamodule=data)
