"""Write the files that the wheel's test gives to the commands into the current folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import nn

from fastvim.models import FeatureMaps
from fastvim.models.heads.cascade import build_detector
from fastvim.models.heads.upernet import UPerNet
from fastvim.weights import save

TINY = "fastvim_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}


def write(path: str, model: nn.Module, name: str = TINY, **metadata: Any) -> None:
    save(path, model.state_dict(), {"model": name, "model_args": SMALL, **metadata})


def write_segmenter() -> None:
    head = {"num_classes": 3, "channels": 12, "aux_channels": 8}
    maps = {"out_indices": [0, 1], "source": "mixer"}
    images = {"mean": [0.5] * 3, "std": [0.2] * 3, "base_size": [64, 48]}
    model = UPerNet(FeatureMaps(timm.create_model(TINY, **SMALL), **maps), **head)
    told = {**head, **maps, "window": 32, "stride": 24}
    write("segmenter.safetensors", model, segmentation=told, **images)


def write_detector() -> None:
    heads = {"hidden_dim": 16, "samples": 16, "score_thresh": 0.0, "detections": 5}
    head = {"num_classes": 2, "channels": 16, "pad_to": 0, "proposals": 50, "heads": heads}
    model = build_detector(timm.create_model(TINY, **SMALL), **head)
    told = {"class_names": ["box", "disc"], "category_ids": [3, 7], "img_size": 32}
    write("detector.safetensors", model, detection=head, **told)


Image.linear_gradient("L").convert("RGB").save("photo.png")
Path("table.csv").write_text("path,label,split\nphoto.png,a,train\nphoto.png,b,val\n")
torch.save({"model": timm.create_model(TINY).state_dict()}, "tiny.ckpt")
for family in ("mae_fastvim_tiny_patch16_224", "fastchannelvim_small_patch16_224"):
    write(f"{family.split('_')[0]}.safetensors", timm.create_model(family, **SMALL), family)
write_segmenter()
write_detector()
