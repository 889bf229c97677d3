"""Image files of any channel count: their content is read, or an error names the file."""

from __future__ import annotations

import io
import logging
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim.data.arrays import read_array
from fastvim.data.pixels import PictureReader
from fastvim.data.remote import UnreadableFileError
from fastvim.errors import UserError

tifffile = pytest.importorskip("tifffile")

IMAGE = np.random.default_rng(0).integers(0, 60000, (5, 12, 16)).astype(np.uint16)
PLAIN = {"photometric": "minisblack"}


def tiff(path: Path, array: np.ndarray, **settings) -> str:
    tifffile.imwrite(path, array, **settings)
    return str(path)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "int32", "float32", "float64", "bool"])
def test_npy(tmp_path: Path, dtype: str) -> None:
    array = IMAGE.astype(dtype)
    np.save(tmp_path / "a.npy", array)
    read = read_array(str(tmp_path / "a.npy"))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype
    np.save(tmp_path / "grey.npy", array[0])
    np.testing.assert_array_equal(read_array(str(tmp_path / "grey.npy")), array[:1])


def test_a_url(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    np.save(tmp_path / "a.npy", IMAGE)
    np.testing.assert_array_equal(read_array((tmp_path / "a.npy").as_uri()), IMAGE)


@pytest.mark.parametrize(
    ("array", "settings", "expected"),
    [
        (IMAGE, PLAIN, IMAGE),
        (IMAGE, {**PLAIN, "metadata": None}, IMAGE),  # pages and no description
        (IMAGE, {"metadata": {"axes": "CYX"}, **PLAIN}, IMAGE),
        (IMAGE, {"compression": "zlib", **PLAIN}, IMAGE),
        (IMAGE, {"compression": "lzw", **PLAIN}, IMAGE),
        (IMAGE, {"compression": "zstd", **PLAIN}, IMAGE),
        (65535 - IMAGE, {"photometric": "miniswhite"}, IMAGE),
        (IMAGE, {"byteorder": ">", **PLAIN}, IMAGE),
        (IMAGE, {"bigtiff": True, **PLAIN}, IMAGE),
        (IMAGE, {"imagej": True, "metadata": {"axes": "CYX"}}, IMAGE),
        (IMAGE[0], PLAIN, IMAGE[:1]),
        (IMAGE[:3].transpose(1, 2, 0), {"photometric": "rgb"}, IMAGE[:3]),
        (IMAGE[:3], {"photometric": "rgb", "planarconfig": "separate"}, IMAGE[:3]),
        (IMAGE.transpose(1, 2, 0), {"planarconfig": "contig", **PLAIN}, IMAGE),
        (IMAGE.astype(np.float32), PLAIN, IMAGE),
        (IMAGE[:, :1], {"metadata": {"axes": "CYX"}, **PLAIN}, IMAGE[:, :1]),  # one row
    ],
)
def test_tiff(tmp_path: Path, array: np.ndarray, settings: dict, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(read_array(tiff(tmp_path / "a.tif", array, **settings)), expected)


@pytest.mark.parametrize(
    ("array", "axes", "expected"),
    [
        (IMAGE, "CYX", IMAGE),
        (IMAGE[0], "YX", IMAGE[:1]),
        (IMAGE[None, :, None], "TCZYX", IMAGE),
        (IMAGE[:3].transpose(1, 2, 0), "YXS", IMAGE[:3]),
    ],
)
def test_ome_tiff(tmp_path: Path, array: np.ndarray, axes: str, expected: np.ndarray) -> None:
    photometric = "rgb" if axes == "YXS" else "minisblack"
    settings = {"photometric": photometric, "metadata": {"axes": axes}, "ome": True}
    path = tiff(tmp_path / "a.ome.tif", np.ascontiguousarray(array), **settings)
    np.testing.assert_array_equal(read_array(path), expected)


@pytest.mark.parametrize(
    ("array", "axes", "told"),
    [
        (IMAGE, "ZYX", r"axes T 1, Z 5, C 1, Y 12, X 16, S 1: expected Y, X and at most one"),
        (IMAGE, "TYX", r"axes T 5, "),
        (np.stack([IMAGE, IMAGE]), "ZCYX", r"axes T 1, Z 2, C 5, Y 12, X 16"),
    ],
)
def test_stacks_are_refused(tmp_path: Path, array: np.ndarray, axes: str, told: str) -> None:
    settings = {"photometric": "minisblack", "metadata": {"axes": axes}, "ome": True}
    path = tiff(tmp_path / "a.ome.tiff", array, **settings)
    with pytest.raises(UnreadableFileError, match=f"{path}: unreadable image .{told}"):
        read_array(path)


@pytest.mark.parametrize("metadata", [{}, None])
def test_channels_written_one_by_one(tmp_path: Path, metadata: dict | None) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for channel in IMAGE:
            writer.write(channel, metadata=metadata, compression="lzw", **PLAIN)
    np.testing.assert_array_equal(read_array(str(path)), IMAGE)
    for channel in IMAGE:
        tifffile.imwrite(tmp_path / "b.tif", channel, append=True, metadata=metadata, **PLAIN)
    np.testing.assert_array_equal(read_array(str(tmp_path / "b.tif")), IMAGE)


def test_scenes_of_an_ome_tiff_are_no_channels(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for scene in IMAGE[:2]:
            writer.write(scene, metadata={"axes": "YX"}, **PLAIN)
    with pytest.raises(UnreadableFileError, match="2 images of different kinds: expected one"):
        read_array(str(path))


@pytest.mark.parametrize("colours", ["rgb", "ycbcr"])
def test_jpeg_in_a_tiff(tmp_path: Path, colours: str) -> None:
    colour = np.full((16, 16, 3), (200, 60, 90), np.uint8)
    settings = {"compression": "jpeg", "compressionargs": {"outcolorspace": colours}}
    tiff(tmp_path / "a.tif", colour, photometric="rgb", **settings)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages[0].photometric.name == colours.upper()
    read = read_array(str(tmp_path / "a.tif"))
    assert read.shape == (3, 16, 16)
    picture = np.asarray(PictureReader()(tmp_path / "a.tif"))
    for found in (read.transpose(1, 2, 0), picture):
        assert np.abs(found.astype(int) - colour).max() < 6


def test_ycbcr_without_jpeg_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tiff(path, np.full((16, 16, 3), 90, np.uint8), photometric="ycbcr", subsampling=(1, 1))
    with pytest.raises(UnreadableFileError, match="YCbCr colours without JPEG: expected RGB"):
        read_array(str(path))


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path: Path, ending: str, orientation: int) -> None:
    path = tmp_path / f"a.{ending}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray((IMAGE[0] >> 8).astype(np.uint8)).save(path, exif=exif)
    read = read_array(str(path))
    np.testing.assert_array_equal(read[0], np.asarray(PictureReader("L")(path)))
    assert read.strides == np.ascontiguousarray(read).strides


def test_too_many_pixels(tmp_path: Path) -> None:
    Image.fromarray(IMAGE[0]).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", IMAGE)
    tiff(tmp_path / "a.tif", IMAGE, **PLAIN)
    for name in ("a.png", "a.npy", "a.tif"):
        read_array(str(tmp_path / name), max_pixels=192)
        with pytest.raises(UserError, match="16x12 = 192 pixels; expected at most max_pixels 191"):
            read_array(str(tmp_path / name), max_pixels=191)


def test_imagecodecs_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiff(tmp_path / "a.tif", IMAGE, compression="lzw", **PLAIN)

    def asarray(*unused: object, **unused_too: object) -> None:
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", asarray)
    with pytest.raises(UserError, match=r"a.tif: .*imagecodecs.*fastvim\[microscopy\]") as caught:
        read_array(path)
    assert type(caught.value) is UserError  # on_error="skip" does not skip it


def test_several_images_in_a_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for image in (IMAGE, IMAGE[:, ::2]):
            writer.write(image, metadata={}, **PLAIN)
    with pytest.raises(UnreadableFileError, match="2 images of different kinds: expected one"):
        read_array(str(path))


def test_missing_files_of_an_ome_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    settings = {"photometric": "minisblack", "metadata": {"axes": "CYX"}, "ome": True}
    tiff(path, IMAGE, **settings)
    with tifffile.TiffFile(path) as file:
        description = file.ome_metadata
    page = '<TiffData FirstC="4" IFD="0"><UUID FileName="b.ome.tif">urn:uuid:b</UUID></TiffData>'
    start = description.index("<TiffData")
    end = description.index("</Pixels>")
    described = '<TiffData FirstC="0" IFD="0" PlaneCount="4"/>' + page
    described = description[:start] + described + description[end:]
    tiff(path, IMAGE[:4], description=described.encode(), metadata=None, **PLAIN)
    with pytest.raises(UnreadableFileError, match="missing pages"):
        read_array(str(path))


@pytest.mark.parametrize("settings", [{}, {"metadata": None}, {"compression": "zlib"}])
def test_a_tiff_cut_short(tmp_path: Path, settings: dict) -> None:
    path = tmp_path / "a.tif"
    tiff(path, IMAGE, **PLAIN, **settings)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 100, 97):
        path.write_bytes(whole[:size])
        with pytest.raises(UnreadableFileError, match=f"^{path}: unreadable image "):
            read_array(str(path))


def test_a_cut_tiff_is_noticed_without_a_log(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tiff(path, IMAGE, metadata=None, **PLAIN)
    path.write_bytes(path.read_bytes()[:-300])  # its last page
    logging.disable()
    try:
        with pytest.raises(UnreadableFileError, match="cut off after 4 pages"):
            read_array(str(path))
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 4)])
def test_png(tmp_path: Path, mode: str, channels: int) -> None:
    array = IMAGE[:channels].transpose(1, 2, 0).squeeze()
    array = array if mode == "I;16" else (array >> 8).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    read = read_array(str(tmp_path / "a.png"))
    assert read.shape == (channels, 12, 16)
    np.testing.assert_array_equal(read.transpose(1, 2, 0).squeeze(), array)


def test_palettes_and_bits_become_values(tmp_path: Path) -> None:
    colour = Image.fromarray(np.full((4, 4, 3), (10, 200, 30), np.uint8))
    bits = Image.fromarray(np.eye(4, dtype=bool))
    for ending in ("png", "tif"):
        colour.quantize(4).save(tmp_path / f"p.{ending}")
        assert read_array(str(tmp_path / f"p.{ending}"))[:, 0, 0].tolist() == [10, 200, 30]
        bits.save(tmp_path / f"b.{ending}")
        assert read_array(str(tmp_path / f"b.{ending}"))[0, 0].tolist() == [255, 0, 0, 0]
    bits.save(tmp_path / "w.tif", compression="group4")  # where 0 is white
    assert read_array(str(tmp_path / "w.tif"))[0, 0].tolist() == [255, 0, 0, 0]


def test_palettes_of_several_channels_are_refused(tmp_path: Path) -> None:
    palette = np.random.default_rng(0).integers(0, 65536, (3, 256)).astype(np.uint16)
    indices = (IMAGE[:2] >> 8).astype(np.uint8)
    path = tiff(tmp_path / "a.tif", indices, photometric="palette", colormap=palette)
    with pytest.raises(UnreadableFileError, match="2 channels of palette colours: expected one"):
        read_array(path)


def test_jpeg(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 10, 3), 77, np.uint8)).save(tmp_path / "A.JPG")
    read = read_array(str(tmp_path / "A.JPG"))
    assert (read.shape, int(read[0, 0, 0])) == ((3, 8, 10), 77)


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path(BOMBED).touch, ())


BOMBED = "bombed"


def test_no_pickle_is_ever_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("object.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    Path("pickle.npy").write_bytes(pickle.dumps(Bomb()))
    for name in ("object.npy", "pickle.npy"):
        with pytest.raises(UnreadableFileError, match=f"^{name}: unreadable image"):
            read_array(name)
    assert not Path(BOMBED).exists()


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (IMAGE[None], r"shape \(1, 5, 12, 16\): expected \(channels, height, width\)"),
        (IMAGE[:, :0], r"shape \(5, 0, 16\)"),
        (IMAGE[0, 0], r"shape \(16,\)"),
        (IMAGE.astype(complex), "type complex128: expected integers or real numbers"),
        (IMAGE.astype(str), "type <U5"),
        (np.where(IMAGE > 9, np.nan, 1.0), "values that are not finite"),
    ],
)
def test_arrays_that_are_no_images(tmp_path: Path, array: np.ndarray, told: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UnreadableFileError, match=f"a.npy: unreadable image .{told}"):
        read_array(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("name", ["a.npy", "a.tif", "a.png"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    if name == "a.npy":
        np.save(buffer, IMAGE)
    elif name == "a.tif":
        tifffile.imwrite(buffer, IMAGE, **PLAIN)
    else:
        Image.fromarray((IMAGE[:3] >> 8).astype(np.uint8).transpose(1, 2, 0)).save(buffer, "png")
    for data in (b"", b"no image", buffer.getvalue()[:-200]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadableFileError, match=f"{name}: unreadable image"):
            read_array(str(tmp_path / name))


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.czi", "npy", "s3://bucket/a.npz?x=.npy"):
        with pytest.raises(UserError, match=r"expected a file ending in \.npy, \.tif") as caught:
            read_array(name)
        assert not isinstance(caught.value, UnreadableFileError)  # no row to skip
    path = tiff(tmp_path / "a.tif", IMAGE, **PLAIN)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match=r'pip install "fastvim\[microscopy\]"') as caught:
        read_array(path)
    assert not isinstance(caught.value, UnreadableFileError)
