"""Features of several blocks of a backbone, as timm asks for them.

B  batch, L  tokens, d  model width, H W  token grid
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from fastvim.errors import UserError
from fastvim.layers import AddNorm
from fastvim.options import check_choice

Source = Literal["residual", "mixer"]


class Intermediates(nn.Module):
    """A model of blocks (`fastvim.models.vision.FastVim`) whose intermediate features are read."""

    blocks: nn.ModuleList
    norm: AddNorm | None
    _embed: Any
    _begin: Any
    _walks: Any
    _run_block: Any
    _finish: Any
    reset_classifier: Any
    cls_token: nn.Parameter | None

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        source: Source = "residual",
    ) -> Any:
        """Features of several blocks.

        Args:
            x: (B, in_chans, H, W).
            indices: blocks to take; the last n for an int, all for None.
            return_prefix_tokens: pair each feature with its class token, (B, 1, d).
            norm: apply the last norm to each feature.
            stop_early: leave out the blocks after the last index.
            output_fmt: "NCHW" maps or "NLC" tokens, without the class token.
            intermediates_only: leave out the first return value.
            source: the "residual" stream after the block (in training, without drop path on the
                block's output), or the output of its "mixer" alone.

        Returns:
            The tokens after the last norm, and the list of features.

        Raises:
            UserError: an unknown format or source.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt={output_fmt!r}: expected 'NCHW' or 'NLC'")
        check_choice(get_args(Source), source=source)
        take, last = feature_take_indices(len(self.blocks), indices)
        tokens, grid = self._embed(x)
        tokens = self._begin(tokens)
        walks = self._walks(tokens.shape[1], grid)
        hidden, residual = tokens, None
        count = last + 1 if stop_early else len(self.blocks)
        features = []
        for i in range(count):
            hidden, residual = self._run_block(i, hidden, residual, walks, source == "mixer")
            if i in take:
                feature = hidden if source == "mixer" else residual + hidden
                if norm and self.norm is not None:
                    feature = self.norm(feature)
                features.append(self._format(feature, grid, output_fmt, return_prefix_tokens))
        if intermediates_only:
            return features
        return self._finish(hidden, residual), features

    def _format(
        self, x: Tensor, grid: tuple[int, int], output_fmt: str, with_prefix: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        prefix = x[:, :0]
        if self.cls_token is not None:
            middle = (x.shape[1] - 1) // 2
            prefix = x[:, middle : middle + 1]
            x = torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1)
        if output_fmt == "NCHW":
            x = x.mT.unflatten(2, grid).contiguous()
        return (x, prefix) if with_prefix else x

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features of `indices` do not need; returns the blocks' positions."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = None
        if prune_head:
            self.reset_classifier(0, "")
        return take
