"""`fastvim reconstruct`: what a masked autoencoder makes of image files, a picture for each."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from fastvim.data.transforms import evaluation_transform
from fastvim.errors import UserError
from fastvim.models import MaskedAutoencoder
from fastvim.tasks.pictures.reconstruction import draw_reconstruction
from fastvim.tasks.reconstruction import reconstruct
from fastvim.weights import load_model
from fastvim_cli.arguments import Parser, usable_device
from fastvim_cli.images import (
    find_images,
    free_stem,
    image_settings,
    pictures,
    read_batches,
    report_failures,
    upright,
)


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim reconstruct",
        description="Hide most patches of each image, let a masked autoencoder predict them, and "
        "draw original, masked image, reconstruction, and reconstruction with the visible patches "
        "pasted in. Where the model predicts normalised patches (norm_pix_loss), a hidden patch's "
        "brightness and contrast are taken from the original.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders or globs")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="weights of a masked autoencoder: of this library, or published ones",
    )
    parser.add_argument("--model", metavar="NAME", help="default: the one the checkpoint names")
    parser.add_argument(
        "--mask-ratio", type=float, metavar="PART", help="hidden part (default: the model's, 0.75)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the mask, the same for every image"
    )
    parser.add_argument(
        "--size", type=int, metavar="N", help="side in pixels (default: that of the training)"
    )
    parser.add_argument(
        "--out",
        default=Path("reconstructions"),
        metavar="DIR",
        type=Path,
        help="writes NAME_reconstruction.png here (default: reconstructions)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="DEVICE"
    )
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim reconstruct --help`."""
    arguments = _parser().parse_args(argv)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if arguments.size is not None and arguments.size < 1:
        raise UserError(f"--size {arguments.size}: expected at least 1")
    if arguments.mask_ratio is not None and not 0 <= arguments.mask_ratio < 1:
        raise UserError(f"--mask-ratio {arguments.mask_ratio:g}: expected at least 0, below 1")
    paths, failures = find_images(arguments.images)
    model, metadata = load_model(arguments.model, arguments.checkpoint)
    if not isinstance(model, MaskedAutoencoder):
        raise UserError(
            f"{arguments.checkpoint} holds {metadata['model']}: expected a masked autoencoder, "
            "mae_…; classifiers are for fastvim predict"
        )
    settings = image_settings(model, metadata)
    if arguments.size is not None:
        settings["img_size"] = arguments.size
    model = model.to(usable_device(arguments.device)).eval()

    lines: list[str] = []
    names: set[str] = set()
    # One by one: an image's mask then depends on the seed alone, not on the files beside it.
    batches = read_batches(paths, pictures(upright(evaluation_transform(**settings))), 1, failures)
    for (path,), images in track(
        batches,
        "reconstructing",
        len(paths),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ):
        result = reconstruct(
            model,
            images,
            settings["mean"],
            settings["std"],
            mask_ratio=arguments.mask_ratio,
            seed=arguments.seed,
        )
        file = arguments.out / f"{free_stem(path, names)}_reconstruction.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_reconstruction(result).save(file)
        lines.append(f"{path}: loss {result.loss:.4f}, drawn in {file}")

    report_failures(failures, errors, read=len(lines))
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
