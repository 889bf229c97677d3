"""The roofline of a FastVim: the time of its matrix products, plus that of moving its bytes.

B  batch, L  tokens, d  model width, E  inner width, s  bytes of an element in the run's dtype

The two large products of every block are timed as the vendor's library runs them. Everything else
in a block has to read and write each (tokens x width) tensor once, at the rate at which the device
copies memory. Embedding and head are not counted, nor are tensors with one value per segment. A
segment of Vim is a token, so its roofline, by the same formula, leaves out the bytes of its scan.
Products of small batches may find their input in the device's cache, as they would in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastvim.benchmark.profile import layers_of
from fastvim.benchmark.timing import measure
from fastvim.cudagraph import WARMUP, record, warm_up
from fastvim.models import FastVim

COPIED_BYTES = 2**30
# Products in one graph, so that the gaps between replays do not count.
PRODUCTS = 20


@dataclass(frozen=True)
class Blocks:
    """What the roofline of a model's blocks depends on.

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
        """The blocks of a model, for a batch of images of `size`."""
        layers = layers_of(model, batch, size, model.in_chans)
        return cls(len(layers), layers[0].tokens, layers[0].dim, layers[0].inner)

    def bytes_moved(self, element: int) -> int:
        """Bytes that one block reads and writes, without its two large products.

        Args:
            element: bytes s of an element; the residual stream always has 4.
        """
        # Stream read and written, hidden read, norm written.
        add_norm = (8 + 2 * element) * self.dim
        conv_pool = element * self.inner  # x read
        expand_gate = 3 * element * self.inner  # x and z read, product written
        return self.tokens * (add_norm + conv_pool + expand_gate)

    def seconds(self, products: float, copy_rate: float, element: int) -> float:
        """Seconds at the roofline.

        Args:
            products: seconds of one block's products.
            copy_rate: bytes copied per second.
            element: bytes s of an element.
        """
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
    call = partial(_times, x, weight, out)
    if device.type != "cuda":
        return measure(call, device).median
    return measure(_repeated(call, PRODUCTS, x.device), device).median / PRODUCTS


def _times(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """The product of a linear layer, whose weight is stored as (outputs, inputs)."""
    torch.matmul(x, weight.mT, out=out)


def _repeated(call: Callable[[], None], count: int, device: torch.device) -> Callable[[], None]:
    """So many calls as one graph."""
    stream = torch.cuda.Stream(device)
    reason = warm_up(call, stream, WARMUP, "product")
    assert reason is None, reason

    def calls() -> None:
        for _ in range(count):
            call()

    graph, _ = record(calls, stream)
    return graph.replay
