"""Which engine serves an op, and how one chooses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from inputs import cases, outputs_of, scan_inputs, to

from fastvim.ops import dispatch, engine_name, selective_scan, use_engine

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def calls(monkeypatch):
    """Names of the engines that served the scan, in turn; the reference leaves no name."""
    served = []

    names = {engine.function: engine.name for engine in dispatch.ENGINES["selective_scan"]}
    resolve = dispatch.resolve

    def watch(function):
        served.append(names.get(function, "other"))
        return resolve(function)

    monkeypatch.setattr(dispatch, "_cached_resolve", watch)
    return served


@pytest.fixture
def nothing_installed(monkeypatch):
    """As if no engine's package were there."""
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    dispatch._installed.cache_clear()
    yield
    dispatch._installed.cache_clear()


def scan(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return selective_scan(*to(scan_inputs(1, 3, 4), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_numba_serves_the_cpu(calls, dtype):
    scan(dtype)
    assert calls == ["numba"]
    assert engine_name("selective_scan", "cpu", dtype) == "numba"


@pytest.mark.parametrize("chosen", [None, "numba"])
def test_float64_falls_to_the_reference(calls, chosen):
    if chosen is None:
        scan(torch.float64)
    else:
        with use_engine(chosen):
            scan(torch.float64)
    assert calls == []
    assert engine_name("selective_scan", "cpu", torch.float64) == "reference"


def test_the_reference_on_request(calls):
    with use_engine("reference"):
        scan()
        assert engine_name("selective_scan", "cpu") == "reference"
    assert calls == []


def test_the_first_of_several_engines_serves_unless_one_is_chosen(calls, monkeypatch):
    engines = dispatch.ENGINES["selective_scan"]
    served = next(engine for engine in engines if engine.name == "numba")
    function = "fastvim.ops.reference:selective_scan_reference"
    other = replace(served, name="other", package="torch", function=function)
    monkeypatch.setitem(dispatch.ENGINES, "selective_scan", (other, *engines))
    scan()
    with use_engine("numba"):
        scan()
        assert engine_name("selective_scan", "cpu") == "numba"
    with use_engine("other"):
        scan()
        assert engine_name("conv_pool", "cpu") == "reference"  # which it does not serve
    assert engine_name("selective_scan", "cpu") == "other"
    assert calls == ["other", "numba", "other"]


@pytest.mark.parametrize("op", dispatch.OPS)
def test_engine_names(op):
    for device in ("cpu", "mps"):
        expected = "numba" if device == "cpu" else "reference"
        assert engine_name(op, device) == expected
        with use_engine("numba"):
            assert engine_name(op, device) == expected


def test_every_engine_serves_a_known_op():
    assert set(dispatch.ENGINES) <= set(dispatch.OPS)
    assert set(dispatch.OPS) == set(cases())


def test_an_unknown_op():
    with pytest.raises(ValueError, match=r"'scan'.*selective_scan"):
        engine_name("scan", "cpu")


def test_an_unknown_engine(calls):
    with pytest.raises(ValueError, match=r"'numbra'.*numba"), use_engine("numbra"):
        pass
    scan()
    assert calls == ["numba"]


def test_the_choice_ends_with_its_block(calls):
    with use_engine("reference"):
        with use_engine("numba"):
            scan()
        assert engine_name("selective_scan", "cpu") == "reference"
        with pytest.raises(KeyError), use_engine("numba"):
            raise KeyError
        assert engine_name("selective_scan", "cpu") == "reference"
    assert engine_name("selective_scan", "cpu") == "numba"
    assert calls == ["numba"]


def test_a_missing_package_is_said_once(nothing_installed, calls, caplog):
    expected = engine_name("selective_scan", "cpu")
    for _ in range(3):
        scan()
    assert (expected, calls) == ("reference", [])
    warnings = [r for r in caplog.records if r.name == dispatch.__name__]
    assert len(warnings) == 1
    assert "numba is not installed" in warnings[0].getMessage()


def test_a_missing_package_cannot_be_chosen(nothing_installed):
    with pytest.raises(ValueError, match=r"'numba'.*not installed"), use_engine("numba"):
        pass
    assert engine_name("selective_scan", "cpu") == "reference"


def test_importing_loads_no_engine():
    engines = ("numba", "fastvim.ops.cpu.forward", "fastvim.ops.triton")
    program = f"import sys, fastvim; print([m for m in sys.modules if m.startswith({engines})])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("op", dispatch.OPS)
def test_references_run_on_any_device(op):
    """Shapes can be followed on the meta device, as tools that count operations do."""
    function, inputs = cases()[op]
    expected = outputs_of(function(*inputs.values()))
    followed = outputs_of(function(*(t.to("meta") for t in inputs.values())))
    for meta, real in zip(followed, expected, strict=True):
        assert meta.device.type == "meta"
        assert (meta.shape, meta.dtype) == (real.shape, real.dtype)
