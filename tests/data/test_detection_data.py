"""Detection data: layout, masks, jitter, categories, errors for unusable files."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_sets import annotation, write_instances, write_set, write_split
from PIL import Image

from fastvim.data.coco import Records, masks_of
from fastvim.data.detection import DetectionData, LargeScaleJitter
from fastvim.data.files import UnreadableImageError
from fastvim.data.resizing import linear
from fastvim.data.sampler import seeded
from fastvim.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    return write_set(tmp_path)


def data(root: Path, **options) -> DetectionData:
    defaults = {"num_workers": 0, "batch_size": 3, "img_size": 64, "scale": (0.5, 2.0)}
    defaults["train_all"] = True
    return DetectionData(str(root), **{**defaults, **options})


def fitted(root: Path, **options) -> DetectionData:
    module = data(root, **options)
    module.setup("fit")
    return module


def instances(root: Path, split: str = "train2017") -> dict:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def change(root: Path, split: str = "train2017", index: int = 0, **changes) -> None:
    """Change an annotation of a split; None removes a field."""
    content = instances(root, split)
    changed = {**content["annotations"][index], **changes}
    content["annotations"][index] = {k: v for k, v in changed.items() if v is not None}
    write_instances(root, split, content)


def plain(root: Path, split: str = "train2017", **options):
    """Samples as they are stored: no scaling, no flip."""
    module = data(root, scale=(1.0, 1.0), hflip=0.0, **options)
    module.setup("fit")
    return module._datasets["train" if split == "train2017" else "val"]


# Batches.


def test_training_batches(root):
    module = fitted(root)
    batches = list(module.train_dataloader())
    assert [len(images) for images, _ in batches] == [3, 3, 3]
    for image, target in ((i, t) for batch in batches for i, t in zip(*batch, strict=True)):
        height, width = image.shape[1:]
        count = len(target["labels"])
        assert image.dtype == torch.float32
        assert 0 <= image.min() <= image.max() <= 1
        assert max(height, width) <= 64
        assert target["boxes"].shape == (count, 4)
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64
        assert target["masks"].shape == (count, height, width)
        assert set(target["labels"].tolist()) <= {1, 2}
        assert target["masks"].flatten(1).any(1).all()
        for (x1, y1, x2, y2), mask in zip(target["boxes"].int(), target["masks"], strict=True):
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            edges = mask[y1], mask[y2 - 1], mask[:, x1], mask[:, x2 - 1]
            assert all(edge.any() for edge in edges)
    assert module.class_names == ["box", "disc"]  # by id, not as the file lists them
    assert module.category_ids == [3, 7]
    assert module.num_classes == 2


def test_evaluation_batches(root):
    module = fitted(root, img_size=100)
    batches = list(module.val_dataloader())
    assert len(batches) == 5
    written = instances(root, "val2017")
    for (images, (target,)), image in zip(batches, written["images"], strict=True):
        assert images[0].shape == (3, 100, 100)
        assert target["image_id"] == image["id"]
        assert target["size"] == (64, 64)
        mine = [a for a in written["annotations"] if a["image_id"] == image["id"]]
        names = ("bbox", "segmentation", "category_id", "area", "iscrowd")
        assert target["annotations"] == [{name: a[name] for name in names} for a in mine]
    assert target["annotations"] == []  # the last shows nothing
    images, _ = next(iter(fitted(root, img_size=100, eval_size=80).val_dataloader()))
    assert images[0].shape == (3, 80, 80)
    several = data(root, eval_batch_size=2)
    several.setup("validate")
    assert [len(images) for images, _ in several.val_dataloader()] == [2, 2, 1]


def test_evaluation_keeps_the_shape(root):
    Image.new("RGB", (50, 20)).save(root / "val2017" / "0.png")
    content = instances(root, "val2017")
    content["images"][0] |= {"width": 50, "height": 20}
    content["annotations"] = content["annotations"][2:]
    write_instances(root, "val2017", content)
    images, (target,) = next(iter(fitted(root, img_size=100).val_dataloader()))
    assert images[0].shape == (3, 40, 100)
    assert target["size"] == (20, 50)


def test_evaluation_can_resize_as_opencv_does(root):
    images, _ = next(iter(fitted(root, img_size=40, antialias=False).val_dataloader()))
    stored = sorted((root / "val2017").iterdir())[0]
    expected = linear(np.asarray(Image.open(stored).convert("RGB")), (40, 40))
    pixels = (255 * images[0].permute(1, 2, 0)).round().byte()
    np.testing.assert_array_equal(pixels, expected)


def test_as_stored(root):
    """Without jitter: the boxes of the file, its masks, and labels for its categories."""
    files, written = plain(root), instances(root)
    for index, image in enumerate(written["images"]):
        mine = [a for a in written["annotations"] if a["image_id"] == image["id"]]
        pixels, target = files[index]
        assert pixels.shape == (3, 64, 64)
        assert target["labels"].tolist() == [{3: 1, 7: 2}[a["category_id"]] for a in mine]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
        assert target["boxes"].tolist() == boxes
        assert target["masks"].sum((1, 2)).tolist() == [a["area"] for a in mine]
        for channel, mask in enumerate(target["masks"].bool()):
            assert pixels[channel][mask].min() > 0.8 > 0.3 > pixels[channel][~mask].max()
    assert target["boxes"].shape == (0, 4)  # the last image shows nothing
    assert target["masks"].shape == (0, 64, 64)


def test_workers_and_resumption_change_nothing(root):
    alone, helped = (list(fitted(root, num_workers=n).train_dataloader()) for n in (0, 2))
    for (images, targets), (others, same) in zip(alone, helped, strict=True):
        for image, other in zip(images, others, strict=True):
            assert torch.equal(image, other)
        for target, other in zip(targets, same, strict=True):
            assert all(torch.equal(target[name], other[name]) for name in target)
    first, again = (next(iter(fitted(root, seed=n).train_dataloader())) for n in (1, 2))
    assert any(not torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))


# Masks.


def test_polygons_and_run_lengths_are_the_same_masks():
    polygon = [[2.0, 1.0, 9.0, 1.0, 9.0, 6.0, 2.0, 6.0], [12, 2, 15, 2, 15, 9, 12, 9]]
    (mask,) = masks_of([{"segmentation": polygon}], 12, 20).transpose(2, 0, 1)
    assert mask.shape == (12, 20)
    assert mask[1:6, 2:9].all()
    assert mask[2:9, 12:15].all()
    assert mask.sum() == 5 * 7 + 7 * 3
    changes = np.flatnonzero(np.diff(mask.flatten("F"), prepend=0)).tolist()
    counts = np.diff([0, *changes, mask.size]).tolist()
    forms = (
        {"size": [12, 20], "counts": counts},
        annotation(1, 1, 3, mask)["segmentation"],
    )
    for form in forms:
        (same,) = masks_of([{"segmentation": form}], 12, 20).transpose(2, 0, 1)
        np.testing.assert_array_equal(same, mask)
    assert masks_of([], 12, 20).shape == (12, 20, 0)


def test_crowds_are_not_trained_on_but_evaluated(root):
    for split in ("train2017", "val2017"):
        change(root, split, iscrowd=1)
    assert plain(root)[0][1]["labels"].tolist() == [2]
    _, target = plain(root, "val2017")[0]
    assert [a["iscrowd"] for a in target["annotations"]] == [1, 0]


def test_what_other_files_leave_out(root):
    area = instances(root, "val2017")["annotations"][0]["area"]
    change(root, "val2017", area=None, iscrowd=None)
    (kept, _) = plain(root, "val2017")[0][1]["annotations"]
    assert (kept["area"], kept["iscrowd"]) == (area, 0)


# Jitter.


def quarters() -> tuple[Image.Image, np.ndarray]:
    """An image of 80 x 48 with a grey for each quarter, and the quarters' masks."""
    masks = np.zeros((48, 80, 4), dtype=np.uint8)
    greys = np.zeros((48, 80), dtype=np.uint8)
    for index, grey in enumerate((40, 100, 160, 220)):
        row, column = 24 * (index // 2), 40 * (index % 2)
        place = np.s_[row : row + 24, column : column + 40]
        masks[(*place, index)] = 1
        greys[place] = grey
    return Image.fromarray(np.stack([greys] * 3, -1)), masks


def changed(jitter: LargeScaleJitter, image: Image.Image, masks: np.ndarray):
    """A random change of an image and of masks whose boxes are the whole image."""
    whole = torch.tensor([[0.0, 0.0, *image.size]]).repeat(masks.shape[-1], 1)
    pixels, _, shown, kept = jitter.apply(jitter.draw(image.size), image, whole, masks)
    every = torch.zeros(masks.shape[-1], *shown.shape[1:], dtype=shown.dtype)
    return pixels, every.index_copy(0, kept, shown)


def test_image_and_masks_stay_together():
    image, masks = quarters()
    jitter, sizes, flips = LargeScaleJitter(64, (0.1, 2.0), 0.5), set(), set()
    for seed in range(60):
        with seeded(seed):
            pixels, shown = changed(jitter, image, masks)
        sizes.add(tuple(pixels.shape[1:]))
        assert shown.shape == (4, *pixels.shape[1:])
        assert (shown.sum(0) == 1).all()
        greys = (torch.tensor([40, 100, 160, 220]) / 255)[shown.argmax(0)]
        blurred = ((pixels[0] - greys).abs() > 0.02).float()
        assert blurred.sum() <= 2 * sum(blurred.shape)  # two columns and two rows
        if shown[:2].flatten(1).any(1).all():
            left, right = (shown[i].any(0).nonzero().float().mean() for i in (0, 1))
            flips.add(bool(left > right))
    assert flips == {True, False}
    assert min(height for height, _ in sizes) < 10
    assert max(sizes) == (64, 64)  # twice as large: 128 x 77, of which 64 x 64 are left


def test_the_crop_is_a_part_of_the_resized_image():
    """The pixels that resizing the whole image first would give, to a rounding step."""
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    # Masks that give each row and each column of the image a number, in binary.
    numbers = np.stack(np.broadcast_arrays(np.arange(30)[:, None], np.arange(40)))
    masks = np.concatenate([(n[..., None] >> np.arange(6)) & 1 for n in numbers], axis=-1)
    with seeded(3):
        jitter = LargeScaleJitter(32, (2.0, 2.0), 0.0)
        pixels, shown = changed(jitter, image, masks.astype(np.uint8))
    assert pixels.shape == (3, 32, 32)
    weights = 2 ** torch.arange(6)[:, None, None]
    row, column = ((shown[i : i + 6] * weights).sum(0)[16, 16].item() for i in (0, 6))
    whole = np.asarray(image.resize((64, 48), Image.Resampling.BILINEAR)) / 255
    distances = {
        (y, x): np.abs(whole[y : y + 32, x : x + 32].transpose(2, 0, 1) - pixels.numpy()).max()
        for y in range(48 - 32 + 1)
        for x in range(64 - 32 + 1)
    }
    top, left = min(distances, key=distances.__getitem__)
    assert distances[top, left] < 2 / 255
    assert (row, column) == ((top + 16.5) * 30 // 48, (left + 16.5) * 40 // 64)


def test_objects_cut_off_are_gone(root):
    """At twice the size most crops lose one of the two objects, or a part of it."""
    module = fitted(root, scale=(3.0, 3.0), batch_size=8)
    (_, targets) = next(iter(module.train_dataloader()))
    counts = [len(target["labels"]) for target in targets]
    assert 0 <= min(counts) < 2
    for target in targets:
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"] <= 64).all()


# Odd files.


def test_published_training_leaves_out_empty_and_tiny_images(root, caplog):
    content = instances(root)
    content["images"][0] |= {"width": 31}
    square = {"bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}
    for each in content["annotations"]:
        if each["image_id"] == content["images"][0]["id"]:
            each |= square
    write_instances(root, "train2017", content)
    with caplog.at_level(logging.WARNING):
        files = plain(root, train_all=False)
    assert len(files) == len(content["images"]) - 2
    assert "1 x image with a side under 32 pixels (first: 0.png)" in caplog.text
    assert "1 x image without objects (first: 8.png)" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [5, 5, 0.5, 9]}, "box under a pixel"),
        ({"bbox": [70, 5, 9, 9]}, "box outside the image"),
        ({"area": 0}, "mask without area"),
        ({"ignore": 1}, "annotation marked to be ignored"),
    ],
)
def test_annotations_that_training_leaves_out(root, caplog, changes, reason):
    change(root, **changes)
    with caplog.at_level(logging.WARNING):
        files = plain(root)
    assert f"training leaves out 1 x {reason} (first: annotation 1 of 0.png" in caplog.text
    assert len(files[0][1]["labels"]) == 1


def test_an_image_whose_masks_are_cut_off_gives_way_to_another(root):
    """Its box reaches into every crop, its mask into none."""
    content = instances(root)
    content["images"] = content["images"][:2]
    first, second = (image["id"] for image in content["images"])
    box = {"bbox": [0, 0, 64, 64], "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]], "area": 4}
    ours = [a for a in content["annotations"] if a["image_id"] == second]
    content["annotations"] = [{**ours[0], **box, "image_id": first}, *ours]
    write_instances(root, "train2017", content)
    files = fitted(root, scale=(0.1, 0.1), hflip=0.0)._datasets["train"]
    for seed in range(20):
        with seeded(seed):
            _, target = files[0]
        assert len(target["labels"]) == len(ours)


def test_a_box_of_zero_size_is_left_out_and_counted(root, caplog):
    for index in (0, 3):
        change(root, index=index, bbox=[5, 5, 0, 9])
    with caplog.at_level(logging.WARNING):
        files = plain(root)
    assert "training leaves out 2 x box of zero size (first: annotation 1 of 0.png" in caplog.text
    assert [len(files[index][1]["labels"]) for index in range(3)] == [1, 1, 2]


MISTAKES = [
    ({"category_id": 5}, "unknown category", "category_id 5"),
    ({"category_id": None}, "unknown category", "category_id None"),
    ({"image_id": 9}, "unknown image", "image_id 9"),
    ({"bbox": None}, "missing box", ""),
    ({"bbox": [1, 2, 3]}, "box that is not x, y, width, height", "[1, 2, 3]"),
    ({"bbox": [1, 2, 3, float("nan")]}, "box that is not x, y, width, height", "nan"),
    ({"segmentation": None}, "missing mask", ""),
    ({"segmentation": []}, "missing mask", ""),
    ({"segmentation": [[1, 1, 5, 5]]}, "polygon of fewer than three points", ""),
    ({"segmentation": [1, 1, 5, 5, 6, 6]}, "mask that is neither polygons nor run lengths", ""),
    ({"segmentation": {"size": [9, 9], "counts": "x"}}, "mask of another size", "[9, 9]"),
    ({"segmentation": {"size": [64, 64], "counts": [9]}, "area": None}, "damaged mask", ""),
]


@pytest.mark.parametrize(("changes", "kind", "named"), MISTAKES)
def test_mistakes_are_counted_at_the_start(root, changes, kind, named):
    for index in (2, 5):
        change(root, index=index, **changes)
    with pytest.raises(UserError) as caught:
        fitted(root)
    message = str(caught.value)
    assert f"instances_train2017.json: 2 x {kind} (first: annotation 3" in message
    assert named in message
    assert "\n" not in message


def test_missing_image_files_are_counted_at_the_start(root):
    for name in ("1.png", "4.png"):
        (root / "val2017" / name).unlink()
    with pytest.raises(UserError, match=r"2 x missing image file \(first: .*val2017/1.png\)"):
        fitted(root)


def test_files_in_folders(root):
    (root / "val2017" / "deep").mkdir()
    (root / "val2017" / "0.png").rename(root / "val2017" / "deep" / "0.png")
    content = instances(root, "val2017")
    content["images"][0]["file_name"] = "deep/0.png"
    write_instances(root, "val2017", content)
    assert len(plain(root, "val2017")[0][1]["annotations"]) == 2


def test_missing_and_odd_instances(root, tmp_path):
    with pytest.raises(UserError, match=r"none: no such directory; expected the images of"):
        fitted(root, train_folder="none")
    with pytest.raises(UserError, match=r"none.json: no such file"):
        fitted(root, train_file="none.json")
    file = tmp_path / "odd.json"
    for text, message in (
        ("{", "not JSON"),
        ("[]", "the lists images, annotations, categories"),
        ('{"images": [], "annotations": [], "categories": []}', "0 images, 0 categories"),
        ('{"images": [{}], "annotations": [], "categories": []}', "1 image, 0 categories"),
        ('{"images": [{}], "annotations": [], "categories": [{"id": 1}]}', "1 x image: missing id"),
        ("[" * 100_000, "nested too deep"),
        ('{"images": [' + "9" * 5000 + "]}", "not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            fitted(root, train_file="odd.json")


def test_splits_have_the_same_categories(root):
    content = instances(root, "val2017")
    content["categories"] = [*content["categories"], {"id": 9, "name": "more"}]
    write_instances(root, "val2017", content)
    with pytest.raises(
        UserError, match=r"category 9 \(more\) is none of the 2 of the split before"
    ):
        fitted(root)


def renumber(root: Path, ids: dict[int, int]) -> None:
    """Give the categories of the validation file other ids."""
    content = instances(root, "val2017")
    for key, entries in (("id", "categories"), ("category_id", "annotations")):
        content[entries] = [{**entry, key: ids[entry[key]]} for entry in content[entries]]
    write_instances(root, "val2017", content)


def test_a_split_with_ids_of_its_own_is_mapped_by_name(root, caplog):
    """0-based ids, of which one is the training file's id of the other category."""
    before = [target["annotations"] for _, target in fitted(root).opened("val")]
    renumber(root, {3: 7, 7: 0})
    module = fitted(root)
    assert [target["annotations"] for _, target in module.opened("val")] == before
    assert module.category_ids == [3, 7]
    (record,) = caplog.records
    assert (
        "2 x category of another id, taken by name (first: 3 box, 7 disc; found 0 disc, 7 box)"
        in record.message
    )
    report = data(root).check("val")
    assert report.classes == {"disc": 4, "box": 4}


def test_known_ids_under_each_others_names_are_refused(root):
    renumber(root, {3: 7, 7: 3})
    with pytest.raises(UserError, match="category 3 is 'disc'; expected 'box' of 3 box, 7 disc"):
        fitted(root)


def test_odd_images_are_named_when_read(root):
    Image.new("RGB", (64, 60)).save(root / "val2017" / "0.png")
    (root / "val2017" / "1.png").write_bytes(b"no image")
    files = plain(root, "val2017")
    with pytest.raises(UnreadableImageError, match=r"0.png: 64x60 pixels; expected 64x64"):
        files[0]
    with pytest.raises(UnreadableImageError, match=r"1.png: unreadable image"):
        files[1]


def test_a_damaged_mask_is_named_at_the_start(root):
    for counts in ("zz~~", "o0", "1", [1, -1], [64 * 64, True], [], "", "ü", None):
        change(root, segmentation={"size": [64, 64], "counts": counts})
        with pytest.raises(UserError, match=r"1 x damaged mask \(first: annotation 1 of 0.png"):
            fitted(root)


def test_what_is_known_before_the_images_are_read(root):
    change(root, index=0, bbox=[5, 5, 0, 9])
    change(root, index=1, iscrowd=1)
    report = data(root).check("train")
    assert report.split == "train2017"
    assert not report.errors
    assert report.dropped["box of zero size"].number == 1
    assert report.facts == {
        "images": 9,
        "categories": 2,
        "objects": 16,
        "crowds": 1,
        "images without objects": 1,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"scale": (2.0, 0.5)},
        {"scale": (0.0, 1.0)},
        {"img_size": 0},
        {"eval_size": 0},
        {"test_folder": "test2017"},
    ],
)
def test_arguments_out_of_range(root, options):
    with pytest.raises(UserError, match=next(iter(options))):
        data(root, **options)


def test_a_test_split_of_its_own(root):
    write_split(root, "test2017", 2)
    module = data(root, test_folder="test2017", test_file="annotations/instances_test2017.json")
    module.setup("test")
    assert len(list(module.test_dataloader())) == 2
    module = data(root)
    module.setup("test")
    assert len(list(module.test_dataloader())) == 5


def test_records():
    values = [{"a": [1, 2.5]}, {}, {"b": "ü"}]
    records = Records(deepcopy(values))
    assert list(records) == values
    with pytest.raises(IndexError):
        records[3]
