"""Tensors that are divided among the processes of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, in the same memory; a plain tensor is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A whole tensor; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """Whole tensors, on the CPU, in place of divided ones; every process must call it.

    Args:
        tensors: by name. What is not divided stays as it is.
        keep: whether this process wants them. The others get no divided ones, to save memory.
    """
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            gathered = whole(tensor.detach())
            if keep:
                found[name] = gathered.cpu()
        else:
            found[name] = tensor
    return found


def divide_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Divide a tensor, the same in every process, as another one of that shape is."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def divide_copy(copy: nn.Module, module: nn.Module) -> None:
    """Divide the parameters of a module's copy as those of the module are."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            owner, _, own_name = name.rpartition(".")
            mine = copy.get_parameter(name)
            part = nn.Parameter(divide_as(mine.detach(), parameter), mine.requires_grad)
            setattr(copy.get_submodule(owner), own_name, part)


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Divide a module's parameters among the processes, block by block (`fully_shard`).

    Each entry of the lists named `blocks` is gathered for its own passes alone, the rest for those
    of the whole module. All processes begin with the values of the first one.
    """
    blocks = [part for name, part in module.named_modules() if _is_block(name)]
    for part in (*blocks, module):
        part.to(mesh.device_type)
        _broadcast((*part.parameters(), *part.buffers()))
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def _is_block(name: str) -> bool:
    return name.rpartition(".")[0].endswith("blocks")


def _broadcast(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor.detach(), 0)


def broadcast_buffers(module: nn.Module) -> None:
    """Give all processes the buffers of the first one, as DistributedDataParallel does."""
    _broadcast(module.buffers())
