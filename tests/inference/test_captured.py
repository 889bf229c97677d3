"""The predictor: what it computes, what it leaves alone, and the graph where there is a GPU."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fastvim.inference import Predictor
from fastvim.models import FastVim

SHAPE = (4, 3, 32, 24)
SCALE = np.float32(0.5)
# Between a CPU and a GPU.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(autouse=True)
def exact_convolutions():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def tiny() -> FastVim:
    torch.manual_seed(0)
    return FastVim(img_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=5)


def expected(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(images)


def predictor(model: nn.Module, device: str, **options) -> Predictor:
    return Predictor(model, SHAPE, **{"dtype": torch.float32, "device": device, **options})


def test_it_predicts_what_the_model_does(device):
    model = tiny()
    served = predictor(model, device)
    assert served.captured == (device == "cuda")
    assert (served.reason is None) == served.captured
    model = model.to(device)
    for seed in range(3):
        images = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(device)
        torch.testing.assert_close(served(images), expected(model, images))


def test_the_callers_model_is_left_alone(device):
    model = tiny().train()
    served = predictor(model, device, dtype=torch.bfloat16)
    assert model.training
    assert not served.model.training
    parameter = next(model.parameters())
    assert (parameter.dtype, parameter.device.type) == (torch.float32, "cpu")
    assert next(served.model.parameters()).dtype == torch.bfloat16


def test_a_model_that_is_given_away_is_the_one_that_serves(device):
    model = tiny()
    served = predictor(model, device, copy_model=False)
    assert served.model is model
    assert not model.training


@pytest.mark.parametrize("count", [1, 3, 4])
def test_fewer_images_than_the_batch(device, count):
    model, images = tiny(), torch.randn(SHAPE)
    served = predictor(model, device)
    served(torch.full(SHAPE, torch.nan))  # what the buffer held before is of no consequence
    output = served(images[:count])
    torch.testing.assert_close(output.cpu(), expected(model, images[:count]), **CLOSE)


@pytest.mark.parametrize(
    "shape", [(5, 3, 32, 24), (0, 3, 32, 24), (4, 3, 24, 32), (4, 1, 32, 24), (3, 32, 24)]
)
def test_images_of_another_shape(device, shape):
    served = predictor(tiny(), device)
    with pytest.raises(ValueError, match=r"expected \(1 to 4, 3, 32, 24\)") as info:
        served(torch.zeros(shape))
    assert str(shape) in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("shape", [(3, 32, 24), (0, 3, 32, 24), (4, 3, -1, 24)])
def test_a_shape_of_no_images(shape):
    with pytest.raises(ValueError, match="each 1 or more"):
        Predictor(tiny(), shape)


def test_no_warmup():
    with pytest.raises(ValueError, match="warmup=0"):
        Predictor(tiny(), SHAPE, warmup=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.float16])
def test_images_of_any_dtype(device, dtype):
    model = tiny()
    images = (torch.rand(SHAPE) * 9).to(dtype)
    output = predictor(model, device)(images)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.cpu(), expected(model, images.float()), **CLOSE)


def test_outputs_are_the_callers_own(device):
    served = predictor(tiny(), device)
    first, second = torch.randn(2, *SHAPE)
    output = served(first)
    kept = output.clone()
    served(second)
    assert torch.equal(output, kept)
    output.requires_grad_().sum().backward()  # an inference tensor would refuse
    assert output.grad is not None


def test_weights_loaded_in_place_are_seen(device):
    model, images = tiny(), torch.randn(SHAPE)
    served = predictor(model, device)
    before = served(images)
    torch.manual_seed(1)
    other = FastVim(img_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=5)
    served.model.load_state_dict(other.state_dict())
    after = served(images).cpu()
    torch.testing.assert_close(after, expected(other, images), **CLOSE)
    assert not torch.allclose(after, before.cpu(), rtol=1e-2)


def test_autocast_is_the_predictors_own(device):
    model, images = tiny(), torch.randn(SHAPE)
    with torch.autocast(device, dtype=torch.bfloat16):
        plain = predictor(model, device)
        assert plain(images).dtype == torch.float32
    torch.testing.assert_close(plain(images).cpu(), expected(model, images), **CLOSE)
    low = predictor(model, device, autocast=torch.bfloat16)
    assert low(images).dtype == torch.bfloat16
    assert next(low.model.parameters()).dtype == torch.float32


def test_made_and_used_under_inference_mode(device):
    model, images = tiny(), torch.randn(SHAPE)
    with torch.inference_mode():
        served = predictor(model, device)
        inside = served(images)
    outside = served(images)
    assert torch.equal(inside, outside)
    assert not outside.is_inference()


def test_replay_computes_on_the_static_images(device):
    model, images = tiny(), torch.randn(SHAPE)
    served = predictor(model, device)
    served.images.copy_(images)
    output = served.replay()
    torch.testing.assert_close(output.cpu(), expected(model, images), **CLOSE)
    assert output.shape == (4, 5)


def test_several_outputs(device):
    model = timm.create_model(
        "fastvim_tiny_patch16_224", img_size=32, embed_dim=16, depth=3, features_only=True
    )
    served, images = predictor(model, device), torch.randn(SHAPE)
    maps = served(images[:2])
    assert isinstance(maps, list)
    for actual, wanted in zip(maps, expected(model, images[:2]), strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, **CLOSE)


def test_channels_last(device):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    served = predictor(model, device, memory_format=torch.channels_last)
    images = torch.randn(SHAPE)
    assert served.images.is_contiguous(memory_format=torch.channels_last)
    assert served.model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[2].weight.is_contiguous()
    torch.testing.assert_close(served(images).cpu(), expected(model, images), **CLOSE)


class Scaled(nn.Module):
    """Uses a NumPy constant, at which torch.compile fails under inference mode."""

    def forward(self, images):
        return images.flatten(1) * SCALE


def test_compiled(device, monkeypatch):
    if device == "cpu":  # without the C++ compiler, which takes its time
        plainly = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", plainly)
    model, images = nn.Sequential(Scaled(), nn.Linear(3 * 32 * 24, 5)), torch.randn(SHAPE)
    with torch.inference_mode():
        served = predictor(model, device, compile=True)
        inside = served(images)
    torch.testing.assert_close(inside.cpu(), expected(model, images), **CLOSE)
    # Compiled for this shape alone, and once.
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (4, 2):
            output = served(images[:count] + 1)
            wanted = expected(model, images[:count] + 1)
            torch.testing.assert_close(output.cpu(), wanted, **CLOSE)


def test_a_cpu_has_no_graph_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="fastvim.inference.captured"):
        served = Predictor(tiny(), SHAPE)
    assert served.dtype == torch.float32
    assert served.reason == "CUDA graphs need a CUDA device, not cpu"
    assert [record.getMessage() for record in caplog.records] == [
        f"running eagerly: {served.reason}"
    ]
    assert Predictor(tiny(), SHAPE, capture=False).reason == "capture=False"


@pytest.mark.gpu
def test_defaults_on_a_gpu():
    served = Predictor(tiny(), SHAPE, device="cuda")
    assert (served.captured, served.dtype) == (True, torch.bfloat16)
    assert served.device.index == torch.cuda.current_device()


@pytest.mark.gpu
def test_static_output_is_one_tensor():
    served = predictor(tiny(), "cuda")
    first = served(torch.randn(SHAPE), copy=False)
    assert served(torch.randn(SHAPE), copy=False).data_ptr() == first.data_ptr()


class Reads(nn.Module):
    """Looks at a value on the host, which no graph can hold."""

    def forward(self, images):
        return images * images.mean().item()


@pytest.mark.gpu
def test_a_model_that_cannot_be_captured_runs_eagerly(caplog):
    stream = torch.cuda.current_stream()
    served = predictor(Reads(), "cuda")
    assert not served.captured
    assert "synchronises with the GPU" in served.reason
    assert len(caplog.records) == 1
    assert torch.cuda.current_stream() == stream
    images = torch.randn(SHAPE, device="cuda")
    torch.testing.assert_close(served(images[:2]), images[:2] * images[:2].mean())
    assert predictor(tiny(), "cuda").captured  # the failure leaves nothing behind


@pytest.mark.gpu
def test_a_failing_model_is_no_failing_capture():
    with pytest.raises(RuntimeError):
        predictor(nn.Linear(7, 7), "cuda")
