"""`fastvim detect`: boxes and masks of the objects in image files, a picture for each and JSON."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from fastvim.data.detection import resize
from fastvim.errors import UserError
from fastvim.models import CascadeMaskRCNN
from fastvim.tasks.average_precision import Result, coco_results
from fastvim.tasks.pictures.detections import draw_detections
from fastvim_cli.arguments import Parser, usable_device
from fastvim_cli.images import (
    find_images,
    free_stem,
    load_trained,
    read_upright,
    report_failures,
)

TOLD = ("img_size", "class_names", "category_ids")  # in the file, beside the weights


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim detect",
        description="Find the objects in image files of any size, as the test of a trained model "
        "does. NAME_detections.png shows boxes, masks, classes and scores; detections.json holds "
        "all results in COCO's format, in the pixels of the images, and the name of each file.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="weights of a detection model of fastvim fit")
    add("images", nargs="+", metavar="IMAGES", help="files, folders or globs")
    add(
        "--out",
        default=Path("detections"),
        metavar="DIR",
        type=Path,
        help="writes the pictures and the results here (default: detections)",
    )
    help = "draw and count what has at least this score (default: 0.5); the results hold all"
    add("--score", type=float, default=0.5, metavar="SCORE", help=help)
    help = "longer side that an image is resized to (default: the evaluation's)"
    add("--img-size", type=int, metavar="N", help=help)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="DEVICE")
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim detect --help`."""
    arguments = _parser().parse_args(argv)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if not 0 <= arguments.score <= 1:
        raise UserError(f"--score {arguments.score:g}: expected 0 to 1")
    if arguments.img_size is not None and arguments.img_size < 1:
        raise UserError(f"--img-size {arguments.img_size}: expected at least 1")
    paths, failures = find_images(arguments.images)
    model, metadata = load_trained(arguments.checkpoint, CascadeMaskRCNN, "detection", TOLD)
    side = arguments.img_size or metadata.get("eval_size") or metadata["img_size"]
    ids = metadata["category_ids"]
    names = dict(zip(ids, metadata["class_names"], strict=True))
    model = model.to(usable_device(arguments.device)).eval()

    @torch.inference_mode()
    def results_of(image: Image.Image, image_id: int) -> list[Result]:
        prepared = resize(image, side).to(arguments.device)
        (found,) = model.detect([prepared])
        seen, size = (prepared.shape[1], prepared.shape[2]), (image.height, image.width)
        return coco_results(found, seen, size, image_id, ids)

    everything: list[Result] = []
    lines: list[str] = []
    taken: set[str] = set()
    numbers = _image_ids(paths)
    for path, image in read_upright(paths, failures, errors, "detecting"):
        results = results_of(image, numbers[path])
        everything += [{**result, "file_name": str(path)} for result in results]
        sure = [result for result in results if result["score"] >= arguments.score]
        arguments.out.mkdir(parents=True, exist_ok=True)
        drawn = arguments.out / f"{free_stem(path, taken)}_detections.png"
        draw_detections(image, sure, names).save(drawn)
        counts = Counter(names[result["category_id"]] for result in sure).most_common(3)
        found = ", ".join(f"{number} x {name}" for name, number in counts) or "nothing"
        lines.append(f"{path}: {found}, drawn in {drawn}")

    report_failures(failures, errors, read=len(lines))
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    (arguments.out / "detections.json").write_text(json.dumps(everything), encoding="utf-8")
    summary = f"{len(everything):,} results in {arguments.out / 'detections.json'}"
    console.print(summary, markup=False, soft_wrap=True)


def _image_ids(paths: list[Path]) -> dict[Path, int]:
    """The numbers that files are called, as in COCO, if all are called by one; else from 1 on."""
    stems = [path.stem for path in paths]
    if all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(stems):
        return {path: int(path.stem) for path in paths}
    return {path: number for number, path in enumerate(paths, 1)}
