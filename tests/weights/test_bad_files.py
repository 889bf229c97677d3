"""Files that do not fit, hold no weights, or are damaged: one clear line, and nothing executed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_weights import assert_equal, create, published
from torch import nn

from fastvim import UserError
from fastvim.models import create_model
from fastvim.weights import convert, load_model, load_weights, read, save

# Weights that do not fit.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"depth": 3}, ("missing", "blocks.2.", "and 9 more")),
        ({"depth": 1}, ("unexpected", "blocks.1.")),
        ({"embed_dim": 24}, ("other shapes", "patch_embed.proj.weight (16, 3, 8, 8)", "(24, 3")),
        ({"in_chans": 4}, ("patch_embed.proj.weight (16, 3, 8, 8) for (16, 4, 8, 8)",)),
        ({"num_classes": 7}, ("head.weight (5, 16) for (7, 16)", "head.bias (5,) for (7,)")),
        ({"norm_after_ssm": False}, ("unexpected", "blocks.0.mixer.norm.weight")),
        ({"init_layer_scale": 0.1}, ("missing", "blocks.0.mixer.gamma")),
        ({"class_token": True, "pooling": "none"}, ("class token",)),
    ],
)
@pytest.mark.parametrize("names", [published, nn.Module.state_dict])
def test_the_message_names_keys_and_shapes(tmp_path, options, named, names):
    torch.save(names(create()), tmp_path / "weights.pth")
    model = create(seed=1, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, tmp_path / "weights.pth")
    message = str(caught.value)
    assert all(part in message for part in named), message
    assert "\n" not in message
    assert_equal(model.state_dict(), before)  # not half loaded


def test_weights_of_another_family(tmp_path):
    torch.save(create_model("resnet10t").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet\.pth.*missing.*unexpected"):
        load_weights(create(), tmp_path / "resnet.pth")
    for attempt in (
        lambda: convert(tmp_path / "resnet.pth", tmp_path / "ours.safetensors"),
        lambda: load_model(path=tmp_path / "resnet.pth"),
        load_model,
        lambda: load_model("resnet10", tmp_path / "resnet.pth"),
    ):
        with pytest.raises(UserError):
            attempt()
    model, _ = load_model("resnet10t", tmp_path / "resnet.pth")
    assert_equal(model.state_dict(), read(tmp_path / "resnet.pth").state)


@pytest.mark.parametrize("scan_path", ["row", "column"])
@pytest.mark.parametrize(
    ("position", "message"), [(torch.zeros(1, 15, 16), "square"), (None, "missing pos_embed")]
)
def test_positions_that_do_not_fit(tmp_path, scan_path, position, message):
    state = {**published(create()), "pos_embed": position}
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        load_weights(create(scan_path=scan_path), tmp_path / "weights.pth")


def test_one_direction_without_the_other(tmp_path):
    state = published(create())
    del state["layers.1.mixer.A_b_log"]
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"layers\.1\.mixer\.A_log.*layers\.1\.mixer\.A_b_log"):
        load_weights(create(), tmp_path / "half.pth")


@pytest.mark.parametrize("classes", [5, 7])
@pytest.mark.parametrize("with_head", [True, False])
def test_a_new_head(tmp_path, classes, with_head):
    source = create()
    state = published(source)
    if not with_head:
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
    torch.save(state, tmp_path / "weights.pth")
    model = create(seed=1, num_classes=classes)
    own = model.head.weight.detach().clone()
    load_weights(model, tmp_path / "weights.pth", new_head=True)
    reused = with_head and classes == 5
    assert torch.equal(model.head.weight, source.head.weight if reused else own)
    assert torch.equal(model.blocks[1].mixer.A_log, source.blocks[1].mixer.A_log)


def test_another_grid_is_resized(tmp_path):
    source, model = create(), create(seed=1, img_size=(40, 24))
    torch.save(published(source), tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    with torch.no_grad():
        x = torch.randn(1, 3, 40, 24)
        torch.testing.assert_close(model(x), source(x))


# Damaged files.


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    whole = {
        "empty": b"",
        "a byte": content[:1],
        "the first part": content[: len(content) // 2],
        "all but the last byte": content[:-1],
        "noise": np.random.default_rng(0).bytes(5000),
        "text": b"<html>404 Not Found</html>",
        "noise inside": content[:100] + np.random.default_rng(0).bytes(1500) + content[1600:],
    }
    path.write_bytes(whole[kind])


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "a byte",
        "the first part",
        "all but the last byte",
        "noise",
        "text",
        "noise inside",
    ],
)
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damaged_files(tmp_path, form, kind):
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.ckpt")
    if form == "safetensors":
        save(path, create().state_dict(), {})
    else:
        torch.save(published(create()), path, _use_new_zipfile_serialization=form == "zip")
    damage(path, kind)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"", "weights.pth", "is damaged: it is empty"),
        (b"", "weights.safetensors", "is damaged: it is empty"),
        (b"hello world\n" * 20, "weights.pth", "is a text file, not weights"),
        (b"hello world\n" * 20, "weights.safetensors", "is a text file, not weights"),
        (b"e\n", "weights.pth", "is a text file, not weights"),
        (b"<!DOCTYPE html><html>", "weights.ckpt", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "weights.pth", "is a pointer of Git LFS"),
        (b"\x89PNG\r\n\x1a\n\0", "weights.pth", "is an image, not weights"),
        (bytes(10000), "weights.pth", "is damaged: it begins with zeros"),
        (b"PK\x03\x04" + bytes(100), "weights.pth", "is damaged: it ends before its content does"),
        (b"\xe8\x01\xff" * 9, "weights.pth", "is damaged or no checkpoint: its bytes are not"),
    ],
)
def test_a_file_of_something_else_is_called_by_what_it_is(tmp_path, content, name, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name} {words}")


def test_safetensors_under_another_name(tmp_path):
    save(tmp_path / "ours.safetensors", create().state_dict(), {})
    (tmp_path / "ours.safetensors").rename(tmp_path / "ours.pth")
    with pytest.raises(UserError, match=r"ours\.pth is a file of safetensors"):
        read(tmp_path / "ours.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("seed", range(4))
def test_files_with_a_few_wrong_bytes(tmp_path, seed):
    """They load, or are refused as damaged; nothing else is raised."""
    path, generator = tmp_path / "weights.ckpt", np.random.default_rng(seed)
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, path)
    forms = [path.read_bytes()]
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    forms.append(path.read_bytes())
    for content in forms:
        for _ in range(100):
            broken = bytearray(content)
            for place in generator.integers(0, min(1200, len(content)), 3):
                broken[place] = generator.integers(256)
            path.write_bytes(bytes(broken))
            with contextlib.suppress(UserError):
                read(path)


def test_a_flipped_bit_in_our_weights_is_noticed(tmp_path):
    """In tensors and in what the metadata say; names and shapes are refused by what they break."""
    path, generator = tmp_path / "weights.safetensors", np.random.default_rng(0)
    save(path, create().state_dict(), {"model": "fastvim_tiny_patch16_224", "classes": ["a"] * 99})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    metadata = content.index(b'\\"classes')
    for first, last, count in ((start, len(content), 200), (metadata, metadata + 400, 50)):
        for place in generator.integers(first, last, count):
            broken = bytearray(content)
            broken[place] ^= 1 << int(generator.integers(8))
            path.write_bytes(bytes(broken))
            with pytest.raises(UserError, match=r"weights\.safetensors is damaged"):
                read(path)
    path.write_bytes(content)
    read(path)


class Malicious:
    """Runs a command when it is unpickled without care."""

    def __init__(self, touch: Path) -> None:
        self.touch = touch

    def __reduce__(self):
        return Path.touch, (self.touch,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path, zipped):
    target = tmp_path / "owned"
    content = {**published(create()), "extra": Malicious(target)}
    path = tmp_path / "weights.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"weights\.ckpt wants to call pathlib\.Path\.touch: nothing"
    ) as caught:
        read(path)
    assert "weights_only" not in str(caught.value)  # torch's advice to execute the file
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epoch": 3},
        [torch.ones(2)],
        torch.ones(2),
        {"model": None},
        {"state_dict": torch.ones(2)},
        {1: torch.ones(2)},
    ],
)
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt.*state dict"):
        read(tmp_path / "weights.pt")


def test_no_file(tmp_path):
    for path in (tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(UserError, match="no checkpoint at"):
            read(path)
