"""Hashes of what models compute and of what tasks learn, to compare two commits bit for bit.

    python measurements/fingerprint.py [--device cuda] [--only NAME ...] > after.txt
    git worktree add ../before COMMIT
    PYTHONPATH=../before python measurements/fingerprint.py > before.txt
    diff before.txt after.txt

One line for each model: its initial weights, output, loss, gradients, feature maps. One line for
each task: its weights after 20 training steps on images made here. Hashes depend on the machine
and on the number of threads, so both commits run on the same one. On a GPU, the interpolation of
segmentors and the pooling of detectors sum in no fixed order: two runs of one commit differ.
Only names that stay from commit to commit are used: registered models, tasks, data modules.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from fastvim.data.detection import DetectionData
from fastvim.data.images import ImageData
from fastvim.data.segmentation import SegmentationData
from fastvim.tasks import Classification, Detection, LinearProbe, Pretraining, Segmentation

STEPS = 20
SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4}
DECODER = {"decoder_embed_dim": 32, "decoder_depth": 2}
MODELS: dict[str, dict[str, Any]] = {
    "fastvim_tiny_patch16_224": {**SMALL, "drop_path_rate": 0.1},
    "vim_tiny_patch16_224": SMALL,
    "fastchannelvim_small_patch16_224": {**SMALL, "in_chans": 5},
    "channelvim_small_patch16_224": {**SMALL, "in_chans": 5},
    "mae_fastvim_tiny_patch16_224": {**SMALL, **DECODER},
    "mae_vim_tiny_patch16_224": {**SMALL, **DECODER},
}
DENSE = {**SMALL, "norm": "layer"}
CASCADE = {"channels": 32, "pad_to": 64, "proposals": 64, "hidden_dim": 32, "samples": 32}


def digest(tensors: Iterable[Tensor]) -> str:
    """Twelve digits for the exact values, dtypes and shapes of tensors."""
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()[:12]


def model_line(name: str, device: str, dtype: torch.dtype) -> str:
    """What one registered model computes from fixed weights and images."""
    torch.manual_seed(0)
    model = timm.create_model(name, **MODELS[name])
    initial = digest(model.state_dict().values())
    model = model.to(device).train()
    images = torch.randn(4, MODELS[name].get("in_chans", 3), 64, 64)
    torch.manual_seed(1)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        output = model(images.to(device))
    if isinstance(output, Tensor):
        results, loss = [output], F.cross_entropy(output.float(), torch.arange(4, device=device))
    else:
        results, loss = [output.prediction, output.mask], output.loss
    loss.backward()
    line = f"initial {initial}  output {digest(results)}  loss {digest([loss])}"
    gradients = digest(p.grad for p in model.parameters() if p.grad is not None)
    line += f"  gradients {gradients}"
    if hasattr(model, "forward_intermediates"):
        with torch.no_grad():
            maps = model.eval().forward_intermediates(images.to(device), intermediates_only=True)
        line += f"  features {digest(maps)}"
    return line


def draw_images(root: Path) -> None:
    """Squares and discs in noise: class folders, masks, and instances in COCO's layout."""
    generator = np.random.default_rng(0)
    splits = (("train", "training", "train2017", 24), ("val", "validation", "val2017", 8))
    for folder, masks, coco, count in splits:
        content: dict[str, Any] = {"images": [], "annotations": []}
        content["categories"] = [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}]
        for index in range(count):
            noise = generator.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            image, mask = Image.fromarray(noise), Image.new("L", (64, 64), 1)
            kind, (left, top) = index % 2, generator.integers(2, 30, 2).tolist()
            box = (left, top, left + 30, top + 30)
            for picture, fill in ((image, (230, 90, 20)), (mask, 2 + kind)):
                pen = ImageDraw.Draw(picture)
                (pen.ellipse if kind else pen.rectangle)(box, fill=fill)
            name = f"{index}.png"
            for path, picture in (
                (root / folder / ("square", "disc")[kind] / name, image),
                (root / "images" / masks / name, image),
                (root / "annotations" / masks / name, mask),
                (root / coco / name, image),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
            content["images"].append({"id": index, "file_name": name, "width": 64, "height": 64})
            corners = [left, top, left + 30, top, left + 30, top + 30, left, top + 30]
            content["annotations"].append(
                {
                    **{"id": index + 1, "image_id": index, "category_id": (3, 7)[kind]},
                    **{"bbox": [left, top, 30, 30], "area": 900, "iscrowd": 0},
                    "segmentation": [corners],
                }
            )
        (root / "annotations" / f"instances_{coco}.json").write_text(json.dumps(content))


def classification(root: Path) -> tuple[L.LightningModule, L.LightningDataModule]:
    task = Classification(
        "fastvim_tiny_patch16_224", {**SMALL, "drop_path_rate": 0.1}, lr=0.05, layer_decay=0.8
    )
    return task, ImageData(str(root), img_size=64, batch_size=8, num_workers=0)


def pretraining(root: Path) -> tuple[L.LightningModule, L.LightningDataModule]:
    task = Pretraining(
        "mae_fastvim_tiny_patch16_224",
        {**SMALL, **DECODER},
        lr=0.02,
        warmup_epochs=2,
        pictures_every_n_epochs=None,
    )
    return task, ImageData(str(root), img_size=64, batch_size=8, num_workers=0)


def probe(root: Path) -> tuple[L.LightningModule, L.LightningDataModule]:
    task = LinearProbe("fastvim_tiny_patch16_224", SMALL, warmup_epochs=2)
    return task, ImageData(str(root), img_size=64, batch_size=8, num_workers=0)


def segmentation(root: Path) -> tuple[L.LightningModule, L.LightningDataModule]:
    task = Segmentation(
        "fastvim_tiny_patch16_224",
        DENSE,
        stride=32,
        window=64,
        warmup_steps=5,
        out_indices=(0, 1, 2, 3),
        channels=32,
        aux_channels=16,
    )
    sizes: dict[str, Any] = {"img_size": 64, "base_size": (80, 64), "num_classes": 3}
    return task, SegmentationData(str(root), batch_size=4, num_workers=0, **sizes)


def detection(root: Path) -> tuple[L.LightningModule, L.LightningDataModule]:
    task = Detection("fastvim_tiny_patch16_224", DENSE, warmup_steps=5, **CASCADE)
    return task, DetectionData(
        str(root), img_size=64, scale=(0.8, 1.25), batch_size=4, num_workers=0
    )


TASKS: dict[str, Callable[[Path], tuple[L.LightningModule, L.LightningDataModule]]] = {
    "Classification": classification,
    "Pretraining": pretraining,
    "LinearProbe": probe,
    "Segmentation": segmentation,
    "Detection": detection,
}


def task_line(name: str, root: Path, device: str) -> str:
    """The weights of one task after some steps from a fixed seed."""
    L.seed_everything(0, verbose=False)
    task, data = TASKS[name](root)
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if device == "cuda" else "32-true",
        max_epochs=-(-STEPS * (4 if name in ("Segmentation", "Detection") else 8) // 24),
        max_steps=STEPS,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == STEPS
    network: nn.Module = task.model
    loss = trainer.callback_metrics["train/loss_epoch"]
    return f"weights {digest(network.state_dict().values())}  loss {loss.item():.9g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of models and tasks")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    dtypes = [torch.float32] if arguments.device == "cpu" else [torch.float32, torch.bfloat16]
    chosen = arguments.only or [*MODELS, *TASKS]
    if unknown := set(chosen) - {*MODELS, *TASKS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {[*MODELS, *TASKS]}")
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder))
        for name in chosen:
            if name in TASKS:
                lines = [task_line(name, Path(folder), arguments.device)]
            else:
                lines = [
                    f"{str(dtype).removeprefix('torch.')}  "
                    + model_line(name, arguments.device, dtype)
                    for dtype in dtypes
                ]
            for line in lines:
                sys.stdout.write(f"{name}  {line}\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
