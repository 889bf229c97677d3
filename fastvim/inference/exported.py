"""ONNX files that `fastvim export` wrote, in the place of the model that they are of.

The metadata tell the model. It is built without its weights, and the file computes in its stead, so
that all else that the commands know of a model holds. onnxruntime runs operators of its own alone:
nothing in such a file is code.

B  batch, H W  height and width of the images
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvim.errors import UserError, one_line
from fastvim.models import FastChannelVim, MaskedAutoencoder, UPerNet
from fastvim.storage import require_file
from fastvim.weights import METADATA_KEY
from fastvim.weights.build import build_model
from fastvim.weights.metadata import of_file, parse


def open_exported(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of an ONNX file, which computes by onnxruntime on the CPU, and its metadata.

    Raises:
        UserError: no such file, a damaged one, or one that this library did not write.
    """
    require_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    told = _metadata(path, content)
    metadata = parse(path, told)
    with of_file(path), torch.device("meta"):
        if not {"model", "model_args"} <= metadata.keys():
            raise UserError("they name no model")
        model = build_model(metadata)
    try:
        session = session_of(content)
    except Exception as error:  # onnxruntime's errors have no other class in common
        raise UserError(f"{path} is damaged or not of ONNX: {one_line(error)}") from error
    return _take_over(model, Program(path, session), hashlib.sha256(content).digest()), metadata


def session_of(content: bytes) -> Any:
    """A session of onnxruntime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class Program:
    """A file of ONNX, as a function of tensors."""

    def __init__(self, path: Path, session: Any) -> None:
        self.path, self.session = path, session
        self.inputs = [found.name for found in session.get_inputs()]

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        """The outputs for inputs by name, on the device of the images."""
        if list(inputs) != self.inputs:
            wanted, found = ", ".join(inputs), ", ".join(self.inputs)
            raise UserError(f"{self.path}: its inputs are {found}, expected {wanted}")
        named = {name: np.ascontiguousarray(x.cpu().numpy()) for name, x in inputs.items()}
        try:
            found = self.session.run(None, named)
        except Exception as error:  # onnxruntime's errors have no other class in common
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items())
            raise UserError(f"{self.path} fails for {shapes}: {one_line(error)}") from error
        return [torch.from_numpy(output).to(inputs["images"].device) for output in found]


def _metadata(path: Path, content: bytes) -> str:
    """What the file says of itself; its tensors have to be within it."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import uses_external_data

    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise UserError(f"{path} is damaged or not of ONNX: {one_line(error)}") from error
    if any(map(uses_external_data, _tensors(model.graph, *model.functions))):
        raise UserError(f"{path} keeps its weights in other files: expected one file")
    told = {entry.key: entry.value for entry in model.metadata_props}
    if METADATA_KEY not in told:
        raise UserError(f"{path} was not written by fastvim export: it does not tell its model")
    return told[METADATA_KEY]


def _tensors(*graphs: Any) -> Iterator[Any]:
    """All tensors of graphs and functions, and of the graphs in their nodes."""
    for graph in graphs:
        yield from getattr(graph, "initializer", ())
        for attribute in chain.from_iterable(node.attribute for node in graph.node):
            yield from (attribute.t, *attribute.tensors)
            if attribute.HasField("g") or attribute.graphs:
                yield from _tensors(attribute.g, *attribute.graphs)


def _take_over(model: nn.Module, program: Program, digest: bytes) -> nn.Module:
    """Let the file compute what the model would; the model keeps its options and no weights."""
    for module in model.modules():
        module._parameters.clear()
        module._buffers.clear()
    # In the place of the weights, for what tells files apart.
    model.register_buffer("exported", torch.frombuffer(bytearray(digest), dtype=torch.uint8))
    if isinstance(model, MaskedAutoencoder):
        model.mask_token = nn.Parameter(torch.zeros(1), requires_grad=False)
        halves = _Halves(program)
        model.forward_encoder, model.forward_decoder = halves.encode, halves.decode  # type: ignore[method-assign]
        return model

    def forward(images: Tensor, channels: Any = None) -> Tensor:
        _patches(model).grid_size(*images.shape[-2:])  # refuses what is smaller than a patch
        further = {}
        if isinstance(model, FastChannelVim):
            chosen = range(images.shape[1]) if channels is None else channels
            further["channels"] = torch.as_tensor(chosen, dtype=torch.int64)
        (found,) = program(images=images, **further)
        wanted = [len(images), model.num_classes]
        if isinstance(model, UPerNet):
            wanted += images.shape[-2:]
        if list(found.shape) != wanted:
            raise UserError(f"{program.path} gives {list(found.shape)}, expected {wanted}")
        return found

    model.forward = forward
    return model


def _patches(model: nn.Module) -> Any:
    backbone = model.maps.backbone if isinstance(model, UPerNet) else model
    return backbone.patch_embed


class _Halves:
    """The two halves of an autoencoder, which a file computes at once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.prediction = torch.empty(0)

    def encode(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """As `MaskedAutoencoder.forward_encoder`."""
        self.prediction, latent = self.program(images=images, ids_keep=ids_keep)
        return latent

    def decode(self, latent: Tensor, ids_keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """As `MaskedAutoencoder.forward_decoder`, of the images that were encoded last."""
        return self.prediction
