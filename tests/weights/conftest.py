"""Caches of published weights that begin empty, and a server of files."""

from __future__ import annotations

import huggingface_hub
import pytest
from weight_server import serving, stand_in

from fastvim.weights import fetch


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Folder of the caches: torch.hub's in `torch`, the hub's in `hub`."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv(fetch.WEIGHTS_FOLDER, raising=False)
    monkeypatch.setattr(fetch, "_PAUSE", 0.01)
    return tmp_path


@pytest.fixture
def server(caches, monkeypatch):
    """A server of files, which stands for the hub too."""
    with serving() as running:
        stand_in(monkeypatch, running.address)
        yield running
