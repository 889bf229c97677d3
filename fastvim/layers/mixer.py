"""The state-space mixer of all models.

B  batch, L  tokens, d  model width, E  inner width, K  taps of the convolution, N  state size,
R  rank of the step-size projection, S  segments. A leading 2: forward and backward direction.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastvim.layers.hooks import is_bypassed
from fastvim.ops import Segments, conv_pool, expand_gate, selective_scan
from fastvim.ops.dispatch import mix_at_once
from fastvim.ops.recompute import linear
from fastvim.ops.traversal import Pooling

fx.wrap("conv_pool")
fx.wrap("selective_scan")
fx.wrap("expand_gate")
fx.wrap("expand")


class Mixer(nn.Module):
    """Bidirectional selective scan over the pooled segments of a path (FastVim, section 3.2).

    `in_proj` → `conv_pool` → `selective_scan` → `expand_gate` → `out_proj`. Each call says how the
    tokens are walked and pooled, so one mixer serves every traversal.

    Args:
        dim: model width d.
        depth: blocks of the model, of an autoencoder's encoder. The initial `out_proj` is divided
            by √depth.
        d_state: state size N.
        d_conv: taps K of the convolution.
        expand: E / d.
        dt_rank: R. None: ceil(d / 16).
        pooling: "mean" or "max" of a segment's tokens.
        pool_scale: factor on the pooled value.
        norm_after_ssm: LayerNorm over E before the gate.
        init_layer_scale: initial value of a learned factor per output channel. None: no factor.
    """

    # Vectors of each direction, stacked to (2, E): no weight decay, although they have two axes.
    vectors = ("conv_bias", "dt_bias", "D")

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 1,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        pooling: Pooling = "mean",
        pool_scale: float = 1.0,
        norm_after_ssm: bool = True,
        init_layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        inner = expand * dim
        self.depth = depth
        self.d_state = d_state
        self.dt_rank = dt_rank if dt_rank is not None else math.ceil(dim / 16)
        self.pooling = pooling
        self.pool_scale = pool_scale
        self.init_layer_scale = init_layer_scale

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2, inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(2, inner))
        self.x_proj = nn.Parameter(torch.empty(2, self.dt_rank + 2 * d_state, inner))
        self.dt_proj = nn.Parameter(torch.empty(2, inner, self.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(2, inner))
        self.A_log = nn.Parameter(torch.empty(2, inner, d_state))
        self.D = nn.Parameter(torch.empty(2, inner))
        self.norm = nn.LayerNorm(inner, eps=1e-5) if norm_after_ssm else None
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.gamma = nn.Parameter(torch.empty(dim)) if init_layer_scale is not None else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of Mamba and Vim (docs/architecture.md, initial values)."""
        taps, rank = self.conv_weight.shape[-1], self.dt_rank
        self.in_proj.reset_parameters()
        nn.init.uniform_(self.conv_weight, -(taps**-0.5), taps**-0.5)
        nn.init.uniform_(self.conv_bias, -(taps**-0.5), taps**-0.5)
        for projection in self.x_proj:
            nn.init.kaiming_uniform_(projection, a=math.sqrt(5))
        nn.init.uniform_(self.dt_proj, -(rank**-0.5), rank**-0.5)
        # Forward steps begin between 0.001 and 0.1. Backward ones begin at softplus(0) = ln 2, as
        # in every published model.
        step = torch.empty_like(self.dt_bias[0]).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias[0] = step + torch.log(-torch.expm1(-step))  # inverse of softplus
        self.dt_bias[1] = 0
        self.A_log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float32).log())
        nn.init.ones_(self.D)
        if self.norm is not None:
            self.norm.reset_parameters()
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight.div_(math.sqrt(self.depth))
        if self.gamma is not None and self.init_layer_scale is not None:
            nn.init.constant_(self.gamma, self.init_layer_scale)

    def forward(self, u: Tensor, segments: Segments) -> Tensor:
        """Tokens (B, L, d) in memory order to the same shape, walked as `segments` says."""
        plain = self.in_proj.bias is None and is_bypassed(self.in_proj, nn.Linear, u)
        xz = linear(u, self.in_proj.weight) if plain else self.in_proj(u)
        x, z = xz.chunk(2, dim=-1)
        norm = self.norm
        read = norm is None or is_bypassed(norm, nn.LayerNorm)
        affine = (norm.weight, norm.bias) if read and norm is not None else (None, None)
        convolution = (self.conv_weight, self.conv_bias, self.D)
        scan = (self.x_proj, self.dt_proj, self.dt_bias, self.A_log)
        means = self.pooling == "mean" or not segments.pools
        mix = mix_at_once(x, segments.masked is not None) if read and means else None
        if mix is not None:
            gated = mix(x, z, convolution, scan, affine, segments, self.pool_scale)
        else:
            pooled, skip = conv_pool(
                x, *convolution, segments, pooling=self.pooling, pool_scale=self.pool_scale
            )
            y = selective_scan(pooled, *scan)
            if norm is None or read:
                gated = expand_gate(skip, z, y, segments, *affine)
            else:
                gated = norm(expand(skip, y, segments)) * F.silu(z)
        out = self.out_proj(gated)
        return out if self.gamma is None else out * self.gamma


def expand(skip: Tensor, y: Tensor, segments: Segments) -> Tensor:
    """The part of `expand_gate` before its norm: (B, L, E), in `skip`'s dtype."""
    dtype = torch.promote_types(skip.dtype, torch.float32)
    scanned = segments.from_path(segments.broadcast(y.to(dtype)).mean(0))
    return (skip.to(dtype) + scanned).to(skip.dtype)
