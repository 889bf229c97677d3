from PIL import Image

from fastvim.benchmark.photographs import draw_folders


def test_different_jpeg_files_in_class_folders(tmp_path):
    sizes = draw_folders(tmp_path, {"train": 3, "val": 2})
    files = sorted(tmp_path.rglob("*.jpg"))
    names = ["train/class0/00000", "train/class0/00002", "train/class1/00001"]
    names += ["val/class0/00004", "val/class1/00003"]
    assert [str(file.relative_to(tmp_path).with_suffix("")) for file in files] == names
    assert [file.stat().st_size for file in sorted(files, key=lambda file: file.stem)] == sizes
    assert all(60_000 < size < 80_000 for size in sizes)
    assert len({file.read_bytes() for file in files}) == 5
    with Image.open(files[0]) as image:
        assert image.size == (500, 375)
        assert image.layer[0][1:3] == (2, 2)  # 4:2:0
