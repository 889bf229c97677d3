"""A small run and small inputs of every command, made once for each warm process."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import harness
import numpy as np
import safetensors
import small_weights
import yaml
from fuzzing import Warm
from PIL import Image
from safetensors.torch import load_file

from fastvim.weights.archive import check_archive

EPOCHS = 2
COMMANDS = ("predict", "reconstruct", "segment", "detect", "convert", "check")  # beside `fit`
# Commands that write, with the file of weights that each reads.
WRITERS = {
    "predict": small_weights.write_small_classifier,
    "reconstruct": small_weights.write_autoencoder,
    "segment": small_weights.write_segmenter,
    "detect": small_weights.write_detector,
}


class Small:
    """Images, recipe, weights, and what each command makes of them without a fault.

    Args:
        folder: empty.
        warm: where commands run.
    """

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder, self.warm = folder, warm
        self.images = folder / "images"
        write_images(self.images)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe(self.images)))
        for name, write in WRITERS.items():
            write(folder / f"{name}.safetensors")
        self._unharmed: dict[str, tuple[float, dict[str, object]]] = {}

    def words(self, command: str) -> list[str]:
        """The words of a command, which writes into its working folder."""
        if command == "fit":
            return ["fit", "--config", str(self.recipe), "--ckpt_path", "last"]
        weights = str(self.folder / f"{command}.safetensors")
        if command == "convert":
            return ["convert", str(self.folder / "predict.safetensors"), "out/weights.ckpt"]
        if command == "check":
            return ["data", "check", "--config", str(self.recipe), "--out", "out"]
        pictures = str(self.images / "val" / "ant")
        return [command, "--model", weights, "--out", "out", pictures]

    def unharmed(self, command: str) -> tuple[float, dict[str, object]]:
        """The seconds that a command takes without a fault, and its result; run once."""
        if command not in self._unharmed:
            folder = fresh(self.folder / "unharmed" / command)
            ended = self.warm.run(*self.words(command), cwd=folder)
            assert ended.code == 0, ended
            self._unharmed[command] = ended.seconds, result(command, folder)
        return self._unharmed[command]

    def ends_well(self, command: str, folder: Path) -> list[str]:
        """Run a command to its end after a fault; what is not as without one."""
        ended = self.warm.run(*self.words(command), cwd=folder)
        if ended.code != 0:
            return [f"code {ended.code}: {ended.stderr[-300:]}"]
        problems = half_written(folder)
        found, (_, expected) = result(command, folder), self.unharmed(command)
        if found != expected:
            every = expected.keys() | found
            names = [name for name in every if expected.get(name) != found.get(name)]
            problems.append(f"other results: {', '.join(sorted(names)[:5])}")
        return problems + [f"{file.name} is left" for file in folder.rglob("*.part")]


def recipe(images: Path) -> dict:
    """Two epochs of three steps, with a checkpoint after each step."""
    found = harness.recipe(Path("run"), images)
    found["trainer"]["max_epochs"] = EPOCHS
    found["model"]["init_args"]["model_args"]["embed_dim"] = 16
    found["checkpoint_every_n_steps"] = 1
    return found


def write_images(root: Path) -> None:
    """48 images for training and 6 for validation, of two classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 3)):
        for name in ("ant", "bee"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def result(command: str, folder: Path) -> dict[str, object]:
    """What a command wrote, by file; for `fit` the weights, averages and optimiser of the end."""
    if command == "fit":
        weights = load_file(folder / "run/model.safetensors")
        return {name: value.numpy().tobytes() for name, value in sorted(weights.items())}
    if command == "convert":
        with zipfile.ZipFile(folder / "out/weights.ckpt") as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    files = sorted(path for path in (folder / "out").rglob("*") if path.is_file())
    # The manifest of parts says in which folder the command was started.
    return {file.name: file.read_bytes() for file in files if file.name != "manifest.json"}


def half_written(folder: Path) -> list[str]:
    """The files below a folder that are there in part, under the name of a whole one."""
    problems = []
    for file in folder.rglob("*"):
        try:
            if file.suffix == ".ckpt" and not check_archive(file):
                problems.append(f"{file.name} has no checksum")
            elif file.suffix == ".safetensors":
                load_file(file)
            elif file.suffix == ".png":
                Image.open(file).load()
            elif file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".jsonl":
                [json.loads(line) for line in file.read_text().splitlines()]
            elif file.name == "config.yaml" and "trainer" not in yaml.safe_load(file.read_text()):
                problems.append(f"{file.name} is not whole")
        except (OSError, ValueError, SyntaxError, safetensors.SafetensorError) as error:
            problems.append(f"{file.name}: {error}")
    return problems


def fresh(folder: Path) -> Path:
    """An empty folder in place of an earlier one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
