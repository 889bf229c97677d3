"""ONNX files: translated by torch, and made small."""

from __future__ import annotations

import operator
import re
import warnings
from typing import Any

import torch
from torch.export import ExportedProgram

from fastvim.export.programs import Program

# The newest that onnxruntime, OpenVINO and TensorRT read.
OPSET = 23
_AXES = {"images": ("batch", "channels", "height", "width"), "channels": ("channels",)}
_AXES["ids_keep"] = ("batch", "kept")


def to_onnx(traced: ExportedProgram, program: Program, metadata: dict[str, str]) -> bytes:
    """An ONNX file of a program that was traced with the engine "scan".

    Args:
        traced: the program.
        program: names of its inputs and outputs.
        metadata: texts that travel in the file.
    """
    import onnx_ir

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.onnx.export(
            traced,
            (),
            input_names=program.inputs,
            output_names=program.outputs,
            opset_version=OPSET,
            custom_translation_table=_TRANSLATIONS,
            dynamo=True,
            verbose=False,
            optimize=False,
        )
    assert found is not None
    model = found.model
    _simplify(model)
    _forget(model)
    _name_axes(model)
    model.producer_name = "fastvim"
    model.metadata_props.update(metadata)
    return onnx_ir.to_proto(model).SerializeToString()


def _remainder(self: Any, other: Any) -> Any:
    """Of indices divided by a size; torch translates the sizes that it knows alone."""
    from onnxscript import opset18 as op

    return op.Mod(self, other)


def _floordiv(self: Any, other: Any) -> Any:
    """Of sizes, rounded down as in Python; torch leaves it to ONNX, which rounds towards zero."""
    from onnxscript import opset18 as op

    return op.Div(op.Sub(self, op.Mod(self, other)), other)


_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.remainder.Scalar: _remainder,
    operator.floordiv: _floordiv,
}


def _simplify(model: Any) -> None:
    """Fold what is constant and remove what is not used.

    torch's own optimisation also looks for patterns, which takes a third of the time of an export
    and which runtimes do as well.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.inline(model)
    optimizer.fold_constants(model)
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        tidy(model)


def _forget(model: Any) -> None:
    """Remove what tells of the machine that made the file: paths and lines of Python."""
    from onnx_ir.traversal import RecursiveGraphIterator

    model.metadata_props.clear()
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for node in RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _name_axes(model: Any) -> None:
    """Call the free axes of inputs and outputs by their names instead of by symbols."""
    import onnx_ir

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, size in zip(_AXES[value.name], value.shape, strict=True):
            if not isinstance(size, int):
                names.setdefault(str(size.value), axis)
    for value in (*model.graph.inputs, *model.graph.outputs):
        named = [
            size
            if isinstance(size, int)
            else re.sub(r"\w+", lambda w: names.get(w[0], w[0]), str(size.value))
            for size in value.shape
        ]
        value.shape = onnx_ir.Shape(named)
