"""Other readers of the ONNX files: OpenVINO, and what NVIDIA says of TensorRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exported_families import FAMILIES

from fastvim.export import export
from fastvim.export.programs import Sizes, program_of

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.clients

LISTED = (Path(__file__).parent / "tensorrt_10_15.txt").read_text().splitlines()
TENSORRT = {name for line in LISTED if not line.startswith("#") for name in line.split()}
LAST_OPSET = 24
RESIZES = {b"nearest", b"linear"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The file of a family, and the program that it is of."""
    folder, made = tmp_path_factory.mktemp("readers"), {}

    def make(family: str):
        if family not in made:
            model, metadata = FAMILIES[family]()
            path = folder / f"{family}.onnx"
            export(model, metadata, path)
            made[family] = path, program_of(model)
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_openvino(family, exported):
    openvino = pytest.importorskip("openvino")
    path, program = exported(family)
    # By itself it computes in bfloat16 where the CPU can.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", exact)
    generator = torch.Generator().manual_seed(5)
    for number, sizes in enumerate([Sizes(1, 21, 50), Sizes(3, 90, 17)], 1):
        inputs = program.make(sizes, generator, number)
        with torch.no_grad():
            wanted = program.module(*inputs)
        found = compiled([x.numpy() for x in inputs])
        for i, want in enumerate([wanted] if isinstance(wanted, torch.Tensor) else wanted):
            np.testing.assert_allclose(found[i], want.numpy(), atol=1e-3 * float(want.abs().max()))


def nodes(graph):
    """Of a graph, and of the graphs in its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensorrt_knows_every_operator(family, exported):
    file = onnx.load(exported(family)[0])
    assert [(each.domain, each.version <= LAST_OPSET) for each in file.opset_import] == [("", True)]
    assert not file.functions
    found = list(nodes(file.graph))
    assert {node.op_type for node in found} <= TENSORRT
    for node in found:
        if node.op_type == "Resize":
            modes = {attribute.name: attribute.s for attribute in node.attribute}
            assert modes["mode"] in RESIZES
