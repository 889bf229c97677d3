"""What README.md shows works: its Python runs, commands run or are parsed, its links exist."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_weights
from coco_sets import write_set
from PIL import Image
from small_published import publish, use_folders

from fastvim.weights import convert
from fastvim.weights.table import ENTRIES
from fastvim_cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXTRAS = re.findall(
    r"^(\w+) = \[",
    (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1],
    re.MULTILINE,
)
TARGETS = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)

LABELS = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "box_ap": "box AP"}

RUN = ("predict", "reconstruct", "segment", "detect", "convert", "data stats", "data check")
# Entries of the table that the README names, or that its commands take by themselves.
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
CLASSIFIERS = (
    "fastvim_tiny_patch16_224.in1k",
    "fastvim_small_patch16_224.in1k",
    "vim_tiny_patch16_224.midcls_in1k",
    "mae_fastvim_base_patch16_224.in1k",
)
HEADS: dict[str, dict[str, Any]] = {
    "segmentation": {"out_indices": (0, 1), "channels": 12, "aux_channels": 8},
    "detection": {"channels": 16, "pad_to": 64, "proposals": 50},
}
DENSE = {
    "upernet_fastvim_tiny_patch16_512.ade20k": "segmentation",
    "upernet_fastvim_small_patch16_512.ade20k": "segmentation",
    "cascade_mask_rcnn_fastvim_tiny_patch16_1024.coco": "detection",
    "cascade_mask_rcnn_fastvim_small_patch16_1024.coco": "detection",
}
# Not run, and why; instead `parse` sees that everything that they name exists.
PARSED = {
    "make": "trains for minutes on data from the network, or runs these tests",
    "fastvim fit": "trains for hours",
    "fastvim test": "needs such a training, or the published data",
    "fastvim benchmark": "measures for minutes",
    "fastvim export": "translates a full-size model for a minute",
    "torchrun": "needs several machines",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The shell's commands, each on one line, without comments."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def started_by(command: str, prefixes: tuple[str, ...]) -> bool:
    return any(command.startswith(f"{prefix} ") for prefix in prefixes)


TO_RUN = [line for line in commands() if started_by(line, tuple(f"fastvim {x}" for x in RUN))]
TO_PARSE = [line for line in commands() if started_by(line, tuple(PARSED))]


def test_every_command_is_run_or_parsed() -> None:
    assert commands()
    assert sorted(commands()) == sorted(TO_RUN + TO_PARSE)


@pytest.fixture(scope="module")
def published(home: Path) -> Iterator[None]:
    """Small models under the names of published weights, in the layouts of their files."""
    with pytest.MonkeyPatch.context() as patch:
        use_folders(home, patch)
        for name in CLASSIFIERS:
            publish(patch, name, SMALL)
        for name, kind in DENSE.items():
            head = {kind: {**ENTRIES[name].head[kind], **HEADS[kind]}}
            publish(patch, name, SMALL, head=head)
        yield


@pytest.mark.usefixtures("published")
def test_python(capsys: pytest.CaptureFixture) -> None:
    """One after the other, as a reader would; what they print is what their comments say."""
    names: dict[str, object] = {}
    for snippet in blocks("python"):
        exec(snippet, names)
    printed = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("torch.Size")
    ]
    promised = re.findall(r"torch\.Size\(\[.*?\]\)", "\n".join(blocks("python")))
    assert promised
    assert set(promised) <= set(printed)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands read: recipes, images, a table, trained weights."""
    home = tmp_path_factory.mktemp("home")
    for name in ("recipes", "examples"):
        (home / name).symlink_to(ROOT / name)
    picture = Image.linear_gradient("L").convert("RGB")
    for path in ("photos/train/cat/1.jpg", "photos/val/dog/9.jpg", "some/image.jpg", "more/2.jpg"):
        (home / path).parent.mkdir(parents=True)
        picture.save(home / path)
    picture.save(home / "photo.jpg")
    pd.DataFrame({"path": ["photo.jpg", "more/2.jpg"]}).to_parquet(home / "images.parquet")
    (home / "cells").mkdir()
    np.save(home / "cells/1.npy", np.random.default_rng(0).normal(size=(8, 9, 9)))
    (home / "cells/table.csv").write_text("path,label,split\n1.npy,a,train\n")
    write_set(home / "data/coco")
    runs = home / "runs"
    small_weights.write_classifier(runs / "photos/model.safetensors")
    small_weights.write_autoencoder(runs / "mae/pretrain_fastvim_base/model.safetensors")
    small_weights.write_segmenter(runs / "ade20k/fastvim_tiny/model.safetensors")
    small_weights.write_detector(runs / "coco/fastvim_tiny/model.safetensors")
    convert(runs / "photos/model.safetensors", runs / "photos")  # as a run leaves it
    convert(runs / "photos/model.safetensors", home / "published.ckpt")
    convert(home / "published.ckpt", home / "fastvim_tiny.safetensors")
    return home


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("command", TO_RUN)
def test_run(command: str, home: Path) -> None:
    """In the home, where `/data` is a folder too, and each in any process."""
    words = [word.replace("/data/", f"{home}/data/") for word in shlex.split(command)]
    if "--status" in words and not Path(words[-1]).exists():  # of the command before it
        before = TO_RUN[TO_RUN.index(command) - 1]
        assert main(shlex.split(before)[1:]) == 0
    assert main(words[1:]) == 0


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("command", TO_PARSE)
def test_parse(command: str, capsys: pytest.CaptureFixture) -> None:
    """In the home too."""
    words = shlex.split(command)
    if words[0] == "make":
        assert set(words[1:]) <= set(TARGETS)
        return
    if words[0] == "torchrun":
        words = words[words.index("-m") :]
        assert words[1] == "fastvim_cli"
        words = ["fastvim", *words[2:]]
    if words[1] in ("benchmark", "export"):
        importlib.import_module(f"fastvim_cli.{words[1]}")._parser().parse_args(words[2:])
        return
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], "--print_config"])
    assert ended.value.code in (None, 0)
    assert "data:" in capsys.readouterr().out


def test_the_published_weights_are_those_of_the_table() -> None:
    """Name, number and licence, a row each, in the table's order."""
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.+) \| (.+) \|$", README, re.MULTILINE)
    expected = []
    for entry in ENTRIES.values():
        number = ", ".join(f"{LABELS[name]} {value}" for name, value in entry.number.items())
        expected.append((entry.name, number or "masked pre-training", entry.licence))
    assert rows == expected


@pytest.mark.parametrize("name", ["README", "CONTRIBUTING", "SECURITY", "docs/architecture"])
def test_names_in_the_text(name: str) -> None:
    """Commands, `make` targets, extras, files and links."""
    page = ROOT / f"{name}.md"
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", prose):
        if match := re.match(r"fastvim (\w+)", code):
            assert match[1] in COMMANDS, code
        if match := re.match(r"make (\S+)", code):
            assert match[1] in TARGETS, code
        if code.startswith("runs/"):  # of the commands in the text, whoever has run which of them
            continue
        for folder in (ROOT, ROOT / "fastvim"):
            if re.fullmatch(r"[\w./-]+", code) and (folder / code.split("/")[0]).is_dir():
                assert (folder / code).exists(), code
    assert set(re.findall(r"fastvim\[(\w+)\]", text)) <= set(EXTRAS)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target


def test_each_promise_has_its_test() -> None:
    """A file, or a function in it."""
    rows = re.findall(
        r"^\| [^*|]+ \| (`tests/.*) \|$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 20
    for named in (name for row in rows for name in re.findall(r"`([^`]+)`", row)):
        file, _, function = named.partition("::")
        assert f"def {function or 'test_'}" in (ROOT / file).read_text(), named
