"""`fastvim models --pretrained`: the list of published weights."""

from __future__ import annotations

import timm

from fastvim.weights.table import ENTRIES
from fastvim_cli import main


def test_published_weights_are_listed(tmp_path, monkeypatch, capsys):
    (tmp_path / "FastVim_tiny.ckpt").write_bytes(bytes(1_500_000))
    monkeypatch.setenv("FASTVIM_WEIGHTS", str(tmp_path))
    assert main(["models", "--pretrained"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "task", "data", "published", "licence", "MB", "here"]
    assert [line.split()[0] for line in lines] == list(ENTRIES)
    cells = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    tiny = cells["fastvim_tiny_patch16_224.in1k"]
    assert tiny == "classification imagenet top1 75.4 CC-BY-NC-SA-4.0 1.5 yes"
    other = cells["vim_base_patch16_224.midcls_in1k"]
    assert other == "classification imagenet top1 81.9, top5 95.8 Apache-2.0 1489.8 no"
    encoder = cells["mae_vim_base_patch16_224.in1k"]
    assert encoder == "masked pre-training imagenet - CC-BY-NC-SA-4.0 - no"
    column = header.index("licence")
    assert {line[column - 2 : column] for line in lines} == {"  "}


def test_the_two_lists_are_asked_for_alone(capsys):
    assert main(["models", "--pretrained", "--engines"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_timm_lists_the_published_weights():
    ours = {name for name, entry in ENTRIES.items() if not entry.head}
    assert len(ours) == 19
    listed = timm.list_pretrained("*vim*")
    assert ours == {n for n in listed if timm.model_entrypoint(n).__module__.startswith("fastvim.")}
