"""The training step: what it computes, that its check finds errors, and its graph on a GPU."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONV, OURS, VIM
from torch import nn

from fastvim.benchmark import Bench, Case, Settings, check, timing
from fastvim.benchmark.cases import PRECISIONS, create, random_images
from fastvim.benchmark.training import TrainingStep

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def short_groups(monkeypatch):
    monkeypatch.setattr(timing, "GROUP_SECONDS", {"cuda": 1e-3, "cpu": 1e-3})


def tiny_step(dtype="float32", device=CPU, model=None, **options):
    torch.manual_seed(0)
    settings = Settings(device, dtype=dtype, train=True)
    model = (create(OURS, (32, 32)) if model is None else model).to(device).train()
    images = random_images((4, 3, 32, 32), settings)
    return TrainingStep(model, images, settings.precision, **options), settings


def stale(step, name):
    """Let a step read what `name` holds now, as a graph captured over a copy."""
    correct, kept = step._step, getattr(step, name).clone()

    def run():
        written = getattr(step, name)
        setattr(step, name, kept)
        logits = correct()
        setattr(step, name, written)
        return logits

    step._step = run


def accumulate(step):
    """Let a step add to the gradients that it finds, as a graph captured over some."""
    correct, parameters = step._step, list(step.model.parameters())

    def run():
        found = [parameter.grad for parameter in parameters]
        logits = correct()
        for parameter, grad in zip(parameters, found, strict=True):
            if grad is not None:
                parameter.grad += grad
        return logits

    step._step = run


def halve_gradients(step):
    model = step.model
    step._run = lambda images: (out := model(images)) / 2 + out.detach() / 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda step: stale(step, "images"),
        lambda step: stale(step, "classes"),
        accumulate,
        halve_gradients,
    ],
    ids=["images", "classes", "accumulate", "halve"],
)
def test_a_wrong_step_is_found(spoil):
    step, settings = tiny_step()
    assert check.step_error(step, settings) < 1e-5
    assert step.model.training
    spoil(step)
    assert check.step_error(step, settings) > 0.3


def test_a_step_sets_gradients_anew():
    step, _ = tiny_step("amp")
    assert step().dtype == torch.bfloat16
    once = step.model.head.weight.grad.clone()
    step()
    torch.testing.assert_close(step.model.head.weight.grad, once)


def test_images_and_classes_are_written_in_place():
    step, _ = tiny_step()
    images, classes = step.images, step.classes
    torch.testing.assert_close(classes, torch.zeros(4, dtype=torch.long))
    logits, gradient = step.results()
    step.images.normal_()
    step.classes.fill_(1)
    assert check.relative_error(step.results()[0], logits) > 0.1
    assert check.relative_error(step.results()[1], gradient) > 0.1
    step.renew()
    assert step.images is images
    assert step.classes is classes
    assert 0 <= classes.min() <= classes.max() < 5


def test_the_classes_of_another_step():
    step, _ = tiny_step()
    step.renew()
    other = TrainingStep(step.model, step.images, PRECISIONS["float32"], classes=step.classes)
    for result, expected in zip(other.results(), step.results(), strict=True):
        torch.testing.assert_close(result, expected)


def test_capture_needs_a_gpu():
    with pytest.raises(ValueError, match="capture of images on cpu: expected a CUDA device"):
        tiny_step(capture=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "mode"), [*((dtype, "graph") for dtype in PRECISIONS), ("amp", "compiled-graph")]
)
@pytest.mark.parametrize("model", [OURS, VIM, CONV])
def test_rows_of_captured_steps(model, dtype, mode):
    row = Bench(Settings(CUDA, dtype=dtype, train=True, repeats=2)).measure(
        Case(model, (32, 32), 4, mode)
    )
    assert row.failure is None
    assert row.mode_error < row.bound
    assert row.latency_ms > 0


@pytest.mark.gpu
def test_memory_includes_the_pool():
    settings = Settings(CUDA, train=True, check=False, repeats=1)
    eager, graph = (
        Bench(settings).measure(Case(CONV, (256, 256), 64, mode)).memory_gib
        for mode in ("eager", "graph")
    )
    assert graph > 0.9 * eager


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["graph", "compiled-graph"])
def test_a_replay_writes_the_same_tensors_anew(compile):
    step, _ = tiny_step("amp", CUDA, compile=compile, capture=True)
    logits = step()
    grad = step.model.head.weight.grad
    assert logits.isfinite().all()
    before = logits.clone(), grad.clone()
    step()
    torch.testing.assert_close((logits, grad), before)
    step.renew()
    assert step() is logits
    assert step.model.head.weight.grad is grad
    assert check.relative_error(logits, before[0]) > 0.1
    assert check.relative_error(grad, before[1]) > 0.1


@pytest.mark.gpu
def test_a_replay_reads_the_weights():
    step, settings = tiny_step("amp", CUDA, capture=True)
    step.renew()
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter.mul_(0.5)
    logits, gradient = step.results()
    eager = TrainingStep(step.model, step.images, settings.precision, classes=step.classes)
    expected, slope = eager.results()
    assert check.relative_error(logits, expected) < settings.precision.bound
    assert check.relative_error(gradient, slope) < settings.precision.bound


@pytest.mark.gpu
@pytest.mark.parametrize("spoil", [lambda step: stale(step, "images"), halve_gradients])
def test_a_wrong_captured_step_is_found(spoil):
    step, settings = tiny_step("float32", CUDA, capture=True)
    assert check.step_error(step, settings) < 1e-3
    spoil(step)
    assert check.step_error(step, settings) > 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["graph", "compiled-graph"])
def test_dropout_draws_anew_in_every_replay(compile):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.Dropout(), nn.Linear(64, 5))
    step, settings = tiny_step("float32", CUDA, model, compile=compile, capture=True)
    first = step().clone()
    assert not torch.equal(first, step())
    assert check.step_error(step, settings) < 1e-3  # recorded in eval mode, without dropout
    first = step().clone()
    assert not torch.equal(first, step())  # and in train mode again
