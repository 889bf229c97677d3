"""Options and fixtures of all tests."""

from __future__ import annotations

import os
import signal
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import dataloader

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure(config):
    # The test processes already use all cores: more threads would only compete for them.
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what is behind `&`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        type=Path,
        default=GOLDEN,
        help="folder of golden cases of the published models (default: tests/golden)",
    )
    parser.addoption("--device", default="cpu", help="device of the golden cases (default: cpu)")


def pytest_collection_modifyitems(config, items):
    for mark in ("faults", "cluster", "clients", "programs"):
        if mark not in config.option.markexpr:
            left_out = [item for item in items if item.get_closest_marker(mark)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker(mark)]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter):
    """The counts of `tests/faults`, of all processes."""
    reports = [report for each in terminalreporter.stats.values() for report in each]
    found = [each.user_properties for each in reports if getattr(each, "when", "") == "call"]
    rows = [row for each in found for name, rows in each if name == "faults" for row in rows]
    if rows:
        from faults.tally import table

        terminalreporter.section("faults")
        for line in table(rows):
            terminalreporter.line(line)


def pytest_generate_tests(metafunc):
    if "golden_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("golden")
        files = sorted(folder.glob("*.npz"))
        assert files, f"no golden cases in {folder}"
        metafunc.parametrize("golden_file", files, ids=[f.stem for f in files])


@pytest.fixture(autouse=True)
def end_workers(monkeypatch):
    """End the workers of loaders that a test left behind, for instance with an error.

    Later the garbage collector would, in the middle of another test, and wait 5 s for each worker.
    """
    iterators = weakref.WeakSet()
    iterator_class = dataloader._MultiProcessingDataLoaderIter
    initialise = iterator_class.__init__

    def remember(self, loader):
        initialise(self, loader)
        iterators.add(self)

    monkeypatch.setattr(iterator_class, "__init__", remember)
    yield
    for iterator in iterators:
        iterator._shutdown_workers()


@pytest.fixture(autouse=True)
def leave_no_group():
    """Lightning leaves its process group, and variables by which later runs would look for it."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_checks(monkeypatch, tmp_path_factory):
    """What a check keeps of the files of a test does not lie in the user's folder."""
    folder = tmp_path_factory.getbasetemp() / "checked"
    monkeypatch.setattr("fastvim.data.known.cache_directory", lambda: folder)


@pytest.fixture(scope="session")
def quick_interpreter():
    """For kernels of Triton that are interpreted."""
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        from interpreter import quicken

        quicken()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """The CPU, and a GPU where there is one."""
    return request.param


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """A folder of 6 classes of JPEGs that differ in colour and in a stripe: 96 train, 36 val."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for index, name in enumerate(("ant", "bee", "cat", "dog", "eel", "fox")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 80, (40, 40, 3), dtype=np.uint8)
                pixels[..., index % 3] += 120 if index < 3 else 60
                pixels[index * 6 : index * 6 + 8] = 255
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return root
