"""Build the wheel, install it with its base dependencies alone, and run every command.

    make test-wheel

A command must do its work, or say in one line which extra it needs and exit with code 2. Published
weights come from a folder of files, as a person downloads them. Prints a transcript; exits with
code 1 if a command did anything else. Most of the time is pip's.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
SOURCES = ["fastvim", "fastvim_cli", "pyproject.toml", "README.md", "LICENSE"]
RECIPE = f"--config {ROOT}/recipes/imagenet/fastvim_tiny.yaml --data.root ."
MODEL = "fastvim_tiny_patch16_224"
WHOLE = f"{ROOT}/tests/golden/whole"  # small files in the layout of the published ones
WEIGHTS = "weights"  # folder of published files
BY_NAME = f"""
import fastvim, timm
model = timm.create_model("{MODEL}.in1k", pretrained=True)
print(type(model).__name__, model.pretrained_cfg["tag"])
model, told = fastvim.load_model(path="{WHOLE}/segmentor.pth")
print(type(model).__name__, told["class_names"])
"""

# The words of each command, and the extra that it may ask for: "" where the base install serves.
COMMANDS = {
    "--help": "",
    "--version": "",
    "models": "",
    "models --engines": "",
    f"models {MODEL} --size 512": "",
    f"convert classifier.safetensors {WEIGHTS}/FastVim_tiny.ckpt": "",
    "convert classifier.safetensors published.ckpt": "",
    "convert published.ckpt again.safetensors": "",
    "predict --checkpoint classifier.safetensors photo.png": "",
    "predict --checkpoint classifier.safetensors photo.png --out predictions": "",
    f"predict --model {MODEL}.in1k photo.png": "",
    f"predict --model {MODEL} photo.png --out by_name": "",
    f"predict --model {WHOLE}/classifier.ckpt photo.png": "",
    f"predict --model {WHOLE}/channels.ckpt cells.npy": "",
    "reconstruct --checkpoint autoencoder.safetensors photo.png": "",
    f"reconstruct --model {WHOLE}/mae.ckpt photo.png --out published": "",
    "segment segmenter.safetensors photo.png --out segments": "",
    f"segment {WHOLE}/segmentor.pth photo.png --out classes": "",
    "detect detector.safetensors photo.png --out detections": "",
    f"detect {WHOLE}/detector.pth photo.png --out objects": "",
    f"benchmark {MODEL} --size 32 --batch 1 --warmup 1 --repeats 1 --out speed.json": "",
    "benchmark --from speed.json --markdown": "",
    "benchmark --from speed.json --plot speed.png": "train",
    "export --model classifier.safetensors classifier.onnx": "export",
    "data pack photos packed --size 64": "",
    "data stats table.csv": "microscopy",
    f"data check {RECIPE}": "train",
    "channels channels.safetensors --root .": "train",
    f"fit {RECIPE}": "train",
    f"validate {RECIPE} --ckpt_path last": "train",
    f"test {RECIPE} --ckpt_path last": "train",
    # Their options come from classes of Lightning.
    "fit --help": "train",
    "validate --help": "train",
    "test --help": "train",
}
# What they leave behind.
WRITTEN = (
    *("predictions/predictions.jsonl", "predictions/predictions.png", "by_name/predictions.png"),
    *("reconstructions/photo_reconstruction.png", "published/photo_reconstruction.png"),
    *("segments/photo_classes.png", "segments/photo_overlay.png", "classes/photo_overlay.png"),
    *("packed/fastvim_pack.json", "packed/train-00000.tar"),
    *("detections/photo_detections.png", "detections/detections.json"),
    *("objects/photo_detections.png", "objects/detections.json"),
)
# Without PYTHONPATH, or pip and the commands could find the repository there.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
ASKS = re.compile(r'fastvim: error: .*pip install "fastvim\[(\w+)\]".*\n')


def build(folder: Path) -> Path:
    """The wheel of this tree, built from a copy: `build/` may hold modules of older trees."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("fastvim-*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """An environment of the wheel and its base dependencies; returns the folder of its programs."""
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip(programs / "python", "install", "--constraint", ROOT / "constraints.txt", wheel)
    return programs


def pip(python: str | Path, command: str, *words: str | Path) -> None:
    options = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", command, *options, *words], env=ENVIRONMENT, check=True)


def call(words: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of that environment, which knows nothing of the repository."""
    return subprocess.run(
        words,
        cwd=folder,
        env={
            **ENVIRONMENT,
            "COLUMNS": "100",
            "FASTVIM_WEIGHTS": str(folder / WEIGHTS),
            "HF_HOME": str(folder / "cache"),
            "TORCH_HOME": str(folder / "cache"),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def judge(done: subprocess.CompletedProcess[str], extra: str) -> str:
    """What is wrong with how a command ended; "" for nothing."""
    if "Traceback" in done.stdout + done.stderr:
        return "a traceback"
    if done.returncode == 0:
        return ""
    asked = ASKS.fullmatch(done.stderr)
    if done.returncode != 2 or asked is None:
        return f"exit code {done.returncode}, and not one line that names an extra"
    if asked[1] != extra:
        return f"asks for [{asked[1]}], expected [{extra}]"
    return ""


def run_commands(programs: Path, folder: Path) -> list[str]:
    """Run all of `COMMANDS` and the help page of each other command; returns what went wrong."""
    listing = call(
        [programs / "python", "-c", "import fastvim_cli as c; print(*c.COMMANDS)"], folder
    )
    names = listing.stdout.split()
    runs = {f"{name} --help": "" for name in names} | COMMANDS
    wrongs = [
        f"{name}: not tried" for name in names if not any(w.split()[0] == name for w in COMMANDS)
    ]
    for words, extra in runs.items():
        start = time.perf_counter()
        done = call([programs / "fastvim", *shlex.split(words)], folder)
        seconds = time.perf_counter() - start
        wrong = judge(done, extra)
        shown = words.replace(f"{ROOT}/", "")
        ended = f"[exit code {done.returncode}, {seconds:.1f} s{wrong and '; WRONG: ' + wrong}]"
        say(f"\n$ fastvim {shown}\n{done.stdout}{done.stderr}{ended}")
        wrongs += [f"fastvim {shown}: {wrong}"] if wrong else []
    done = call([programs / "python", "-c", BY_NAME], folder)
    say(f"\n$ python -c '{BY_NAME}'\n{done.stdout}{done.stderr}[exit code {done.returncode}]")
    wrongs += ["in Python: weights by name"] if done.returncode else []
    return wrongs + [f"{name}: not written" for name in WRITTEN if not (folder / name).is_file()]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="fastvim-wheel-") as name:
        folder = Path(name)
        wheel = build(folder)
        programs = install(wheel, folder / "environment")
        say(f"{wheel.name}, {wheel.stat().st_size / 1024:.0f} KiB; installed:")
        say(call([programs / "python", "-m", "pip", "freeze"], folder).stdout)
        workplace = folder / "workplace"
        workplace.mkdir()
        made = call([programs / "python", HERE / "small_weights.py"], workplace)
        if made.returncode:
            raise RuntimeError(f"small_weights.py: {made.stderr}")
        wrongs = run_commands(programs, workplace)
    say("\n" + "".join(f"WRONG: {wrong}\n" for wrong in wrongs))
    return bool(wrongs)


if __name__ == "__main__":
    sys.exit(main())
