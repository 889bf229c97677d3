"""A pack is read as the folders that it was made from, and says what is wrong with it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from test_loader_resume import fit

from fastvim.data import packing
from fastvim.data.checks import check_data, findings
from fastvim.data.images import ImageData
from fastvim.data.packed import FORMAT, INDEX, UNFINISHED, PackedFolders
from fastvim.data.packing import pack
from fastvim.data.splits import open_folder
from fastvim.errors import UserError
from fastvim.storage import written


@pytest.fixture(scope="module")
def packed(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_root` in parts of a few images; not to be written to."""
    out = tmp_path_factory.mktemp("packs") / "pack"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PART", 6000)
        pack(image_root, out)
    return out


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "pack")


def contents(root: Path, split: str, **options) -> list[tuple[str, bytes, int]]:
    reader = open_folder(str(root), split, **options)
    found = []
    for index in range(len(reader)):
        file, target = reader[index]
        with file:
            found.append((reader.below(index), file.read(), target))
    return found


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_same_files_in_the_same_order(image_root, packed, split):
    assert contents(packed, split) == contents(image_root, split)
    folder, reader = open_folder(str(image_root), split), open_folder(str(packed), split)
    assert isinstance(reader, PackedFolders)
    assert reader.class_to_idx == folder.class_to_idx == {"ant": 0, "bee": 1, "cat": 2}
    np.testing.assert_array_equal(reader.targets, folder.targets)
    assert {reader.source(index) for index in range(len(reader))} == {
        str(path) for path in packed.glob(f"{split}-*.tar")
    }
    assert len(list(packed.glob("train-*.tar"))) > 2


def test_classes_by_the_inner_folder_and_files_outside(tmp_path):
    for name in ("a/x/1.png", "b/y/2.png", "3.png"):
        path = tmp_path / "root" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    pack(tmp_path / "root", tmp_path / "pack")
    for kind, names in (("outer", ["a", "b"]), ("inner", ["x", "y"])):
        found = contents(tmp_path / "pack", "train", class_folder=kind)
        assert found == contents(tmp_path / "root", "train", class_folder=kind)
        reader = open_folder(str(tmp_path / "pack"), "train", kind)  # type: ignore[arg-type]
        assert list(reader.class_to_idx) == names
        assert "1 of 3 images outside class folders, such as 3.png" in reader.outside


def test_of_a_tar_file_and_of_a_pack(image_root, tar_root, packed, tmp_path):
    for number, root in enumerate((tar_root, packed)):
        pack(root, tmp_path / str(number))
        assert contents(tmp_path / str(number), "train") == contents(image_root, "train")


def test_a_part_unpacks_into_the_folders(image_root, packed, tmp_path):
    for part in packed.glob("*.tar"):
        with tarfile.open(part) as archive:
            archive.extractall(tmp_path, filter="data")
    assert contents(tmp_path, "train") == contents(image_root, "train")


def test_later_parts_are_larger(image_root, tmp_path, monkeypatch):
    """A process has all of them open."""
    monkeypatch.setattr(packing, "PART", 2000)
    monkeypatch.setattr(packing, "_MANY", 1)
    pack(image_root, tmp_path, splits=["train"])
    images = []
    for part in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(part) as archive:
            images.append(len(archive.getnames()))
    assert images[:3] == [2, 3, 4]
    assert contents(tmp_path, "train") == contents(image_root, "train")


def test_names_of_any_length_and_bytes(tmp_path):
    names = ["ü" * 80 + "/" + "x" * 200 + ".png", os.fsdecode(b"b\xff/1.png")]
    for name in names:
        path = tmp_path / "root" / "train" / name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(path, "PNG")
    pack(tmp_path / "root", tmp_path / "pack")
    assert contents(tmp_path / "pack", "train") == contents(tmp_path / "root", "train")
    with tarfile.open(tmp_path / "pack" / "train-00000.tar") as archive:
        assert sorted(archive.getnames()) == sorted(f"train/{name}" for name in names)


def test_other_names_of_splits(image_root, tmp_path):
    for split, name in (("train", "training"), ("val", "validation"), ("val", "test")):
        shutil.copytree(image_root / split, tmp_path / "root" / name)
    (tmp_path / "root" / "more" / "ant").mkdir(parents=True)
    made = pack(tmp_path / "root", tmp_path / "pack")
    assert [(split.split, split.images) for split in made] == [
        ("training", 12),
        ("validation", 9),
        ("test", 9),
    ]
    assert packing.not_packed(tmp_path / "root", made) == "more"
    data = ImageData(str(tmp_path / "pack"), num_workers=0)
    data.setup("fit")
    data.setup("test")
    assert data.test_dataloader().dataset.filename(0).endswith("pack/test/ant/0.jpg")
    with pytest.raises(UserError, match="no split 'more' in this pack; it has training, valid"):
        open_folder(str(tmp_path / "pack"), "more")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches(image_root, packed, workers):
    """Training's and evaluation's, bit for bit, of all images and of a choice."""
    for chosen in (None, 7):
        batches, digests = [], []
        for root in (image_root, packed):
            options = {"train_images": chosen, "num_workers": workers, "seed": 5}
            data = ImageData(str(root), batch_size=4, img_size=16, **options)
            data.setup("fit")
            loaders = (data.train_dataloader(), data.train_dataloader(), data.val_dataloader())
            batches.append([batch for loader in loaders for batch in loader])
            digests.append((data.digest("train"), data.digest("val")))
        torch.testing.assert_close(batches[1], batches[0], rtol=0, atol=0)
        assert digests[1] == digests[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_from_the_other(image_root, packed, tmp_path, workers):
    """Stopped in the middle of an epoch on folders and resumed on a pack, and back."""
    whole = fit(image_root, workers)
    for first, then in ((image_root, packed), (packed, image_root)):
        saver = ModelCheckpoint(tmp_path / first.name, every_n_train_steps=8, save_top_k=-1)
        fit(first, workers, callbacks=[saver], max_steps=8)
        (checkpoint,) = (tmp_path / first.name).glob("*.ckpt")
        resumed = fit(then, workers, checkpoint)
        torch.testing.assert_close(resumed.seen, whole.seen[8:], rtol=0, atol=0)
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_maps_are_of_one_process(packed):
    reader = open_folder(str(packed), "train")
    first = reader[0][0].read()
    other = pickle.loads(pickle.dumps(reader))
    assert other[0][0].read() == first


class Announced(PackedFolders):
    """Notes what is announced before it is read."""

    def read_ahead(self, indices):
        self.announced = [*indices]
        super().read_ahead(indices)


def test_a_batch_is_read_ahead(packed, copied):
    data = ImageData(str(packed), batch_size=4, train_images=7, num_workers=0, img_size=16)
    data.setup("fit")
    chosen = data.opened("train")
    reader = chosen.dataset.reader  # type: ignore[attr-defined]
    reader.__class__ = Announced
    next(iter(data.train_dataloader()))
    assert len(reader.announced) == 4
    assert {*reader.announced} <= {*chosen.indices}  # type: ignore[attr-defined]
    reader = open_folder(str(copied), "train")
    os.truncate(copied / "train-00000.tar", 5000)
    reader.read_ahead([0, 1])  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="5,000 bytes"):
        reader[0]


def test_a_check_finds_nothing_and_then_a_changed_byte(copied):
    data = ImageData(str(copied), num_workers=0, img_size=16)
    errors, warnings, left_out = findings(check_data(data))
    assert not errors
    assert not left_out
    assert warnings.keys() == {"val: image with the content of one of train"}
    reader = open_folder(str(copied), "train")
    file = Path(reader.source(3))
    content = bytearray(file.read_bytes())
    place = content.index(reader[3][0].read())
    content[place + 100] ^= 1
    file.write_bytes(content)
    data = ImageData(str(copied), num_workers=0, img_size=16)
    errors, _, _ = findings(check_data(data))
    assert errors.keys() == {"train: image that changed after it was packed"}
    assert f"train/ant/3.jpg: changed in {file} since" in str(errors)


def cut(folder: Path) -> str:
    os.truncate(folder / "train-00001.tar", 5000)
    return r"train-00001\.tar: 5,000 bytes, expected 10,240 as packed; pack the images again"


def lose(folder: Path) -> str:
    (folder / "train-00001.tar").unlink()
    return r"train-00001\.tar: cannot be read \(No such file"


def lose_list(folder: Path) -> str:
    (folder / "train.npz").unlink()
    return r"train\.npz: cannot be read \(No such file"


def damage_list(folder: Path) -> str:
    content = bytearray((folder / "train.npz").read_bytes())
    content[len(content) // 3] ^= 1
    (folder / "train.npz").write_bytes(content)
    return r"train\.npz: damaged \(.*; pack the images again"


def shorten_list(folder: Path) -> str:
    shutil.copy(folder / "val.npz", folder / "train.npz")
    return r"train\.npz: damaged \(9 images, expected 12\)"


def damage_index(folder: Path) -> str:
    (folder / INDEX).write_text((folder / INDEX).read_text()[:-20])
    return rf"{INDEX}: damaged \("


def empty_index(folder: Path) -> str:
    (folder / INDEX).write_text("[]")
    return rf"{INDEX}: damaged \("


def later_format(folder: Path) -> str:
    (folder / INDEX).write_text(json.dumps({"format": 9}))
    return f"a pack of format 9; this version reads {FORMAT}"


def unfinished(folder: Path) -> str:
    (folder / INDEX).rename(folder / UNFINISHED)
    return "pack: images that are not packed to the end; pack the images again"


@pytest.mark.parametrize(
    "damage",
    [
        *(cut, lose, lose_list, damage_list, shorten_list),
        *(damage_index, empty_index, later_format, unfinished),
    ],
)
def test_a_damaged_pack_is_one_line_when_it_is_opened(copied, damage):
    expected = damage(copied)
    with pytest.raises(UserError, match=expected) as raised:
        ImageData(str(copied), num_workers=0).setup("fit")
    assert "\n" not in str(raised.value)


def test_a_part_that_is_cut_off_later_is_named(copied):
    data = ImageData(str(copied), num_workers=0)
    data.setup("validate")
    os.truncate(copied / "val-00000.tar", 5000)
    with pytest.raises(UserError, match=r"val-00000\.tar: 5,000 bytes, expected"):
        next(iter(data.val_dataloader()))


def test_a_folder_that_is_in_use_is_refused(image_root, packed, copied, tmp_path):
    with pytest.raises(UserError, match="there is a pack already; delete it, or give another"):
        pack(image_root, copied)
    assert contents(copied, "train") == contents(packed, "train")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"used: has notes\.txt; expected a new or empty folder"):
        pack(image_root, tmp_path / "used")
    with pytest.raises(UserError, match=r"notes\.txt: it is there, and is not a folder"):
        pack(image_root, tmp_path / "used" / "notes.txt")
    with written(tmp_path / "taken" / INDEX) as file:
        with pytest.raises(UserError, match="another process packs there"):
            pack(image_root, tmp_path / "taken")
        file.write(b"its own")
    assert (tmp_path / "taken" / INDEX).read_bytes() == b"its own"


def test_what_cannot_be_packed_is_one_line(image_root, tmp_path):
    (tmp_path / "images").mkdir()
    for root, message in (
        (tmp_path, "no split train, val or test; expected .*/train/CLASS"),
        (tmp_path / "none", "none: no such directory"),
        ("s3://bucket/images", "an address; expected a folder"),
    ):
        with pytest.raises(UserError, match=message):
            pack(root, tmp_path / "pack")
    with pytest.raises(UserError, match="no split 'more'"):
        pack(image_root, tmp_path / "pack", splits=["train", "more"])
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("new", [True, False])
def test_after_an_error_nothing_is_left(make_split, tmp_path, monkeypatch, new):
    """An image that cannot be copied ends it; a damaged one does not."""
    make_split(tmp_path / "root" / "train")
    (tmp_path / "root" / "train" / "ant" / "2.jpg").write_bytes(b"")
    os.mkfifo(tmp_path / "root" / "train" / "cat" / "9.jpg")
    monkeypatch.setattr(packing, "PART", 6000)
    out = tmp_path / "pack"
    if not new:
        out.mkdir()
    with pytest.raises(UserError, match=r"cat/9\.jpg: a pipe, expected a file"):
        pack(tmp_path / "root", out)
    assert (list(out.iterdir()) == []) if out.exists() else new
    (tmp_path / "root" / "train" / "cat" / "9.jpg").unlink()
    pack(tmp_path / "root", out)
    assert contents(out, "train")[2] == ("ant/2.jpg", b"", 0)


def test_what_a_kill_has_left_is_written_anew(image_root, packed, tmp_path):
    out = tmp_path / "pack"
    out.mkdir()
    for name in (UNFINISHED, "train-00000.tar", "train-00007.tar", "val-00000.tar.part"):
        (out / name).write_bytes(b"left")
    pack(image_root, out)
    expected = {INDEX, "train-00000.tar", "train.npz", "val-00000.tar", "val.npz"}
    assert {path.name for path in out.iterdir()} == expected
    assert contents(out, "train") == contents(packed, "train")


def stored(root: Path) -> dict[str, Image.Image]:
    return {name: Image.open(io.BytesIO(data)) for name, data, _ in contents(root, "train") if data}


def test_smaller_images(tmp_path):
    folder = tmp_path / "root" / "train" / "a"
    folder.mkdir(parents=True)
    x, y = np.meshgrid(np.linspace(0, 255, 160), np.linspace(0, 255, 100))
    pixels = np.stack([x, y, 255 - x], -1).astype(np.uint8)
    photo = Image.fromarray(pixels)
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=exif, quality=95)
    photo.convert("L").save(folder / "grey.png")
    photo.convert("P").save(folder / "palette.png")
    photo.resize((50, 40)).save(folder / "small.png")
    Image.fromarray((x * 200).astype(np.uint16)).save(folder / "deep.png")
    (folder / "damaged.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:-700])
    (made,) = pack(tmp_path / "root", tmp_path / "pack", size=50)
    assert {kind: (number, Path(where.split(":")[0]).name) for kind, (number, where) in
            made.as_is.items()} == {
        "unreadable image": (1, "damaged.jpg"),
        "image of more than 8 bits": (1, "deep.png"),
        "image that is no larger": (1, "small.png"),
    }  # fmt: skip
    before, after = contents(tmp_path / "root", "train"), contents(tmp_path / "pack", "train")
    same = {name for (name, old, _), (_, new, _) in zip(before, after, strict=True) if old == new}
    assert same == {"a/small.png", "a/deep.png", "a/damaged.jpg"}
    images = stored(tmp_path / "pack")
    found = {name: (image.format, image.mode, image.size) for name, image in images.items()}
    assert found["a/turned.jpg"] == ("JPEG", "RGB", (50, 80))
    assert found["a/grey.png"] == ("JPEG", "L", (80, 50))
    assert found["a/palette.png"] == ("JPEG", "RGB", (80, 50))
    upright = Image.fromarray(np.rot90(pixels, -1)).resize((50, 80), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(images["a/turned.jpg"], int) - np.asarray(upright, int))
    assert difference.max() <= 12
    assert difference.mean() < 2
    assert not images["a/turned.jpg"].getexif()
