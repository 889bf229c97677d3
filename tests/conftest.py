"""What all tests share."""

from __future__ import annotations

from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        type=Path,
        default=GOLDEN,
        help="folder of golden cases of the published models (default: tests/golden)",
    )


def pytest_generate_tests(metafunc):
    if "golden_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("golden")
        files = sorted(folder.glob("*.npz"))
        assert files, f"no golden cases in {folder}"
        metafunc.parametrize("golden_file", files, ids=[f.stem for f in files])
