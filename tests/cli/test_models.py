"""`fastvim models --pretrained`: the list of published weights."""

from __future__ import annotations

import re

import pytest
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


def costs(capsys, *words: str) -> dict[str, str]:
    """What the command counts, by quantity."""
    assert main(["models", *words]) == 0
    name, *lines = capsys.readouterr().out.splitlines()
    assert name == words[0]
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in lines)


def test_what_a_model_costs(capsys):
    found = costs(capsys, "fastvim_tiny_patch16_224")
    assert found["images"] == "1 of 224 pixels, 3 channels, float32"
    assert found["parameters"] == "7,166,056"
    assert found["multiply-adds of an image"] == "1.115 G, 0.017 G in the scan"
    large = costs(capsys, "fastvim_tiny_patch16_224", "--size", "512", "1024", "--batch", "8")
    assert large["images"] == "8 of 512x1024 pixels, 3 channels, float32"
    assert large["memory in inference"].endswith(" MiB")
    assert large["memory in a training step"].endswith(" GiB")
    cells = costs(capsys, "fastchannelvim_small_patch16_224", "--channels", "3", "--dtype", "amp")
    assert cells["images"] == "1 of 224 pixels, 3 channels, amp"
    masked = costs(capsys, "mae_fastvim_tiny_patch16_224", "--size", "96x64")
    assert masked["images"] == "1 of 96x64 pixels, 3 channels, 75% masked, float32"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fastvim_tin_patch16_224"], "nearest: fastvim_tiny_patch16_224"),
        (["vit_tiny_patch16_224"], "no model of this library"),
        (["upernet_fastvim_tiny_patch16_512.ade20k"], "expected its backbone's name"),
        (["fastvim_tiny_patch16_224", "--channels", "3"], "takes images of 3 channels alone"),
        (["fastchannelvim_small_patch16_224", "--channels", "9"], "expected 1 to 8"),
        (["fastvim_tiny_patch16_224", "--size", "5"], "smaller than a patch"),
        (["fastvim_tiny_patch16_224", "--size", "32", "a"], "size '32xa': expected"),
        (["fastvim_tiny_patch16_224", "--size", "99999999"], "size"),
        (["fastvim_tiny_patch16_224", "--batch", "0"], "expected 1 to"),
        (["fastvim_tiny_patch16_224", "--engines"], "not allowed with argument NAME"),
        (["--size", "32"], "--size: expected the NAME of a model"),
    ],
)
def test_mistakes_are_one_line(words, told, capsys):
    assert main(["models", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
