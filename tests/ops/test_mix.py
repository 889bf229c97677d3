"""A mixer's ops in one call of an engine, beside the same ops one by one."""

from __future__ import annotations

import pytest
import torch

from fastvim.layers import Mixer
from fastvim.layers import mixer as layer
from fastvim.ops import Segments, Traversal, dispatch, use_engine

DIM = 40  # channels that fill a block of 64, and run into a second one
WALKS = [("h w", "w"), ("w h", "h"), ("h w", "")]
OPTIONS = [{}, {"norm_after_ssm": False}, {"init_layer_scale": 0.5}, {"d_conv": 3, "d_state": 5}]


@pytest.fixture
def calls(monkeypatch):
    """How often an engine computed all ops at once."""
    found = []
    choose = layer.mix_at_once

    def watch(*arguments):
        function = choose(*arguments)
        found.extend([] if function is None else [function])
        return function

    monkeypatch.setattr(layer, "mix_at_once", watch)
    return found


def mixer_of(**options) -> Mixer:
    torch.manual_seed(0)
    mixer = Mixer(DIM, **options).eval()
    for name, parameter in mixer.named_parameters():
        if parameter.ndim == 1 or name == "D":  # else 1 or 0
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return mixer


def walk(path: str = "w h", pool: str = "h", kept: torch.Tensor | None = None) -> Segments:
    return Traversal(path, pool).over({"h": 5, "w": 9}, kept)


def tokens(length: int = 45) -> torch.Tensor:
    return torch.randn(3, length, DIM, generator=torch.Generator().manual_seed(1))


def both(mixer: Mixer, u: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
    """Without gradients, and with them."""
    with torch.no_grad():
        found = mixer(u, segments)
    return found, mixer(u, segments).detach()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("path", "pool"), WALKS)
def test_one_call_gives_the_bits_of_the_ops(calls, path, pool, options):
    found, expected = both(mixer_of(**options), tokens(), walk(path, pool))
    assert torch.equal(found, expected)
    assert len(calls) == 1


def test_one_call_under_a_mask(calls):
    kept = torch.tensor([[0, 2, 3, 5, 11], [1, 4, 5, 9, 40], [0, 1, 2, 3, 4]])
    found, expected = both(mixer_of(pool_scale=0.25), tokens(5), walk(kept=kept))
    assert torch.equal(found, expected)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_errors_of_one_call_in_lower_precision(calls, dtype):
    """It rounds nothing between the ops, so it errs less than they do."""
    mixer, u = mixer_of().to(dtype), tokens().to(dtype)
    found, separate = both(mixer, u, walk())
    exact = mixer.double()(u.double(), walk()).detach()
    errors = [float((out.double() - exact).abs().max()) for out in (found, separate)]
    assert errors[0] <= 1.2 * errors[1]
    assert len(calls) == 1


def test_inference_mode_and_autocast(calls):
    mixer, u = mixer_of(), tokens()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = mixer(u, walk())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), mixer(u, walk()), atol=0.05, rtol=0.05)
    assert len(calls) == 1


def test_a_hook_on_the_norm_is_called(calls):
    mixer, seen = mixer_of(), []
    mixer.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found, expected = both(mixer, tokens(), walk())
    torch.testing.assert_close(found, expected)
    assert (len(seen), calls) == (2, [])


def test_maxima_are_one_by_one(calls):
    found, expected = both(mixer_of(pooling="max"), tokens(), walk())
    assert torch.equal(found, expected)
    assert calls == []


@torch.no_grad()
def test_another_engine_is_asked_op_by_op(calls):
    mixer, u = mixer_of(), tokens()
    with use_engine("reference"):
        expected = mixer(u, walk())
        assert calls == []
    torch.testing.assert_close(mixer(u, walk()), expected)
    mixer.double()(u.double(), walk())
    assert len(calls) == 1


@torch.no_grad()
def test_without_numba(monkeypatch, calls):
    monkeypatch.setattr(dispatch, "_installed", lambda package: False)
    mixer_of()(tokens(), walk())
    assert calls == []


@torch.no_grad()
def test_transforms_and_tensors_without_data_are_one_by_one(calls):
    mixer, u = mixer_of(), tokens()
    found = torch.func.vmap(lambda one: mixer(one[None], walk())[0])(u)
    torch.testing.assert_close(found, mixer(u, walk()))
    calls.clear()
    assert mixer.to("meta")(u.to("meta"), walk()).shape == u.shape
    assert calls == []
