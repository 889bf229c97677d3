"""What a run leaves for others: weights, timm's configuration and a model card."""

from __future__ import annotations

import timm
import torch
from harness import ONE_EPOCH

import fastvim
from fastvim_cli import main


def test_timm_loads_the_folder_of_a_run(write_recipe, image_folder, caplog):
    config = write_recipe(ONE_EPOCH)
    folder = config.with_suffix("")
    assert main(["fit", "--config", str(config)]) == 0
    expected, metadata = fastvim.load_model(path=folder / "model.safetensors")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert loaded.pretrained_cfg["label_names"] == metadata["class_names"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), expected.eval()(images))

    written = {name: (folder / name).read_bytes() for name in ("config.json", "README.md")}
    card = written["README.md"].decode()
    assert [line[:11] for line in card.splitlines() if line.startswith("- val ")] == [
        "- val loss ",
        "- val acc1 ",
        "- val acc5 ",
    ]
    assert "  max_epochs: 1\n" in card
    assert f"    root: {image_folder.name}\n" in card
    assert str(image_folder.parent) not in card

    # A run that has nothing left to train knows its metrics from the checkpoint.
    assert main(["fit", "--config", str(config), "--ckpt_path=last"]) == 0
    assert {name: (folder / name).read_bytes() for name in written} == written
