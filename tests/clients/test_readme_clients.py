"""The part of README.md that needs other libraries runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```py\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_printed(block, capsys):
    for library in ("segmentation_models_pytorch", "pytorch_grad_cam"):
        pytest.importorskip(library)
    expected = re.findall(r"print\(.*# (.*)$", block, re.MULTILINE)
    exec(compile(block, "README.md", "exec"), {})
    assert len(expected) == 2
    assert capsys.readouterr().out.splitlines() == expected
