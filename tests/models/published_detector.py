"""Our detector with the weights of a published file, name by name."""

from __future__ import annotations

import pickle
import re
import types
from pathlib import Path

import torch

from fastvim.models import create_model
from fastvim.models.heads.cascade import CascadeMaskRCNN, build_detector
from fastvim.weights import from_published

RENAMED = (
    (r"neck\.fpn1\.", "pyramid.levels.0.0."),
    (r"neck\.fpn2\.0\.", "pyramid.levels.1.0."),
    (r"neck\.lateral_convs\.(\d)\.conv", r"pyramid.levels.\1.1"),
    (r"neck\.lateral_convs\.(\d)\.norm_layer", r"pyramid.levels.\1.2"),
    (r"neck\.fpn_convs\.(\d)\.conv", r"pyramid.levels.\1.3"),
    (r"neck\.fpn_convs\.(\d)\.norm_layer", r"pyramid.levels.\1.4"),
    (r"rpn_head\.rpn_conv\.(\d)\.conv", r"rpn.head.conv.\1.0"),
    (r"rpn_head\.rpn_cls", "rpn.head.cls_logits"),
    (r"rpn_head\.rpn_reg", "rpn.head.bbox_pred"),
    (r"roi_head\.bbox_head\.(\d)\.shared_convs\.(\d)\.conv", r"heads.stages.\1.box_head.\2.0"),
    (
        r"roi_head\.bbox_head\.(\d)\.shared_convs\.(\d)\.norm_layer",
        r"heads.stages.\1.box_head.\2.1",
    ),
    (r"roi_head\.bbox_head\.(\d)\.shared_fcs\.0", r"heads.stages.\1.box_head.5"),
    (r"roi_head\.bbox_head\.(\d)\.fc_cls", r"heads.stages.\1.box_predictor.cls_score"),
    (r"roi_head\.bbox_head\.(\d)\.fc_reg", r"heads.stages.\1.box_predictor.bbox_pred"),
    (r"roi_head\.mask_head\.(\d)\.convs\.(\d)\.conv", r"heads.mask_stages.\1.head.\2.0"),
    (r"roi_head\.mask_head\.(\d)\.convs\.(\d)\.norm_layer", r"heads.mask_stages.\1.head.\2.1"),
    (r"roi_head\.mask_head\.(\d)\.upsample", r"heads.mask_stages.\1.predictor.conv5_mask"),
    (r"roi_head\.mask_head\.(\d)\.conv_logits", r"heads.mask_stages.\1.predictor.mask_fcn_logits"),
)


class _Nothing:
    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module.startswith("mmengine") or name == "getattr":
            return _Nothing
        return super().find_class(module, name)


def load_published(path: Path) -> CascadeMaskRCNN:
    reader = types.SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="reader")
    state = torch.load(path, weights_only=False, pickle_module=reader)["state_dict"]
    prefix = "backbone."
    maps = from_published({n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix)})
    ours = {
        f"backbone.{n}" if n.startswith("norms.") else f"backbone.backbone.{n}": t
        for n, t in maps.items()
    }
    for name, tensor in state.items():
        if name.startswith(prefix):
            continue
        if ".fc_cls." in name:  # background first
            tensor = tensor.roll(1, 0)
        if ".fc_reg." in name:
            tensor = torch.cat([torch.zeros_like(tensor[:4]), tensor])
        if ".conv_logits." in name:
            tensor = torch.cat([torch.zeros_like(tensor[:1]), tensor])
        for pattern, new in RENAMED:
            name = re.sub(f"^{pattern}", new, name)
        ours[name] = tensor
    sizes = {"img_size": 128, "embed_dim": 20, "depth": 2, "norm": "layer"}
    backbone = create_model("fastvim_tiny_patch16_224", **sizes)
    model = build_detector(backbone, 3, channels=8, pad_to=128, heads={"hidden_dim": 16})
    model.load_state_dict(ours)
    return model
