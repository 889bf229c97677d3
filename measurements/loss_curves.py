"""Training with the kernels and with the reference: losses, and final weights bit for bit.

    python measurements/loss_curves.py [--device cuda] [--steps 300] [--depth 12] [--images FOLDER]
        [--out measurements/loss_curves.json] [--plot measurements/loss_curves.png]

A small FastVim learns handwritten digits from the same weights and batches with each engine. The
first engine is run twice: its weights must come out the same, bit for bit. Exit code 1 if not.
Small differences grow in the course of any training. A run of the reference from weights rounded to
bfloat16 shows how fast.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import fastvim
from fastvim.benchmark.record import device_name
from fastvim.data.samples import fetch

SIZE = 56  # pixels: 14 x 14 tokens of 4
BATCH = 128
LR = 5e-4
WARMUP = 20  # steps; then a cosine to 0
WINDOWS = 15  # the plotted losses are means over this part of the steps


def load_images(folder: Path) -> tuple[Tensor, Tensor]:
    """All images of folder/train/LABEL as (M, 3, SIZE, SIZE), normalised, and their labels."""
    paths = sorted((folder / "train").glob("*/*.png"))
    images = [Image.open(path).convert("L").resize((SIZE, SIZE)) for path in paths]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 255
    labels = torch.tensor([int(path.parent.name) for path in paths])
    return ((pixels - 0.13) / 0.31)[:, None].expand(-1, 3, -1, -1), labels


def train(
    engine: str,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    steps: int,
    depth: int,
    rounded: bool = False,
) -> tuple[list[float], str]:
    """Losses of every step, and a digest of the final weights; `rounded`: of the first ones, to
    bfloat16."""
    torch.manual_seed(0)
    model = timm.create_model(
        "fastvim_tiny_patch16_224", img_size=SIZE, patch_size=4, depth=depth, num_classes=10
    ).to(device)
    if rounded:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    order = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / WARMUP) * cosine
        chosen = torch.randint(len(labels), (BATCH,), generator=order)
        batch, target = images[chosen].to(device), labels[chosen].to(device)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with fastvim.use_engine(engine):
            with autocast:
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), target)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    weights = [p.detach().cpu().numpy().tobytes() for p in model.parameters()]
    return torch.stack(losses).tolist(), hashlib.sha256(b"".join(weights)).hexdigest()


def draw(curves: dict[str, list[float]], title: str, path: Path) -> None:
    """Running means of the losses, one line over the other."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    styles = ((4, "-"), (1.5, "--"), (1, ":"))
    for (name, losses), (width, style) in zip(curves.items(), styles, strict=True):
        window = max(1, len(losses) // WINDOWS)
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(window, len(losses) + 1), mean, style, linewidth=width, label=name)
    axes.set(title=title, xlabel="step", ylabel=f"loss, mean of {window} steps", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--steps", type=int, default=300)
    add("--depth", type=int, default=12)
    add("--images", type=Path, help="digits as folder/train/LABEL/*.png (default: fetched once)")
    add("--out", type=Path)
    add("--plot", type=Path)
    arguments = parser.parse_args()
    torch.backends.cudnn.deterministic = True  # of the patches' convolution
    device = torch.device(arguments.device)
    folder = arguments.images or fetch("mnist")
    if not any(folder.glob("train/*/*.png")):
        parser.error(f"no images at {folder}/train/LABEL/*.png")
    images, labels = load_images(folder)
    fast = "triton" if device.type == "cuda" else "numba"
    runs = [(fast, False), (fast, False), ("reference", False), ("reference", True)]
    curves, digests = {}, []
    for engine, rounded in runs:
        name = f"{engine}, from rounded weights" if rounded else engine
        losses, digest = train(
            engine, images, labels, device, arguments.steps, arguments.depth, rounded
        )
        curves[name] = losses
        digests.append(digest)
        print(f"{name}: loss {losses[0]:.4f} to {losses[-1]:.4f}, {digest[:12]}", flush=True)  # noqa: T201
    same = digests[0] == digests[1]
    print(f"two runs with {fast}: {'the same bits' if same else 'DIFFERENT bits'}")  # noqa: T201
    for name in (fast, list(curves)[-1]):
        losses = curves[name]
        apart = max(abs(a - b) for a, b in zip(losses, curves["reference"], strict=True))
        print(f"largest difference of a loss from the reference: {name} {apart:.4f}")  # noqa: T201
    name = device_name(device)
    record = {
        "device": name,
        "torch": torch.__version__,
        "steps": arguments.steps,
        "same_bits": same,
        "losses": curves,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        title = f"FastVim, {arguments.depth} blocks, digits, {name}"
        draw(curves, title, arguments.plot)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
