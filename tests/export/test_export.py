"""Files of `fastvim export`: right at sizes that were not traced, or not written."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from exported_families import FAMILIES, fastvim

from fastvim.errors import MachineError, UserError
from fastvim.export import export
from fastvim.export.programs import Program, Sizes, program_of
from fastvim.ops import use_engine

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SIZES = [Sizes(1, 21, 50), Sizes(3, 90, 17), Sizes(4, 33, 32)]  # of patches of 8 pixels


def differences(program: Program, run) -> list[float]:
    """Of a program from the model at these sizes, as a part of the largest value of each output."""
    generator, found = torch.Generator().manual_seed(5), []
    for number, sizes in enumerate(SIZES, 1):
        inputs = program.make(sizes, generator, number)
        with torch.no_grad():
            wanted = program.module(*inputs)
        wanted = [wanted] if isinstance(wanted, torch.Tensor) else wanted
        for want, got in zip(wanted, run(*inputs), strict=True):
            assert got.shape == want.shape
            found.append(float((got - want).abs().max() / want.abs().max()))
    return found


def run_onnx(path, program: Program):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs):
        named = {name: x.numpy() for name, x in zip(program.inputs, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(program.outputs, named)]

    return run


def further(family: str):
    """A family that is like another; `make test-programs` runs it."""
    return pytest.param(family, marks=pytest.mark.programs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        further(family) if family in ("autoencoder of vim", "backbone") else family
        for family in FAMILIES
    ],
)
def test_every_family_at_other_sizes(family, tmp_path):
    model, metadata = FAMILIES[family]()
    path = tmp_path / "model.onnx"
    made = export(model, metadata, path)
    program = program_of(model)
    assert (made.task, made.inputs) == (program.task, program.inputs)
    assert max(differences(program, run_onnx(path, program))) < 1e-4
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert "Scan" in {node.op_type for node in file.graph.node}
    told = json.loads({each.key: each.value for each in file.metadata_props}["fastvim"])
    assert told["task"] == program.task
    assert metadata.items() <= told.items()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["channels", "segmentor", *map(further, ("vim", "autoencoder", "backbone"))]
)
def test_torch_programs_of_families(family, tmp_path):
    model, metadata = FAMILIES[family]()
    export(model, metadata, tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()

    def as_list(*inputs):
        found = run(*inputs)
        return [found] if isinstance(found, torch.Tensor) else found

    program = program_of(model)
    assert max(differences(program, as_list)) < 1e-4
    inputs = program.make(SIZES[0], torch.Generator().manual_seed(5), 1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="Got: c10::BFl"):
        run(*inputs)  # never another precision in silence


@pytest.mark.slow
def test_a_torch_program_runs_where_this_library_is_not(tmp_path):
    model, metadata = fastvim()
    export(model, metadata, tmp_path / "model.pt2")
    assert_runs_alone(
        "told = {'fastvim': ''}\n"
        "run = torch.export.load(sys.argv[1], extra_files=told).module()\n"
        "told = told['fastvim']\n",
        tmp_path / "model.pt2",
        torch.ones(1, 3, 50, 21),
    )


@pytest.mark.slow
def test_a_compiled_package_runs_where_this_library_is_not(tmp_path):
    model, metadata = fastvim()
    export(model, metadata, tmp_path / "model.aoti.pt2", fixed=(1, 40, 24))
    assert_runs_alone(
        "run = torch._inductor.aoti_load_package(sys.argv[1])\n"
        "told = run.get_metadata()['fastvim']\n",
        tmp_path / "model.aoti.pt2",
        torch.ones(1, 3, 40, 24),
    )


def assert_runs_alone(load: str, path, images: torch.Tensor) -> None:
    """A process without this library loads a file of `fastvim()` and gives what the model does.

    Args:
        load: lines of Python that make `run` and `told`, its metadata.
        path: of the file.
        images: all ones.
    """
    code = (
        "import sys, torch\n"
        "sys.modules['fastvim'] = None\n"  # an import of it would fail
        f"{load}"
        "print(told)\n"
        f"print(*map(float, run(torch.ones{tuple(images.shape)}).flatten()))\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    ).stdout
    told, values = printed.splitlines()
    model, metadata = fastvim()
    assert json.loads(told)["model_args"] == metadata["model_args"]
    expected = model.eval()(images).flatten().tolist()
    assert [float(value) for value in values.split()] == pytest.approx(expected, abs=1e-5)


def test_a_wrong_program_is_not_written(tmp_path, monkeypatch):
    model, metadata = fastvim()
    program = program_of(model)
    traced = program.trace("loop", None)
    traced.state_dict["head.bias"].data += 0.01
    monkeypatch.setattr(Program, "trace", lambda *_: traced)
    with pytest.raises(MachineError, match=r"is not written: for images .* its logits"):
        export(model, metadata, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_files_tell_nothing_of_the_machine_that_made_them(tmp_path):
    model, metadata = fastvim()
    export(model, metadata, tmp_path / "model.onnx")
    export(model, metadata, tmp_path / "model.pt2")
    for file in tmp_path.iterdir():
        assert b".py" not in file.read_bytes().replace(b"pytorch", b"")


@pytest.mark.slow
def test_axes_have_names(tmp_path):
    model, metadata = fastvim()
    export(model, metadata, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].shape == ["batch", 4]
    with use_engine("reference"), torch.no_grad():
        expected = model.eval()(torch.ones(1, 3, 9, 32)).numpy()  # a row of patches and a pixel
    found = session.run(None, {"images": np.ones((1, 3, 9, 32), np.float32)})[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
def test_fixed_sizes(ending, tmp_path):
    model, metadata = fastvim()
    path, images = tmp_path / f"model{ending}", torch.randn(2, 3, 20, 33)
    export(model, metadata, path, fixed=(2, 20, 33))
    if ending == ".onnx":
        session = ort.InferenceSession(path)
        assert session.get_inputs()[0].shape == [2, 3, 20, 33]
        (found,) = run_onnx(path, program_of(model))(images)
    else:
        found = torch.export.load(path).module()(images)
        with pytest.raises(AssertionError, match="Guard failed"):
            torch.export.load(path).module()(torch.randn(2, 3, 20, 40))
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(images), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="sides of at least a patch, 8"):
        export(model, metadata, tmp_path / f"other{ending}", fixed=(2, 7, 33))


def test_no_compiler(tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    model, metadata = fastvim()
    with pytest.raises(MachineError, match=r"needs a C\+\+ compiler"):
        export(model, metadata, tmp_path / "model.aoti.pt2")
    assert list(tmp_path.iterdir()) == []


def test_other_models_and_names(tmp_path):
    model, metadata = fastvim()
    with pytest.raises(UserError, match=r"expected a name in \.onnx, \.aoti\.pt2, \.pt2"):
        export(model, metadata, tmp_path / "model.pb")
    with pytest.raises(UserError, match="Linear is no model of this library"):
        export(torch.nn.Linear(1, 1), {}, tmp_path / "model.onnx")


@pytest.mark.slow
def test_the_model_stays_as_it_was(tmp_path):
    model, metadata = fastvim()
    model.train()
    export(model, metadata, tmp_path / "model.pt2")
    assert model.training
    assert model.head.weight.requires_grad
