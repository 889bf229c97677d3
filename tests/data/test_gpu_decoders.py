"""JPEG files decoded in batches: nvJPEG's pixels beside Pillow's."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from jpeg_files import broken
from PIL import Image

from fastvim.data.finishing import CPU
from fastvim.data.gpu.decoders import Encoded, _OnGPU, make_decoder, why_not_decoded

CUDA = torch.device("cuda")
needs_decoder = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(why_not_decoded()), reason="needs a GPU and nvJPEG"
)


def jpeg(seed: int, high: int, wide: int, **settings: Any) -> bytes:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (high // 9 + 2, wide // 9 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((wide, high))
    if settings.pop("grey", False):
        image = image.convert("L")
    file = BytesIO()
    image.save(file, "JPEG", quality=90, **settings)
    return file.getvalue()


def encoded(contents: list[bytes], device: torch.device) -> Encoded:
    sizes = np.array([Image.open(BytesIO(content)).size[::-1] for content in contents])
    room = sizes.prod(1) * 3
    lengths = np.array([len(content) for content in contents])
    return Encoded(
        torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8),
        lengths.cumsum() - lengths,
        lengths,
        torch.zeros(int(room.sum()), dtype=torch.uint8, device=device),
        room.cumsum() - room,
        sizes,
    )


def image_of(files: Encoded, number: int) -> np.ndarray:
    high, wide = files.sizes[number]
    begin = files.places[number]
    return files.pixels[begin : begin + high * wide * 3].view(high, wide, 3).cpu().numpy()


def decode(contents: list[bytes], decoder: Any = None) -> tuple[Encoded, list[int]]:
    files = encoded(contents, CUDA)
    failed = (decoder or make_decoder(CUDA))(files)
    torch.cuda.synchronize()
    return files, failed


@pytest.mark.gpu
@needs_decoder
@pytest.mark.parametrize("settings", [{"subsampling": s} for s in (0, 1, 2)] + [{"grey": True}])
def test_pixels_are_those_of_pillow(settings: dict[str, Any]) -> None:
    sizes = [(375, 500), (64, 64), (33, 47), (1, 1), (7, 300), (480, 640)]
    contents = [jpeg(n, *size, **settings) for n, size in enumerate(sizes)]
    files, failed = decode(contents)
    assert failed == []
    for number, content in enumerate(contents):
        expected = np.asarray(Image.open(BytesIO(content)).convert("RGB")).astype(int)
        apart = np.abs(image_of(files, number).astype(int) - expected)
        assert apart.mean() < 0.05
        assert apart.max() <= 2


@pytest.mark.gpu
@needs_decoder
def test_damaged_files_alone_are_refused() -> None:
    decoder = _OnGPU()
    contents = [jpeg(number, 90, 120) for number in range(5)]
    contents[2] = broken(contents[2])
    files, failed = decode(contents, decoder)
    assert failed == [2]
    expected = np.asarray(Image.open(BytesIO(contents[4]))).astype(int)
    assert np.abs(image_of(files, 4) - expected).mean() < 0.05
    files, failed = decode(contents[:2], decoder)  # goes on, with batches of another size
    assert failed == []
    expected = np.asarray(Image.open(BytesIO(contents[1]))).astype(int)
    assert np.abs(image_of(files, 1) - expected).mean() < 0.05


def test_pillow_refuses_damaged_files_alone() -> None:
    contents = [jpeg(number, 20, 30) for number in range(3)]
    contents[1] = broken(contents[1])
    files = encoded(contents, CPU)
    assert make_decoder(CPU)(files) == [1]
    assert (image_of(files, 2) == np.asarray(Image.open(BytesIO(contents[2])))).all()
