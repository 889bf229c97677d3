"""Training step and loop: what they compute, that checks find errors, and graphs on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import CONV, OURS, VIM
from torch import nn

from fastvim.benchmark import Bench, Case, Settings, check, timing
from fastvim.benchmark.cases import PRECISIONS, create, random_images
from fastvim.benchmark.training import TrainingLoop, TrainingStep

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


def tiny_loop(dtype="float32", device=CPU, **options):
    step, settings = tiny_step(dtype, device)
    return TrainingLoop(step.model, step.images, step.classes, settings.precision, **options)


@pytest.mark.parametrize(
    ("device", "capture"),
    [
        (CPU, False),
        pytest.param(CUDA, False, marks=pytest.mark.gpu),
        pytest.param(CUDA, True, marks=pytest.mark.gpu),
    ],
)
def test_a_loop_takes_the_steps_of_a_task(device, capture):
    """Forward, loss, backward, AdamW with decay of matrices alone, average."""
    loop, twin = (tiny_loop("amp", device, capture=c) for c in (capture, False))
    model, first = twin.model, copy.deepcopy(list(twin.model.parameters()))
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    averages = copy.deepcopy(first)
    for _ in range(3):
        loop()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(twin.images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.float(), twin.classes).backward()
        optimizer.step()
        for average, weight in zip(averages, model.parameters(), strict=True):
            average.data.lerp_(weight.data, 1 - 0.9999)
    for weight, expected in zip(loop.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)
    for average, expected in zip(loop._average.module.parameters(), averages, strict=True):
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)


def test_a_wrong_loop_is_found():
    settings = Settings(CPU, train=True)
    loop = tiny_loop()
    assert check.loop_error(loop, settings) < 1e-6
    images = loop.images.clone()
    loop.differentiate = lambda: TrainingStep(loop.model, images, settings.precision)()
    assert check.loop_error(loop, settings) > 0.3


@pytest.mark.gpu
def test_a_captured_loop_passes_its_check_with_dropout():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.Dropout(), nn.Linear(64, 5))
    step, settings = tiny_step("amp", CUDA, model)
    loop = TrainingLoop(step.model, step.images, step.classes, settings.precision, capture=True)
    assert check.loop_error(loop, settings) == 0
    assert loop._graphed.captured


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
    looped = mode == "graph" and dtype in ("amp", "float32")
    assert (row.loop_ms is not None) == looped
    if looped:
        assert row.loop_error < row.bound
        assert row.loop_images_per_second == pytest.approx(4e3 / row.loop_ms)
        assert row.loop_memory_gib > 0


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
