"""ChannelData: tables, splits, classes, batches, unreadable files and mistakes."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from fastvim.data.channels import ChannelData, ChannelImages
from fastvim.data.files import MAX_UNREADABLE
from fastvim.data.remote import UnreadableFileError
from fastvim.data.table import random_splits, read_table
from fastvim.errors import UserError

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

CHANNELS = 5
LABELS = ("a2", "a10", "b")
MEAN, STD = (10.0, 20.0, 30.0, 40.0, 50.0), (1.0, 2.0, 3.0, 4.0, 5.0)
# No augmentation, so that a pixel tells the file.
PLAIN = {"min_size": 16, "orientation": 0.0, "defocus": 0.0, "dropout": 0.0}
SPLITS = ("train",) * 12 + ("val",) * 6 + ("test",) * 3


def write_images(root: Path, count: int = len(SPLITS)) -> list[str]:
    """`count` NPY files, each of 5 channels of one value: 10 times its number plus the channel."""
    (root / "cells").mkdir(parents=True)
    names = [f"cells/{index}.npy" for index in range(count)]
    for index, name in enumerate(names):
        image = np.empty((CHANNELS, 16, 16), np.uint16)
        image[:] = (10 * index + np.arange(CHANNELS))[:, None, None]
        np.save(root / name, image)
    return names


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images with `table.csv`."""
    names = write_images(tmp_path)
    labels = [LABELS[index % 3] for index in range(len(names))]
    table = pd.DataFrame({"path": names, "label": labels, "split": SPLITS})
    table.to_csv(tmp_path / "table.csv", index=False)
    return tmp_path


def open_data(root: Path | str, stage: str = "fit", **settings: Any) -> ChannelData:
    settings = {"in_chans": CHANNELS, "mean": MEAN, "std": STD, **settings}
    settings = {"img_size": 16, "batch_size": 4, "num_workers": 0, **settings}
    data = ChannelData(str(root), **settings)
    data.prepare_data()
    data.setup(stage)
    return data


def numbers_of(images: torch.Tensor) -> list[int]:
    """Which files the images (B, C, H, W) of `write_images` are."""
    stored = images[:, 0, 8, 8] * STD[0] + MEAN[0]
    return (stored / 10).round().int().tolist()


def test_batches(root: Path) -> None:
    data = open_data(root, eval_batch_size=5)
    assert data.class_names == ["a2", "a10", "b"]  # natural order
    assert data.num_classes == 3
    for loader, sizes in ((data.train_dataloader(), [4, 4, 4]), (data.val_dataloader(), [5, 1])):
        batches = list(loader)
        assert [len(targets) for _, targets in batches] == sizes
        for images, targets in batches:
            assert images.shape[1:] == (CHANNELS, 16, 16)
            assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    data.setup("test")
    ((images, targets),) = data.test_dataloader()
    assert numbers_of(images) == [18, 19, 20]
    assert targets.tolist() == [0, 1, 2]
    expected = (torch.arange(CHANNELS) + 180 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(images[0, :, 3, 4], expected)


def test_training_takes_every_row_once(root: Path) -> None:
    batches = list(open_data(root, augment=PLAIN).train_dataloader())
    numbers = [number for images, _ in batches for number in numbers_of(images)]
    labels = torch.cat([targets for _, targets in batches]).tolist()
    assert sorted(numbers) == list(range(12))
    assert [number % 3 for number in numbers] == labels


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_table_formats_are_the_same_data(root: Path, ending: str) -> None:
    table = read_table(str(root / "table.csv"))
    if ending == "parquet":
        table.to_parquet(root / "other.parquet")
    else:
        table.to_csv(root / f"other.{ending}", sep="\t" if ending == "tsv" else ",", index=False)
    expected = next(iter(open_data(root).val_dataloader()))
    for name in (f"other.{ending}", str(root / f"other.{ending}")):
        got = next(iter(open_data(root, table=name).val_dataloader()))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_labels_are_text_as_written(root: Path) -> None:
    names = [f"cells/{index}.npy" for index in range(4)]
    table = pd.DataFrame({"path": names, "label": ["01", "1", "NA", "null"], "split": "train"})
    table = pd.concat([table, table.assign(split="val")])
    table.to_csv(root / "table.csv", index=False)
    names = open_data(root, "fit", batch_size=2).class_names
    assert sorted(names) == ["01", "1", "NA", "null"]


def test_numbers_as_labels_of_a_parquet_table(root: Path) -> None:
    table = read_table(str(root / "table.csv"))
    table["label"] = [10, 9, 2] * 7
    table.to_parquet(root / "table.parquet")
    assert open_data(root, table="table.parquet").class_names == ["2", "9", "10"]


def test_other_columns_and_absolute_paths(root: Path, tmp_path_factory) -> None:
    table = read_table(str(root / "table.csv"))
    table["path"] = [str(root / path) for path in table["path"]]
    table = table.rename(columns={"path": "file", "label": "class", "split": "part"})
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    table.to_csv(elsewhere / "table.csv", index=False)
    columns = {"path_column": "file", "label_column": "class", "split_column": "part"}
    assert numbers_of(next(iter(open_data(elsewhere, **columns).val_dataloader()))[0])[0] == 12


def test_random_splits() -> None:
    names = random_splits(1000, seed=3)
    counts = {name: int((names == name).sum()) for name in ("train", "val", "test")}
    assert counts == {"train": 600, "val": 200, "test": 200}
    assert (names == random_splits(1000, seed=3)).all()
    assert not (names == random_splits(1000, seed=4)).all()
    assert 0.5 < np.mean(names[:500] == "train") < 0.7  # not the first rows


def test_a_table_without_splits(root: Path) -> None:
    read_table(str(root / "table.csv")).drop(columns="split").to_csv(
        root / "table.csv", index=False
    )
    seen: list[int] = []
    for seed in (0, 1):  # the seed of the order does not move rows between the splits
        data = open_data(root, seed=seed)
        data.setup("test")
        parts = [[Path(d.filename(i)).stem for i in range(len(d))] for d in data._datasets.values()]
        assert [len(part) for part in parts] == [12, 4, 5]
        assert sorted(int(name) for part in parts for name in part) == list(range(21))
        seen.append(parts)
    assert seen[0] == seen[1]


def test_validation_tests_without_test_rows(root: Path) -> None:
    table = read_table(str(root / "table.csv"))
    table[table["split"] != "test"].to_csv(root / "table.csv", index=False)
    assert len(open_data(root, "test")._datasets["test"]) == 6


def test_validation_rows_alone(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = read_table(str(root / "table.csv"))
    table[table["split"] == "val"].to_csv(root / "table.csv", index=False)
    assert open_data(root, "validate").class_names == ["a2", "a10", "b"]
    assert "no training rows" in caplog.text
    with pytest.raises(UserError, match=r"table\.csv: no rows of the split 'train'"):
        open_data(root, "fit")


def test_a_sample_set(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastvim.data.samples.fetch", lambda name: {"cells": root}[name])
    assert len(open_data("sample:cells").train_dataloader()) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_skipped_and_counted(
    root: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    (root / "cells" / "4.npy").write_bytes(b"")
    (root / "cells" / "7.npy").unlink()
    data = open_data(root, num_workers=workers, on_error="skip", augment=PLAIN)
    loader = data.train_dataloader()
    numbers = sorted(number for images, _ in loader for number in numbers_of(images))
    assert numbers == [0, 1, 2, 3, 5, 5, 6, 8, 8, 9, 10, 11]
    assert data.skipped == 2
    list(loader)
    assert data.skipped == 4
    if not workers:  # a worker's records go to its own handlers
        assert f"{root}/cells/7.npy: no such file: the next one takes its place" in caplog.text


def test_skipping_keeps_the_order(root: Path) -> None:
    whole = [
        n
        for images, _ in open_data(root, augment=PLAIN).train_dataloader()
        for n in numbers_of(images)
    ]
    (root / "cells" / "4.npy").write_bytes(b"")
    data = open_data(root, on_error="skip", augment=PLAIN, num_workers=2)
    skipped = [n for images, _ in data.train_dataloader() for n in numbers_of(images)]
    assert skipped == [5 if number == 4 else number for number in whole]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_end_a_run_by_default(root: Path, workers: int) -> None:
    (root / "cells" / "4.npy").write_bytes(b"")
    with pytest.raises(UnreadableFileError) as caught:
        list(open_data(root, num_workers=workers).train_dataloader())
    assert str(caught.value).startswith(f"{root}/cells/4.npy: unreadable image (")
    assert "\n" not in str(caught.value)


def test_unreadable_files_always_end_an_evaluation(root: Path) -> None:
    (root / "cells" / "13.npy").write_bytes(b"")
    data = open_data(root, on_error="skip")
    with pytest.raises(UnreadableFileError, match=r"13\.npy: unreadable image"):
        list(data.val_dataloader())
    assert data.skipped == 0


def test_many_unreadable_files_in_a_row(root: Path) -> None:
    for index in range(MAX_UNREADABLE):
        (root / "cells" / f"{index}.npy").unlink()
    data = open_data(root, on_error="skip")
    with pytest.raises(UnreadableFileError, match="no such file, the last of 10 such in a row"):
        _ = data._datasets["train"][0]
    assert data.skipped == MAX_UNREADABLE


def test_another_number_of_channels_is_a_bad_row(root: Path) -> None:
    np.save(root / "cells" / "12.npy", np.zeros((3, 16, 16)))
    with pytest.raises(UnreadableFileError, match=r"12\.npy: shape \(3, 16, 16\): expected 5 chan"):
        list(open_data(root).val_dataloader())


def test_an_ending_that_nothing_reads_is_never_skipped(root: Path) -> None:
    table = read_table(str(root / "table.csv"))
    table.loc[3, "path"] = "cells/3.czi"
    table.to_csv(root / "table.csv", index=False)
    with pytest.raises(UserError, match=r"3\.czi: expected a file ending in"):
        list(open_data(root, on_error="skip").train_dataloader())


@pytest.mark.slow
def test_the_counter_reaches_spawned_workers(root: Path) -> None:
    (root / "cells" / "1.npy").unlink()
    paths = [str(root / "cells" / f"{index}.npy") for index in range(4)]
    images = ChannelImages(paths, [0, 1, 2, 3], _halve, CHANNELS, on_error="skip")
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(images, 2, num_workers=2, multiprocessing_context=context)
    assert torch.cat([targets for _, targets in loader]).tolist() == [0, 2, 2, 3]
    assert images.skipped == 1


def _halve(image: torch.Tensor) -> torch.Tensor:
    return image / 2


class Probe(L.LightningModule):
    """Learns a little, and keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(CHANNELS, 3)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, targets = batch
        self.seen.append((images.clone(), targets.clone()))
        return torch.nn.functional.cross_entropy(self.layer(images.mean((2, 3))), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(root: Path, resume: Path | None = None, callbacks: tuple = (), **settings: Any) -> Probe:
    data = open_data(root, seed=3, **settings)
    module = Probe()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_val_batches=0,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return module


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_same_batches(
    root: Path, tmp_path_factory, workers: int
) -> None:
    (root / "cells" / "4.npy").unlink()
    folder = tmp_path_factory.mktemp("checkpoints")
    saver = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=2)
    settings = {"on_error": "skip", "num_workers": workers}
    whole = fit(root, callbacks=(saver,), **settings)
    for checkpoint in folder.glob("*.ckpt"):
        steps = torch.load(checkpoint, weights_only=False)["global_step"]
        resumed = fit(root, checkpoint, **settings)
        torch.testing.assert_close(resumed.seen, whole.seen[steps:], rtol=0, atol=0)
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_count_is_told_at_the_end_of_an_epoch(
    root: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    (root / "cells" / "4.npy").unlink()
    fit(root, on_error="skip", num_workers=workers)
    told = [r.getMessage() for r in caplog.records if r.name == "fastvim.data.channels"]
    told = [line for line in told if "in this epoch" in line]
    start = f"{root}/table.csv: 1 unreadable images were replaced in this epoch, "
    assert told == [f"{start}1 since the start", f"{start}2 since the start"]
    assert all(r.levelno == logging.WARNING for r in caplog.records if r.getMessage() in told)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size 0: expected 1 or more"),
        ({"seed": -1}, "seed -1: expected 0 to 4294967295"),
        ({"split_seed": -1}, "split_seed -1: expected 0 to 4294967295"),
        ({"in_chans": 0}, "in_chans 0: expected 1 to 65536"),
        ({"mean": (1.0, 2.0)}, "mean .*: expected 1 value or 5, one a channel"),
        ({"on_error": "ignore"}, "on_error 'ignore': expected one of 'raise', 'skip'"),
        ({"augment": {"rotat": True}}, r"augment has no option 'rotat' \(nearest: rotation"),
        ({"table": "none.csv"}, r"none\.csv: no such file"),
        ({"table": "table.xlsx"}, r"table\.xlsx: expected a table ending in \.csv"),
        ({"label_column": "lable"}, r"no column 'lable' \(nearest: label\); it has path, label"),
        ({"path_column": "file"}, r"table\.csv: no column 'file'"),
    ],
)
def test_mistakes(root: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_data(root, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("label", None), r"table\.csv: row 14 has no 'label' \(1 such rows\)"),
        (("path", None), r"table\.csv: row 14 has no 'path'"),
        (("split", "tain"), r"split 'tain' in row 14: expected train, val, test"),
        (("split", None), r"row 14 has no 'split'"),
        (("label", "c"), "split 'val': class 'c' is none of the 3 classes of the training split"),
    ],
)
def test_odd_rows(root: Path, change: tuple, message: str) -> None:
    table = read_table(str(root / "table.csv"))
    table.loc[13, change[0]] = change[1]
    table.to_csv(root / "table.csv", index=False)
    with pytest.raises(UserError, match=message):
        open_data(root)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "no rows"),
        ("a.csv", b"path,label\n", "no rows"),
        ("a.csv", b"\xff\xfe\x00", "unreadable table"),
        ("a.parquet", b"PAR1", "unreadable table"),
    ],
)
def test_odd_tables(root: Path, name: str, content: bytes, message: str) -> None:
    (root / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        open_data(root, table=name)


def test_a_missing_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        UserError, match=r'pandas is not installed: needs pip install "fastvim\[microscopy\]"'
    ):
        open_data(root)


def test_classes_before_setup(root: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ChannelData\.class_names: call setup"):
        _ = ChannelData(str(root), CHANNELS, MEAN, STD).num_classes
