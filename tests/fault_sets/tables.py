"""Tables of images of two channels."""

from __future__ import annotations

import csv
import os
import re

import numpy as np

from fault_sets.drawn import BLOCKS, NAMES, SIDE, Drawn, fault, named, odd


def write_table(drawn: Drawn) -> None:
    names = NAMES[: drawn.rng.integers(2, 5)]
    rows = []
    for split, least in (("train", 3), ("val", 1), ("test", 1)):
        for name in names:
            for index in range(least + drawn.rng.integers(2)):
                path = drawn.root / f"{split}-{name}{index}.npy"
                np.save(path, drawn.noise(SIDE, SIDE, 2).transpose(2, 0, 1).astype(np.uint16))
                rows.append({"path": path.name, "label": name, "split": split})
    write_rows(drawn, rows)
    drawn.data |= {"in_chans": 2, "mean": [128.0], "std": [70.0], "img_size": SIDE, "batch_size": 2}
    blocks = {**BLOCKS, "in_chans": 2}
    drawn.task |= {"model_args": blocks, "mixup": 0, "cutmix": 0, "ema_decay": None}


def read_rows(drawn: Drawn) -> list[dict[str, str]]:
    with open(drawn.root / "table.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    # Without what separators at the ends of the rows have made.
    return [{name: cell for name, cell in row.items() if name} for row in rows]


def write_rows(drawn: Drawn, rows: list[dict[str, str]], encoding: str = "utf-8") -> None:
    with open(drawn.root / "table.csv", "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def change_row(drawn: Drawn, of: str, **values: str) -> dict[str, str]:
    """Change one row of a split; returns it as it was."""
    rows = read_rows(drawn)
    places = [place for place, row in enumerate(rows) if row["split"] == of]
    place = places[drawn.rng.integers(len(places))]
    before = dict(rows[place])
    rows[place] |= values
    write_rows(drawn, rows)
    return before


@odd("tables")
def a_mark_before_the_table(drawn: Drawn) -> None:
    write_rows(drawn, read_rows(drawn), "utf-8-sig")


@odd("tables")
def more_columns(drawn: Drawn) -> None:
    write_rows(drawn, [{**row, "note": "", "plate": "7"} for row in read_rows(drawn)])


@odd("tables")
def a_label_that_training_alone_has(drawn: Drawn) -> None:
    np.save(drawn.root / "rare.npy", drawn.noise(SIDE, SIDE, 2).transpose(2, 0, 1))
    write_rows(drawn, [*read_rows(drawn), {"path": "rare.npy", "label": "rare", "split": "train"}])


@odd("tables")
def other_names_of_the_splits(drawn: Drawn) -> None:
    names = {"train": "Training", "val": "valid", "test": "test"}
    write_rows(drawn, [{**row, "split": names[row["split"]]} for row in read_rows(drawn)])


@odd("tables")
def absolute_paths(drawn: Drawn) -> None:
    rows = read_rows(drawn)
    write_rows(drawn, [{**row, "path": str(drawn.root / row["path"])} for row in rows])


@fault("tables", "stops")
def file_that_is_not_there(drawn: Drawn) -> str:
    path = drawn.pick(f"{drawn.rng.choice(['train', 'val'])}-*.npy")
    path.unlink()
    return named(path)


@fault("tables", "stops")
def damaged_array(drawn: Drawn) -> str:
    path = drawn.pick(f"{drawn.rng.choice(['train', 'val'])}-*.npy")
    os.truncate(path, 100)
    return named(path)


@fault("tables", "warns")
def damaged_array_that_is_skipped(drawn: Drawn) -> str:
    drawn.data["on_error"] = "skip"
    path = drawn.pick("train-*.npy")
    os.truncate(path, 100)
    return named(path)


@fault("tables", "stops")
def array_of_other_channels(drawn: Drawn) -> str:
    path = drawn.pick("train-*.npy")
    np.save(path, drawn.noise(SIDE, SIDE, 3).transpose(2, 0, 1))
    return rf"{named(path)}.*2 channels"


@fault("tables", "stops")
def array_with_nan(drawn: Drawn) -> str:
    path = drawn.pick("train-*.npy")
    values = np.load(path).astype(np.float32)
    values[0, 0, 0] = np.nan
    np.save(path, values)
    return rf"{named(path)}.*not finite"


@fault("tables", "warns")
def empty_channel(drawn: Drawn) -> str:
    channel = int(drawn.rng.integers(2))
    for path in drawn.root.glob("train-*.npy"):
        values = np.load(path)
        values[channel] = 0
        np.save(path, values)
    return f"channel of one value.*channel {channel}, always 0"


@fault("tables", "warns")
def mean_of_other_values(drawn: Drawn) -> str:
    drawn.data["mean"] = [128.0, float(drawn.rng.choice([-2000, 5000]))]
    drawn.data["std"] = [70.0, 70.0]
    return "mean and std do not fit.*channel 1 with mean 1"


@fault("tables", "warns")
def std_of_other_values(drawn: Drawn) -> str:
    drawn.data["std"] = [65535.0]
    return "2 x train: channel that mean and std do not fit|channel that mean and std do not fit.*2"


@fault("tables", "stops")
def label_that_training_lacks(drawn: Drawn) -> str:
    change_row(drawn, "val", label="wasp")
    return "wasp"


@fault("tables", "stops")
def row_without_a_label(drawn: Drawn) -> str:
    change_row(drawn, "train", label="")
    return "no 'label'"


@fault("tables", "stops")
def row_without_a_path(drawn: Drawn) -> str:
    change_row(drawn, "train", path="")
    return "no 'path'"


@fault("tables", "stops")
def row_of_no_split(drawn: Drawn) -> str:
    change_row(drawn, "train", split="holdout")
    return "holdout"


@fault("tables", "stops")
def no_column_of_labels(drawn: Drawn) -> str:
    rows = read_rows(drawn)
    write_rows(drawn, [{"path": row["path"], "split": row["split"]} for row in rows])
    return "no column 'label'"


@fault("tables", "stops")
def one_label_in_all(drawn: Drawn) -> str:
    write_rows(drawn, [{**row, "label": "cat"} for row in read_rows(drawn)])
    return "one class.*cat|cat.*one class"


@fault("tables", "warns")
def file_in_two_splits(drawn: Drawn) -> str:
    shared = next(row for row in read_rows(drawn) if row["split"] == "train")
    change_row(drawn, "val", path=shared["path"], label=shared["label"])
    return f"file that train has too.*{re.escape(shared['path'])}"


@fault("tables", "warns")
def file_listed_twice(drawn: Drawn) -> str:
    rows = read_rows(drawn)
    write_rows(drawn, [*rows, rows[0]])
    return rf"listed twice.*{re.escape(rows[0]['path'])}"


@odd("tables")
def separators_at_the_ends_of_the_rows(drawn: Drawn) -> None:
    file = drawn.root / "table.csv"
    head, *rows = file.read_text(encoding="utf-8-sig").splitlines()
    file.write_text("\n".join([head, *(f"{row}," for row in rows)]))
