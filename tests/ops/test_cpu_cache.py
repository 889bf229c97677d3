"""Kernels that a process compiles, and those that the next one finds on the disk."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

GRADIENTS = """
import hashlib, torch
from fastvim.models import create_model
torch.manual_seed(0)
options = {"depth": 2, "img_size": 64, "embed_dim": 32, "num_classes": 5}
model = create_model("fastvim_tiny_patch16_224", **options)
model(torch.randn(2, 3, 64, 64)).square().sum().backward()
bits = [p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None]
print(hashlib.sha256(b"".join(bits)).hexdigest())
"""


@pytest.mark.slow
def test_both_give_the_same_bits(tmp_path):
    """A run that is resumed finds the kernels that it has compiled itself."""
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def run() -> str:
        words = [sys.executable, "-c", GRADIENTS]
        return subprocess.run(words, env=variables, capture_output=True, text=True).stdout

    compiled = run()
    assert any(tmp_path.rglob("*.nbc"))
    assert compiled
    assert run() == compiled
