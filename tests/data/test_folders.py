"""Which files are images, and of which class: folders, tar files, hidden and other files."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvim.data.folders import ClassFolders, image_endings, list_images, natural_key
from fastvim.data.images import ImageData
from fastvim.data.segmentation import find_pairs
from fastvim.errors import UserError
from fastvim.inference.parts.sources import Source

FILES = (
    *("cat/1.jpg", "cat/2.JPG", "cat/10.jpg", "cat/day/3.webp", "cat/day/old/4.bmp"),
    *("dog/day/1.tif", "dog/night/2.png"),
    *(".ipynb_checkpoints/1.jpg", "__MACOSX/cat/1.jpg", "cat/._1.jpg", "cat/.DS_Store"),
    *("Thumbs.db", "dog/Thumbs.db", "cat/notes.txt", "dog/a.heic", "dog/b.HEIC", "dog/README"),
)
SEEN = ["cat/1.jpg", "cat/2.JPG", "cat/10.jpg", "cat/day/3.webp", "cat/day/old/4.bmp"]
SEEN += ["dog/day/1.tif", "dog/night/2.png"]


def picture(ending: str, value: int = 0) -> bytes:
    stream = io.BytesIO()
    kind = Image.registered_extensions()[ending.lower()]
    Image.new("RGB", (16, 16), (value, 100, 200)).save(stream, kind)
    return stream.getvalue()


def write(folder: Path, names: tuple[str, ...] = FILES) -> Path:
    """A small picture for each name, another file where Pillow does not know its ending."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        known = path.suffix.lower() in image_endings()
        path.write_bytes(picture(path.suffix, number) if known else b"other")
    return folder


def pack(folder: Path, archive: Path, arcname: str) -> Path:
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, arcname=arcname)
    return archive


def pack_classes(folder: Path, archive: Path) -> Path:
    """A tar file for each class folder, in a tar file."""
    with tarfile.open(archive, "w") as tar:
        for name in ("cat", "dog"):
            inner = pack(folder / name, archive.with_name(f"{name}.tar"), ".")
            tar.add(inner, arcname=inner.name)
            inner.unlink()
    return archive


@pytest.mark.parametrize("kind", ["folder", "tar", "tar of train/", "tar of tars"])
def test_what_counts(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "train")
    if kind == "folder":
        split = ClassFolders(folder)
    elif kind == "tar of tars":
        split = ClassFolders(pack_classes(folder, tmp_path / "train.tar"))
    else:
        above = "." if kind == "tar" else "data/train"
        split = ClassFolders(pack(folder, tmp_path / "train.tar", above))
    prefix = "data/train/" if kind == "tar of train/" else ""
    assert [split.filename(i) for i in range(len(split))] == [prefix + name for name in SEEN]
    assert split.class_to_idx == {"cat": 0, "dog": 1}
    assert split.targets.tolist() == [0] * 5 + [1] * 2
    assert split.left_out == {".heic": 2, ".txt": 1, "without ending": 1}
    for index, name in enumerate(SEEN):
        file, _ = split[index]
        with file:
            assert file.read() == (folder / name).read_bytes()
    where = f"{split.root}: 2 .heic, 1 .txt, 1 without ending"
    assert split.unused == {"file that is no image": (4, where)}


def test_the_innermost_folder_is_the_class(tmp_path: Path) -> None:
    folder = write(tmp_path / "train", ("cat/day/1.jpg", "cat/night/2.jpg", "dog/day/3.jpg"))
    for location in (folder, pack(folder, tmp_path / "train.tar", "train")):
        split = ClassFolders(location, "inner")
        assert split.class_to_idx == {"day": 0, "night": 1}
        assert split.targets.tolist() == [0, 1, 0]
    with pytest.raises(UserError, match="class_folder 'leaf': expected 'outer' or 'inner'"):
        ClassFolders(folder, "leaf")  # type: ignore[arg-type]


def test_numbers_are_ordered_by_value_and_letters_by_case_at_last() -> None:
    names = ["b", "a10", "A2", "a2", "١٠", "9", "1²2"]  # noqa: RUF001
    assert sorted(names, key=natural_key) == ["1²2", "9", "١٠", "A2", "a2", "a10", "b"]  # noqa: RUF001


def test_class_folders_without_an_image_are_named(tmp_path: Path) -> None:
    split = ClassFolders(write(tmp_path / "train", ("cat/1.jpg", "emu/1.raw", "emu/b/2.raw")))
    assert split.empty == ["emu"]
    assert split.unused["class folder without an image"] == (1, f"{split.root}: emu")


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train", ("cat/1.jpg", "dog/1.jpg", "emu/1.heic"))
    write(tmp_path / "val", ("cat/1.jpg",))
    data = ImageData(str(tmp_path), num_workers=0)
    data.setup("fit")
    assert data.class_names == ["cat", "dog"]
    folder = tmp_path / "train"
    assert [record.getMessage() for record in caplog.records] == [
        f"left out: 1 x file that is no image (first: {folder}: 1 .heic); "
        f"1 x class folder without an image (first: {folder}: emu)"
    ]


def test_links(tmp_path: Path) -> None:
    """Links to folders are followed, one that leads in a circle is not."""
    folder = write(tmp_path / "train", ("cat/1.jpg",))
    (folder / "dog").symlink_to(write(tmp_path / "elsewhere", ("2.jpg",)))
    (folder / "cat" / "again").symlink_to(folder)
    split = ClassFolders(folder)
    assert [split.filename(i) for i in range(len(split))] == ["cat/1.jpg", "dog/2.jpg"]


def test_a_broken_link_is_an_unreadable_image(tmp_path: Path) -> None:
    write(tmp_path / "val", ("cat/1.jpg",))
    (tmp_path / "val" / "cat" / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    data = ImageData(str(tmp_path), num_workers=0, img_size=16)
    data.setup("validate")
    with pytest.raises(UserError, match=r"2\.jpg: unreadable image \(No such file"):
        list(data.val_dataloader())


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "train", ("cat/1.jpg", "dog/1.jpg"))
    (folder / "dog").chmod(0)
    with pytest.raises(UserError, match="dog: cannot be listed"):
        list_images(folder)
    (folder / "dog").chmod(0o700)


def test_a_damaged_tar_file(tmp_path: Path) -> None:
    archive = pack(write(tmp_path / "train"), tmp_path / "train.tar", "train")
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"train\.tar: no images: not a tar file, or damaged"):
        ClassFolders(archive)


def test_images_without_classes_serve_where_no_label_is_needed(tmp_path: Path) -> None:
    write(tmp_path / "train", ("1.jpg", "2.png", "more/3.webp"))
    write(tmp_path / "val", ("cat/1.jpg", "dog/2.jpg"))
    data = ImageData(str(tmp_path), img_size=16, batch_size=3, num_workers=0)
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    assert (images.shape, targets.tolist()) == ((3, 3, 16, 16), [-1] * 3)
    with pytest.raises(UserError, match=r"train: 2 of 3 images outside class folders, such as 1"):
        _ = data.class_names


def test_file_names_of_any_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    name = os.fsdecode(b"caf\xe9.jpg")
    write(folder, (f"cat/{name}",))
    split = ClassFolders(folder)
    assert split.filename(0) == f"cat/{name}"
    split[0][0].close()


def test_commands_find_the_same_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "photos")
    found = list(Source((str(folder),)).items(None))
    assert found == [{"path": str(folder / name)} for name in SEEN]
    assert "photos: left out 2 .heic, 1 .txt, 1 without ending" in caplog.text


def test_images_with_classes_of_pixels(tmp_path: Path) -> None:
    images, masks = (tmp_path / part / "training" for part in ("images", "annotations"))
    names = ("a.WEBP", "town/b.bmp", "town/c.jpg", ".hidden/d.jpg", "._a.jpg", "e.txt")
    write(images, names)
    write(masks, ("a.png", "town/b.PNG", "._a.png"))
    pairs, missing, unused = find_pairs(tmp_path, "training")
    assert unused == {"file that is no image": (1, f"{images}: 1 .txt")}
    assert [(image.name, mask.name) for image, mask in pairs] == [
        ("a.WEBP", "a.png"),
        ("b.bmp", "b.PNG"),
    ]
    assert missing["missing annotation"] == (1, str(masks / "town" / "c.png"))
    write(images, ("a.jpg",))
    write(masks, ("b.tif",))
    _, _, unused = find_pairs(tmp_path, "training")
    assert unused["file that is no annotation"] == (1, f"{masks}: 1 .tif")
    assert unused["image with the annotation of another"].first == f"{images / 'a.jpg'}, as a.WEBP"


def test_reading_in_workers(tmp_path: Path) -> None:
    """Every process opens the tar file itself."""
    folder = write(tmp_path / "folder" / "train", ("cat/1.jpg", "cat/2.png", "dog/3.webp"))
    pack(folder, tmp_path / "train.tar", "train")
    batches = []
    for root in (tmp_path / "folder", tmp_path):
        data = ImageData(
            str(root), val_split="train", img_size=16, eval_batch_size=3, num_workers=2
        )
        data.setup("validate")
        batches.append(next(iter(data.val_dataloader())))
    assert torch.equal(batches[0][0], batches[1][0])
    assert np.array_equal(batches[0][1], batches[1][1])


def cut(archive: Path, member: int) -> bytes:
    """A tar file up to a member."""
    with tarfile.open(archive) as tar:
        return archive.read_bytes()[: tar.getmembers()[member].offset]


def test_a_tar_file_that_is_cut_off_between_two_files(tmp_path: Path, caplog) -> None:
    archive = pack(write(tmp_path / "train"), tmp_path / "train.tar", "train")
    whole = archive.read_bytes()
    assert len(ClassFolders(archive)) == 7
    assert not caplog.messages
    archive.write_bytes(cut(archive, -1))
    ClassFolders(archive)
    (message,) = caplog.messages
    assert message == f"{archive} lacks its end marker: files at its end may be cut off"
    caplog.clear()
    archive.write_bytes(whole + whole)  # as `cat` puts them together
    assert len(ClassFolders(archive)) == 7
    assert caplog.messages == [f"{archive} goes on after its end marker: what follows is not read"]


def test_a_tar_file_within_another_that_is_cut_off(tmp_path: Path, caplog) -> None:
    folder = write(tmp_path / "train")
    inner = pack(folder / "cat", tmp_path / "cat.tar", ".")
    inner.write_bytes(cut(inner, -1))
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(inner, arcname="cat.tar")
        tar.add(folder / "dog", arcname="dog")
    ClassFolders(tmp_path / "train.tar")
    (message,) = caplog.messages
    assert "train.tar: cat.tar in it lacks its end marker" in message


@pytest.mark.parametrize("damage", [b"", b"\xff" * 512])
def test_a_tar_file_whose_later_members_are_damaged(damage, tmp_path: Path) -> None:
    archive = pack(write(tmp_path / "train"), tmp_path / "train.tar", "train")
    begin, whole = cut(archive, 5), archive.read_bytes()
    rest = whole[len(begin) + 512 :] if damage else whole[len(begin) :][:200]
    archive.write_bytes(begin + damage + rest)
    with pytest.raises(UserError, match=rf"damaged \(no member begins at byte {len(begin):,}\)"):
        ClassFolders(archive)


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


def test_no_pickle_in_a_tar_file_or_beside_one_is_read(tmp_path: Path, monkeypatch) -> None:
    """Shards hold further values of a sample as pickles; timm keeps one beside a tar file."""
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "train", ("cat/1.jpg", "dog/1.jpg"))
    for name in ("cat/1.pkl", "cat/1.pyd", "cat/1.pth", "cat/1.pickle", "cat/1.npy"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    archive = pack(folder, tmp_path / "train.tar", ".")
    for name in ("train_tarinfos.pickle", "_train_tarinfos.pickle", "class_map.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "val.tar").write_bytes(archive.read_bytes())
    for root, dataset in ((tmp_path, ""), (archive, "name"), (tmp_path, "name")):
        with suppress(UserError):
            data = ImageData(str(root), dataset=dataset, batch_size=1, num_workers=0, img_size=16)
            data.setup("fit")
            next(iter(data.train_dataloader()))
        assert not Path("ran").exists()
    assert ClassFolders(archive).left_out.total() == 5
