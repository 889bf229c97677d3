"""Segmentation data: layout, values, joint transforms, errors for unusable files."""

from __future__ import annotations

from pathlib import Path
from struct import pack
from zlib import compress, crc32

import numpy as np
import pytest
import torch
from PIL import Image
from segmentation_sets import write_set

from fastvim.data.checks import check_data
from fastvim.data.colours import distort
from fastvim.data.decoding import TURNS
from fastvim.data.files import UnreadableImageError
from fastvim.data.masks import read_values
from fastvim.data.pixels import UNDONE, PictureReader
from fastvim.data.resizing import fit, linear
from fastvim.data.sampler import seeded
from fastvim.data.segmentation import (
    IGNORE_INDEX,
    EvaluationTransform,
    SegmentationData,
    TrainingTransform,
)
from fastvim.errors import UserError

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
# Of every class a grey value of its own: the image tells what the classes must be.
GREYS = np.array([20, 70, 120, 170, 220], dtype=np.uint8)


def write(root: Path, split: str, name: str, mask: np.ndarray) -> None:
    """An image that shows the stored classes 0 to 4 as greys."""
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    picture = GREYS[np.minimum(mask, 4)]
    Image.fromarray(np.stack([picture] * 3, -1)).save(root / "images" / split / f"{name}.jpg")
    Image.fromarray(mask).save(root / "annotations" / split / f"{name}.png")


def stripes(height: int, width: int) -> np.ndarray:
    """Five stored classes, side by side."""
    return np.broadcast_to(np.arange(width) * 5 // width, (height, width)).astype(np.uint8)


@pytest.fixture
def root(tmp_path) -> Path:
    for index in range(4):
        write(tmp_path, "training", f"t{index}", stripes(60 + index, 100))
    for index in range(3):
        write(tmp_path, "validation", f"v{index}", stripes(50, 80 + 10 * index))
    return tmp_path


def data(root: Path, **options) -> SegmentationData:
    defaults = {"num_classes": 4, "num_workers": 0, "img_size": 64, "base_size": (256, 64)}
    return SegmentationData(str(root), **{**defaults, **options})


def fitted(root: Path, **options) -> SegmentationData:
    module = data(root, **options)
    module.setup("fit")
    return module


def training_transform(**options) -> TrainingTransform:
    defaults = {
        "img_size": (32, 32),
        "base_size": (128, 32),
        "ratio": (0.5, 2.0),
        "max_share": 1.0,
        "hflip": 0.5,
        "distortion": 0.0,
        **PLAIN,
    }
    return TrainingTransform(**{**defaults, **options})


def test_images_may_keep_their_size(root):
    module = data(root, base_size=None, ratio=(1.0, 1.0), img_size=(60, 100), max_share=1.0)
    module.setup("fit")
    sizes = [tuple(images[0].shape) for images, _ in module.val_dataloader()]
    assert sizes == [(3, 50, 80), (3, 50, 90), (3, 50, 100)]
    for _, classes in module.train_dataloader():
        # As wide as the crop: nothing is padded, a fifth is the stored 0.
        assert (classes != IGNORE_INDEX).any(dim=1).sum(dim=-1).tolist() == [80, 80]


def test_batches(root):
    module = fitted(root)
    (images, classes), _ = module.train_dataloader()
    assert (images.shape, images.dtype) == ((2, 3, 64, 64), torch.float32)
    assert (classes.shape, classes.dtype) == ((2, 64, 64), torch.int64)
    assert set(classes.unique().tolist()) <= {0, 1, 2, 3, IGNORE_INDEX}
    batches = list(module.val_dataloader())
    assert [len(images) for images, _ in batches] == [1, 1, 1]
    assert [tuple(images[0].shape) for images, _ in batches] == [
        (3, 64, 102),
        (3, 64, 115),
        (3, 64, 128),
    ]
    assert [tuple(classes[0].shape) for _, classes in batches] == [(50, 80), (50, 90), (50, 100)]
    assert module.class_names == ["0", "1", "2", "3"]
    assert (module.num_classes, module.batch_size) == (4, 2)


def test_workers_change_nothing(root):
    alone, helped = (fitted(root, num_workers=n).train_dataloader() for n in (0, 2))
    for (image, classes), (other, same) in zip(alone, helped, strict=True):
        assert torch.equal(image, other)
        assert torch.equal(classes, same)


@pytest.mark.parametrize("reduce", [True, False])
def test_zero_label(root, reduce):
    stored = stripes(50, 80)
    stored[:10] = 255
    write(root, "validation", "v0", stored)
    module = data(root, num_classes=4 if reduce else 5, reduce_zero_label=reduce)
    module.setup("validate")
    classes = next(iter(module.val_dataloader()))[1][0].numpy()
    expected = stored.astype(np.int64)
    if reduce:
        expected = np.where((stored == 0) | (stored == 255), 255, expected - 1)
    np.testing.assert_array_equal(classes, expected)


def test_image_and_classes_stay_together():
    """After resizing, crop and flip, the grey of a pixel still shows its class."""
    mask = stripes(48, 80)
    image = Image.fromarray(np.stack([GREYS[mask]] * 3, -1))
    transform, seen = training_transform(), set()
    for seed in range(50):
        with seeded(seed):
            pixels, classes = transform(image, mask)
        assert pixels.shape == (3, 32, 32)
        inside = classes != IGNORE_INDEX
        greys = torch.from_numpy(GREYS / 255)[classes[inside]]
        away = (pixels[0][inside] - greys).abs() > 0.02
        assert away.sum() <= 4 * 2 * inside.any(1).sum()  # two columns between two stripes
        assert (pixels[:, ~inside] == 0).all()
        row = classes[0][inside[0]]
        seen.add(bool(row[0] > row[-1]))
        seen.add(f"padded {bool((~inside).any())}")
    assert seen == {True, False, "padded True", "padded False"}


def test_no_class_prevails():
    mask = np.zeros((32, 320), dtype=np.uint8)
    mask[:, 270:] = 1
    mask[:, 300:] = IGNORE_INDEX
    image = Image.fromarray(np.stack([mask] * 3, -1))
    fixed = {"ratio": (1.0, 1.0), "base_size": (320, 32), "hflip": 0.0}

    def mixed(max_share: float) -> int:
        """Crops whose most frequent class has at most three pixels in four."""
        transform, count = training_transform(max_share=max_share, **fixed), 0
        for seed in range(60):
            with seeded(seed):
                classes = transform(image, mask)[1]
            counts = classes[classes != IGNORE_INDEX].bincount(minlength=2)
            count += bool(0 < counts.max() <= 0.75 * counts.sum())
        return count

    free, bounded = mixed(1.0), mixed(0.75)
    assert bounded > 2 * free
    assert bounded < 60  # it gives up after ten tries


def test_evaluation_keeps_the_classes_as_stored():
    mask = stripes(48, 80)
    image = Image.fromarray(np.stack([GREYS[mask]] * 3, -1))
    pixels, classes = EvaluationTransform((256, 96), **PLAIN)(image, mask)
    assert pixels.shape == (3, 96, 160)
    np.testing.assert_array_equal(classes, mask)


def test_evaluation_can_resize_as_opencv_does(root):
    images, _ = next(
        iter(fitted(root, base_size=(60, 30), antialias=False, **PLAIN).val_dataloader())
    )
    with Image.open(root / "images" / "validation" / "v0.jpg") as stored:
        expected = linear(np.asarray(stored), (48, 30))
    pixels = (255 * images[0].permute(1, 2, 0)).round().byte()
    np.testing.assert_array_equal(pixels, expected)
    smoothed, _ = next(iter(fitted(root, base_size=(60, 30), **PLAIN).val_dataloader()))
    assert not torch.equal(smoothed[0], images[0])


@pytest.mark.parametrize(
    ("size", "expected"),
    [((683, 512), (683, 512)), ((300, 200), (768, 512)), ((3000, 300), (2048, 205))],
)
def test_fit(size, expected):
    assert fit(size, (2048, 512)) == expected
    assert fit(size[::-1], (2048, 512)) == expected[::-1]


def test_distortion():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(distort(image, 0.0), image)
    results = []
    for seed in range(20):
        with seeded(seed):
            results.append(distort(image, 1.0))
    for result in results:
        assert result.shape == image.shape
        assert result.dtype == np.uint8
        assert not np.array_equal(result, image)


@pytest.mark.parametrize("table", [True, False])
def test_class_names(root, table):
    names = ["wall", "building, edifice", "sky", "floor"]
    lines = [f"{i}\t0.1\t7\t{name}" for i, name in enumerate(names)] if table else names
    header = ["Idx\tRatio\tTrain\tName"] if table else []
    (root / "names.txt").write_text("\n".join(header + lines) + "\n")
    assert fitted(root, class_file="names.txt").class_names == names
    with pytest.raises(UserError, match=r"4 names; expected num_classes 3"):
        fitted(root, class_file="names.txt", num_classes=3)
    with pytest.raises(UserError, match="no file"):
        fitted(root, class_file="none.txt")


def test_a_missing_annotation_is_named_at_the_start(root):
    (root / "annotations" / "training" / "t1.png").unlink()
    (root / "annotations" / "training" / "t3.png").unlink()
    with pytest.raises(UserError, match=r"2 x missing annotation .*training/t1.png"):
        fitted(root)


def test_missing_folders(root, tmp_path):
    with pytest.raises(UserError, match=r"images/train: no such directory; expected .*NAME.jpg"):
        fitted(root, train_split="train")
    (tmp_path / "images" / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images"):
        fitted(root, train_split="empty")


def damage_value(path: Path) -> None:
    Image.fromarray(np.full((50, 80), 7, dtype=np.uint8)).save(path)


def damage_size(path: Path) -> None:
    Image.fromarray(np.zeros((50, 81), dtype=np.uint8)).save(path)


def damage_mode(path: Path) -> None:
    Image.new("RGB", (80, 50)).save(path)


def damage_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("orientation", range(2, 9))
def test_the_frame_of_the_classes_decides(tmp_path, orientation):
    """An image stored on its side, with classes drawn on the upright one or on the stored one."""
    root = write_set(tmp_path, training=1, validation=1)
    image, mask = (root / kind / "training" / "0.png" for kind in ("images", "annotations"))
    options = {"num_classes": 3, "img_size": 32}

    def read(frame: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
        found = SegmentationData(str(root), orientation=frame, **options)
        (report,) = check_data(found, ["train"])
        pixels, classes = found.open("train").read(0)
        return np.asarray(pixels), classes, list(report.errors | report.warnings)

    pixels, classes, _ = read("auto")
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(image) as whole, Image.open(mask) as indices:
        lying = whole.transpose(TURNS[UNDONE.get(orientation, orientation)])
        lying_mask = indices.transpose(TURNS[UNDONE.get(orientation, orientation)])
    lying.save(image, exif=exif)
    for frame in ("auto", "exif"):  # the classes are upright
        found = read(frame)
        np.testing.assert_array_equal(found[0], pixels)
        np.testing.assert_array_equal(found[1], classes)
        assert any("fit as stored too" in odd for odd in found[2]) == (
            orientation < 5 and frame == "auto"
        )
    lying_mask.save(mask)
    for frame in ("auto", "stored") if orientation > 4 else ("stored",):
        found = read(frame)
        np.testing.assert_array_equal(found[0], pixels)
        np.testing.assert_array_equal(found[1], classes)
        assert not any("fit as stored too" in odd for odd in found[2])
    if orientation > 4:
        with pytest.raises(UnreadableImageError, match=r"48x40, as 0.png has upright .EXIF."):
            SegmentationData(str(root), orientation="exif", **options).open("train").read(0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_value, "value 7 (4,000 pixels); expected 0 to 4, or 255"),
        (damage_size, "81x50 pixels; expected 80x50, as v0.jpg has"),
        (damage_mode, "mode RGB; expected one number a pixel"),
        (damage_file, "unreadable image"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_odd_annotations_are_named_in_one_line(root, damage, message, workers):
    damage(root / "annotations" / "validation" / "v0.png")
    loader = fitted(root, num_workers=workers).val_dataloader()
    with pytest.raises(UnreadableImageError) as caught:
        list(loader)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(root / "annotations" / "validation" / "v0.png"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 1},
        {"num_classes": 256},
        {"ratio": (2.0, 0.5)},
        {"base_size": (512, 2048)},
        {"batch_size": 0},
    ],
)
def test_arguments_out_of_range(root, options):
    with pytest.raises(UserError, match=next(iter(options))):
        data(root, **options)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_few_bits_keep_their_values(root, bits):
    """Pillow stretches grey in 2 and 4 bits to 0 to 255."""
    values = stripes(60, 104) % min(5, 2**bits)
    planes = np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :]
    rows = np.packbits(planes.reshape(60, -1), axis=-1)
    header = pack(">IIBBBBB", 104, 60, bits, 0, 0, 0, 0)
    data = compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    file = b"".join(pack(">I", len(d)) + k + d + pack(">I", crc32(k + d)) for k, d in chunks)
    path = root / "mask.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + file)
    np.testing.assert_array_equal(read_values(path, PictureReader()), values)
