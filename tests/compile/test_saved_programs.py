"""Programs that name the engines' ops load and run after `import fastvim` alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from small_models import build, inputs

LOAD = """
import sys, torch, fastvim
program, traced, image, expected = sys.argv[1:]
assert "numba" not in sys.modules
image, expected = torch.load(image), torch.load(expected)
torch.testing.assert_close(torch.export.load(program).module()(image), expected)
torch.testing.assert_close(torch.jit.load(traced)(image), expected)
print("numba" in sys.modules)
"""


@pytest.mark.slow
def test_a_program_of_the_default_engine_loads(tmp_path):
    model, arguments = build("fastvim"), inputs("fastvim", 2, 48, 48)
    files = [str(tmp_path / name) for name in ("model.pt2", "model.pt", "image", "expected")]
    with torch.no_grad():
        program = torch.export.export(model, arguments)
        torch.export.save(program, files[0])
        torch.jit.trace(model, arguments, check_trace=False).save(files[1])
        torch.save(arguments[0], files[2])
        torch.save(model(*arguments), files[3])
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    assert any(
        str(node.target) == "fastvim.selective_scan_cpu.default" for g in graphs for node in g.nodes
    )
    run = subprocess.run([sys.executable, "-c", LOAD, *files], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr  # the kernels ran
