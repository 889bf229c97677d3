"""The floor: time that a FastVim needs for its matrix products and for moving its bytes, no more.

B  batch, L  tokens, d  model width, E  inner width, s  bytes of an element in the run's dtype

The two large products of every block are timed as the vendor's library runs them. Everything else
in a block has to read and write each (tokens x width) tensor once, at the rate at which the device
copies memory; embedding and head count for nothing, and so does what has a value per segment
instead of per token. Vim's segments are its tokens: its floor, by the same formula, leaves out what
its scan reads and writes. Products of small batches may find their input in the device's cache, as
they would in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvim.benchmark.timing import measure
from fastvim.layers import Block
from fastvim.models import FastChannelVim, FastVim

COPIED_BYTES = 2**30
# Products in one graph, so that the gaps between replays do not count.
PRODUCTS = 20


@dataclass(frozen=True)
class Blocks:
    """What the floor of a model's blocks depends on.

    Attributes:
        depth: number of blocks.
        tokens: B · L.
        dim: model width d.
        inner: inner width E.
    """

    depth: int
    tokens: int
    dim: int
    inner: int

    @classmethod
    def of(cls, model: FastVim, batch: int, size: tuple[int, int]) -> Blocks:
        """Those of a model for a batch of images of `size`."""
        height, width = model.patch_embed.grid_size(*size)
        channels = model.in_chans if isinstance(model, FastChannelVim) else 1
        tokens = height * width * channels + int(model.cls_token is not None)
        block = model.blocks[0]
        assert isinstance(block, Block)
        inner = block.mixer.D.shape[1]
        return cls(len(model.blocks), batch * tokens, model.embed_dim, inner)

    def bytes_moved(self, element: int) -> int:
        """Bytes that one block reads and writes beside its two large products.

        Args:
            element: bytes s of an element; the residual stream has 4 in any case.
        """
        add_norm = (
            8 + 2 * element
        ) * self.dim  # stream read and written, hidden read, norm written
        conv_pool = element * self.inner  # x read
        expand_gate = 3 * element * self.inner  # x and z read, product written
        return self.tokens * (add_norm + conv_pool + expand_gate)

    def seconds(self, products: float, copy_rate: float, element: int) -> float:
        """The floor, from the seconds of a block's products and the bytes copied per second."""
        return self.depth * (products + self.bytes_moved(element) / copy_rate)


def copy_rate(device: torch.device, nbytes: int = COPIED_BYTES) -> float:
    """Bytes per second, read and written both counted, of copying a large tensor on the device."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / measure(lambda: target.copy_(source), device).median


@torch.inference_mode(False)
@torch.no_grad()
def product_seconds(blocks: Blocks, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of `in_proj`, (B·L, d) x (d, 2E), and `out_proj`, (B·L, E) x (E, d), of a block."""
    tokens, dim, inner = blocks.tokens, blocks.dim, blocks.inner
    return sum(
        _product(tokens, *shape, dtype, device) for shape in ((dim, 2 * inner), (inner, dim))
    )


def _product(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> float:
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = (torch.randn(outputs, inputs, device=device) * inputs**-0.5).to(dtype)
    out = torch.empty(rows, outputs, device=device, dtype=dtype)
    if device.type != "cuda":
        return measure(lambda: _times(x, weight, out), device).median
    return measure(_recorded(lambda: _times(x, weight, out), PRODUCTS), device).median / PRODUCTS


def _times(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """The product as a linear layer stores its weight."""
    torch.matmul(x, weight.mT, out=out)


def _recorded(call: Callable[[], None], count: int) -> Callable[[], None]:
    """So many calls as one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(count):
            call()
    return graph.replay
