"""`fastvim detect`: boxes and masks of the objects in image files, a picture for each and JSON."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastvim_cli.arguments import MOST_SIDE, Parser, at_least, number_where, usable_device
from fastvim_cli.console import say
from fastvim_cli.images import add_images, chosen_images, chosen_reader, draw_each
from fastvim_cli.weights import add_model, first_word_as_model, load

if TYPE_CHECKING:
    from torch import Tensor

    from fastvim.models.heads.results import Result

DEFAULT = "cascade_mask_rcnn_fastvim_small_patch16_1024.coco"


def _parser() -> Parser:
    parser = Parser(
        prog="fastvim detect",
        description="Find the objects in image files of any size, as the test of a detector does. "
        "NAME_detections.png shows boxes, masks, classes and scores; detections.json holds all "
        "results in COCO's format, in the pixels of the images, and the name of each file. A "
        "first word that is a file of weights is taken for --model.",
    )
    add = parser.add_argument
    add_images(parser, "detections", "the pictures and the results")
    add_model(parser, DEFAULT)
    help = "draw and count what has at least this score (default: 0.5); the results hold all"
    score = number_where(lambda value: 0 <= value <= 1, "0 to 1")
    add("--score", type=score, default=0.5, metavar="SCORE", help=help)
    help = "longer side that an image is resized to (default: the evaluation's)"
    add("--img-size", type=at_least(1, MOST_SIDE), metavar="N", help=help)
    return parser


def run(argv: list[str]) -> None:
    """Run the command; see `fastvim detect --help`."""
    arguments = _parser().parse_intermixed_args(argv)
    first_word_as_model(arguments)

    import torch
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    from fastvim.data.dense_data import prepare_objects
    from fastvim.data.inputs import Pictures
    from fastvim.errors import require_finite
    from fastvim.models import CascadeMaskRCNN
    from fastvim.models.heads.results import coco_results
    from fastvim.pictures.detections import draw_detections
    from fastvim.storage import save_picture, write_text

    paths, failures = chosen_images(arguments)
    device = usable_device(arguments.device)
    model, metadata = load(arguments, "detect", "img_size", "class_names", "category_ids")
    assert isinstance(model, CascadeMaskRCNN)
    side = arguments.img_size or metadata.get("eval_size") or metadata["img_size"]
    antialias = metadata.get("antialias", True)
    ids = metadata["category_ids"]
    names = dict(zip(ids, metadata["class_names"], strict=True))
    model = model.to(device).eval()
    image_ids = _image_ids(paths)
    everything: list[Result] = []

    @torch.inference_mode()
    def draw(path: Path, pixels: Tensor, target: Path) -> str:
        image = Image.fromarray(pixels[0].movedim(0, -1).numpy())
        prepared = prepare_objects(image, side, antialias).to(device)
        (found,) = model.detect([prepared])
        require_finite(found["boxes"], found["scores"])
        seen, size = (prepared.shape[1], prepared.shape[2]), (image.height, image.width)
        results = coco_results(found, seen, size, image_ids[path], ids)
        everything.extend({**result, "file_name": str(path)} for result in results)
        sure = [result for result in results if result["score"] >= arguments.score]
        save_picture(f"{target}_detections.png", draw_detections(image, sure, names))
        counts = Counter(names[result["category_id"]] for result in sure).most_common(3)
        text = ", ".join(f"{number} x {name}" for name, number in counts) or "nothing"
        return f"{text}, drawn in {target}_detections.png"

    turned = metadata.get("orientation") != "stored"  # as the training images were
    reader = partial(chosen_reader(arguments, metadata), exif=turned)
    read = Pictures(reader, pil_to_tensor)
    lines = draw_each(paths, failures, read, "detecting", arguments.out, draw)
    file = arguments.out / "detections.json"
    write_text(file, json.dumps(everything))
    say(*lines, f"{len(everything):,} results in {file}")


def _image_ids(paths: list[Path]) -> dict[Path, int]:
    """The numbers that files are called, as in COCO, if all are called by one; else from 1 on."""
    stems = [path.stem for path in paths]
    if all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(stems):
        return {path: int(path.stem) for path in paths}
    return {path: number for number, path in enumerate(paths, 1)}
