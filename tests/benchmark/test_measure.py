"""What a row says: checked, timed, and what goes wrong told in it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from tiny_models import CONV, OURS, VIM, WRONG

from fastvim.benchmark import Bench, Case, Settings, check, check_names, measure, parse_size, timing
from fastvim.benchmark.cases import PRECISIONS, create, random_images
from fastvim.errors import UserError
from fastvim.models import FastChannelVim, FastVim

CPU = torch.device("cpu")
QUICK = {"device": CPU, "warmup": 1, "repeats": 2}


@pytest.fixture(autouse=True)
def short_groups(monkeypatch):
    monkeypatch.setattr(timing, "GROUP_SECONDS", {"cuda": 1e-3, "cpu": 1e-3})


def case(model: str = OURS, size: int = 32, batch: int = 2, mode: str = "eager") -> Case:
    return Case(model, (size, size), batch, mode)


def test_it_needs_no_training_library():
    code = (
        "import sys, timm; before = set(sys.modules);"  # which imports what it finds, rich too
        "import fastvim.benchmark, fastvim.inference;"
        "names = {'lightning', 'jsonargparse', 'torchmetrics', 'rich', 'matplotlib'};"
        "sys.exit(', '.join(names & (set(sys.modules) - before)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("224x320", (224, 320))])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "224x", "224X320", "big", "2x2x2"])
def test_no_sizes(text):
    with pytest.raises(UserError, match="HEIGHTxWIDTH"):
        parse_size(text)


def test_names():
    check_names([OURS, "resnet18"])
    with pytest.raises(UserError, match=r"'resnet188' \(nearest: resnet18"):
        check_names([OURS, "resnet188"])
    with pytest.raises(UserError, match="without its tag"):
        check_names(["resnet18.a1_in1k"])


def test_models_take_the_size_where_they_can():
    assert create(OURS, (48, 32)).grid_size == (6, 4)
    assert create("vit_tiny_patch16_224", (64, 64)).patch_embed.grid_size == (4, 4)
    assert create(CONV, (48, 48)).head.weight.any()  # a head of zeros would hide every error
    with pytest.raises(TypeError, match="nonsense"):
        timm.create_model(CONV, nonsense=1)


def test_timing_by_the_clock(monkeypatch):
    now, calls = [0.0], []

    def call():
        calls.append(now[0])
        now[0] += 2e-4 if len(calls) < 9 else 1e-4

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    result = timing.measure(call, CPU, warmup=2, repeats=3)
    # Two to warm up, one for the size of the groups, which are of five calls for a millisecond.
    assert len(calls) == 2 + 1 + 3 * 5
    assert result.median == pytest.approx(1e-4)
    assert result.lower == pytest.approx(1e-4)
    assert result.upper == pytest.approx(1.5e-4)


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([torch.nan, 1.0], [1.0, 1.0], torch.inf),
        ([1.0, 1.0], [torch.inf, 1.0], torch.inf),
        ([0.0, 0.0], [0.0, 0.0], torch.inf),
    ],
)
def test_relative_error(actual, expected, error):
    assert check.relative_error(torch.tensor(actual), torch.tensor(expected)) == pytest.approx(
        error
    )


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("model", [OURS, VIM])
def test_our_models_agree_with_the_reference(model, train, dtype):
    settings = Settings(**QUICK, dtype=dtype, train=train)
    row = Bench(settings).measure(case(model))
    assert row.failure is None
    assert row.ours
    assert row.engine_error < row.bound == PRECISIONS[dtype].bound
    if dtype == "bfloat16":
        assert row.engine_error > 0  # the reference ran in float32
    assert row.checked_size == (32, 32)
    assert row.images_per_second == pytest.approx(2e3 / row.latency_ms)
    assert row.latency_quartiles_ms[0] <= row.latency_ms <= row.latency_quartiles_ms[1]
    looped = train and PRECISIONS[dtype].weights == torch.float32  # as in `fastvim fit`
    assert (row.loop_ms is not None) == (row.loop_error is not None) == looped


def test_a_wrong_engine_is_found_and_not_timed():
    pytest.importorskip("numba")
    row = Bench(Settings(**QUICK)).measure(case(WRONG))
    assert row.wrong
    assert row.engine_error > 1
    assert "to the reference, above 0.001" in row.failure
    assert row.latency_ms is None
    assert Bench(Settings(**QUICK, check=False)).measure(case(WRONG)).latency_ms > 0


def test_large_images_are_checked_at_a_smaller_size():
    model = FastVim(patch_size=16, embed_dim=16, depth=1)
    assert check.checked_size(model, (2048, 300), train=False) == (512, 300)
    assert check.checked_size(model, (2048, 300), train=True) == (224, 224)
    model = FastChannelVim(patch_size=8, in_chans=8, embed_dim=16, depth=1)
    assert check.checked_size(model, (2048, 60), train=False) == (88, 60)  # 11 x 11 cells of 8
    assert check.checked_size(model, (2048, 60), train=True) == (32, 32)


def test_the_reference_runs_once(monkeypatch):
    asked = []
    monkeypatch.setattr(check, "engine_error", lambda *a: asked.append(a) or 1e-6)
    bench = Bench(Settings(**QUICK))
    rows = [bench.measure(case(batch=batch)) for batch in (1, 2)]
    assert len(asked) == 1
    assert [row.engine_error for row in rows] == [1e-6, 1e-6]


def test_a_graph_that_repeats_itself_is_found():
    settings = Settings(**QUICK)
    model = create(OURS, (32, 32))
    served = check.predictor(model, (20, 3, 32, 32), "eager", settings)
    assert check.mode_error(served, settings) < 1e-5
    stale = served(random_images((20, 3, 32, 32), settings))
    served._run = lambda images: stale
    assert check.mode_error(served, settings) > 1e-2


def test_models_that_are_not_ours():
    row = Bench(Settings(**QUICK, channels_last=True)).measure(case(CONV))
    assert row.failure is None
    assert not row.ours
    assert (row.engine_error, row.mode_error) == (None, pytest.approx(0, abs=1e-5))


@pytest.mark.parametrize(
    ("error", "failure", "wrong"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "out of memory", False),
        (AssertionError("Input height (32)\nmust"), "AssertionError: Input height (32)", True),
    ],
)
def test_what_goes_wrong_is_told_in_the_row(monkeypatch, error, failure, wrong):
    def fails(*_):
        raise error

    bench = Bench(Settings(**QUICK))
    with monkeypatch.context() as patch:
        patch.setattr(measure, "create", fails)
        row = bench.measure(case())
    assert (row.failure, row.wrong, row.latency_ms) == (failure, wrong, None)
    assert bench.measure(case()).failure is None


@pytest.mark.parametrize(
    ("mode", "train"), [("graph", False), ("graph", True), ("compiled-graph", True)]
)
def test_what_can_never_run(mode, train):
    with pytest.raises(UserError, match=f"mode {mode} needs a CUDA device, not cpu"):
        Bench(Settings(**QUICK, train=train)).measure(case(mode=mode))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("model", [OURS, VIM, CONV])
def test_graphs_on_a_gpu(model, dtype):
    settings = Settings(torch.device("cuda"), dtype=dtype, repeats=2)
    row = Bench(settings).measure(case(model, mode="graph"))
    assert row.failure is None
    assert row.memory_gib > 0
    assert row.ours == (row.roofline_ms is not None)


@pytest.mark.gpu
@pytest.mark.parametrize(("train", "what"), [(False, "forward pass"), (True, "training step")])
def test_a_model_that_cannot_be_captured_says_so(monkeypatch, train, what):
    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, images):
            return images.mean((2, 3)) * self.scale / self.scale.item()

    bench = Bench(Settings(torch.device("cuda"), train=train))
    with monkeypatch.context() as patch:
        patch.setattr(measure, "create", lambda *_: Reads())
        row = bench.measure(case(mode="graph"))
    assert row.failure.startswith(f"the {what} synchronises with the GPU")
    assert "\n" not in row.failure
    assert bench.measure(case(mode="graph")).failure is None


@pytest.mark.gpu
def test_memory_that_does_not_suffice():
    bench = Bench(Settings(torch.device("cuda"), check=False))
    row = bench.measure(case(CONV, size=16384, batch=4096, mode="graph"))
    assert row.failure == "out of memory"
    assert bench.measure(case(CONV, mode="graph")).failure is None
