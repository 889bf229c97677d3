"""Export a model to a file: traced, translated, run and compared, and only then written."""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.fx.config
from torch import Tensor, nn

from fastvim.errors import MachineError, UserError, one_line
from fastvim.export.check import Run, check, outputs
from fastvim.export.onnx import to_onnx
from fastvim.export.programs import Program, Sizes, backbone_of, program_of
from fastvim.inference.exported import session_of
from fastvim.storage import written
from fastvim.weights import METADATA_KEY
from fastvim.weights.usage import class_names, image_settings

ENDINGS = (".onnx", ".aoti.pt2", ".pt2")


class Exported(NamedTuple):
    """What was written.

    Attributes:
        task: of the model.
        inputs: names of the inputs.
        outputs: names of the outputs.
        difference: largest one from the model, as a part of the largest value.
        size: of the file, in bytes.
    """

    task: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    difference: float
    size: int


def export(
    model: nn.Module,
    metadata: dict[str, Any],
    target: str | os.PathLike[str],
    *,
    fixed: tuple[int, int, int] | None = None,
) -> Exported:
    """Write a model as a program that runs without this library.

    The operations are their definitions in PyTorch, and the scan is one operator for any number of
    steps. What is written was run before, at sizes other than the traced one, and compared with the
    model.

    Args:
        model: of this library, as `fastvim.load_model` gives it.
        metadata: of its weights. They travel in the file, as JSON under the name "fastvim".
        target: `.onnx`; `.pt2` for torch.export; `.aoti.pt2` for AOTInductor, which needs a C++
            compiler and writes machine code for this one's kind of CPU.
        fixed: batch, height and width, the only ones that the file then takes. None: any.

    Raises:
        UserError: a name of another ending, or a model that is not exported.
        MachineError: the program differs from the model, or there is no compiler.
    """
    target = Path(target)
    ending = next((ending for ending in ENDINGS if target.name.endswith(ending)), None)
    if ending is None:
        raise UserError(f"{target}: expected a name in {', '.join(ENDINGS)}")
    program = program_of(model)
    sizes = None if fixed is None else _fixed(program, fixed)
    told = {METADATA_KEY: json.dumps({**_described(model, metadata), "task": program.task})}
    make = {".onnx": _onnx, ".pt2": _exported, ".aoti.pt2": _compiled}[ending]
    with _quiet(), _without_stacks(), torch.random.fork_rng(devices=[]):
        content, run = make(program, sizes, told)
        difference = check(str(target), program, run, sizes)
    with written(target) as file:
        file.write(content)
    return Exported(program.task, program.inputs, program.outputs, difference, len(content))


def training_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model's position embedding is stored for."""
    backbone = backbone_of(model)
    patches = backbone.patch_embed
    down, across = (
        (cells - 1) * patches.stride + patches.patch_size for cells in backbone.grid_size
    )
    return down, across


def _fixed(program: Program, fixed: tuple[int, int, int]) -> Sizes:
    sizes = Sizes(*fixed)
    if min(sizes) < 1 or min(sizes[1:]) < program.patch:
        raise UserError(
            f"size {sizes.height} {sizes.width}, batch {sizes.batch}: expected a batch of 1 or "
            f"more, and sides of at least a patch, {program.patch}"
        )
    return sizes


def _described(model: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata with all that a reader needs: how images are prepared, and the classes."""
    if {"segmentation", "features"} & metadata.keys():
        return metadata
    told = {**metadata, **image_settings(model, metadata)}
    if getattr(model, "num_classes", 0):
        told["class_names"] = class_names(model, metadata)
    return told


def _onnx(program: Program, fixed: Sizes | None, told: dict[str, str]) -> tuple[bytes, Run]:
    import onnxruntime  # noqa: F401  before the minutes that a large model takes
    import onnxscript  # noqa: F401

    content = to_onnx(program.trace("scan", fixed), program, told)
    session = session_of(content)

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        named = {name: x.numpy() for name, x in zip(program.inputs, inputs, strict=True)}
        return [torch.from_numpy(found) for found in session.run(program.outputs, named)]

    return content, run


def _exported(program: Program, fixed: Sizes | None, told: dict[str, str]) -> tuple[bytes, Run]:
    file = io.BytesIO()
    torch.export.save(program.trace("loop", fixed), file, extra_files=told)
    file.seek(0)
    module = torch.export.load(file).module()
    return file.getvalue(), lambda inputs: outputs(module, inputs)


def _compiled(program: Program, fixed: Sizes | None, told: dict[str, str]) -> tuple[bytes, Run]:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    _require_compiler()
    traced = program.trace("loop", fixed)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pt2")
        options = {"aot_inductor.metadata": told}
        aoti_compile_and_package(traced, package_path=path, inductor_configs=options)
        content = Path(path).read_bytes()
        module = aoti_load_package(path)
    return content, lambda inputs: outputs(module, inputs)


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise MachineError(
            f".aoti.pt2 needs a C++ compiler such as g++: {one_line(error)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of the exporters on their own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _without_stacks() -> Iterator[None]:
    """Without noting where each operation was called, which takes a fifth of the time."""
    before = getattr(torch.fx.config, "do_not_emit_stack_traces", False)  # of new versions
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before
