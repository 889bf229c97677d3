"""FastVim and Vim: the image backbones (sizes and registration: `fastvim.registry`).

B  batch, L  tokens (with the class token, where there is one), d  model width
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, fx, nn

from fastvim.errors import UserError
from fastvim.layers import AddNorm, Block, Mixer, PatchEmbed, add_and_norm, resize_grid, run_block
from fastvim.models.intermediates import Intermediates
from fastvim.models.parts import (
    grey_of,
    no_scripting,
    on_device,
    require_size,
    resample_patches,
    reset_layers,
)
from fastvim.models.walks import POOLINGS, SCAN_PATHS, grid_traversals, walk_over
from fastvim.ops import Segments, Traversal
from fastvim.ops.reference import NormKind
from fastvim.options import (
    CLASSES,
    COUNT,
    COUNT_OR_0,
    FINITE,
    POSITIVE,
    SHARE_BELOW_1,
    SIZE,
    SMALL_SIZE,
    check,
    check_choice,
    check_given,
)

# Nodes of their own in graphs that `torch.fx` traces: they look at sizes.
fx.wrap("grey_of")
fx.wrap("require_size")
fx.wrap("resize_grid")
fx.wrap("walk_over")

GLOBAL_POOLS = ("avg", "max", "avgmax", "token", "last", "max_logit", "")


class FastVim(Intermediates):
    """Fast Vision Mamba (arXiv 2502.00594), and Vision Mamba as the case that pools nothing.

    Takes images (B, in_chans, H, W) of any height and width from one patch up: they are padded to
    whole patches and the position embedding is resized to their grid.

    Args:
        img_size: side, or (height, width), that the position embedding is stored for.
        patch_size: side of a patch, in pixels.
        patch_stride: pixels between patches; None for `patch_size`.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for pooled features.
        global_pool: read-out. "avg" or "max" over tokens, the mean of both ("avgmax"), the class
            "token", the "last" token, the maximum over tokens of per-token logits ("max_logit"), or
            "" for all tokens.
        embed_dim: model width d.
        depth: number of blocks.
        pooling: how the tokens of a row or column become one scan step, "mean" or "max"; "none"
            is Vim, whose scan takes a step per token.
        scan_path: what the first layer pools, each "row" or each "column".
        alternate: rows and columns in turn; False keeps to the first.
        class_token: a learned token in the middle of the sequence (Vim only).
        norm: "rms", or "layer" as in the dense backbones.
        norm_after_ssm: the mixer's LayerNorm before its gate; the first Vim release has none.
        init_layer_scale: initial layer scale, None for none.
        pool_scale: factor on pooled values; 0.25 when fine-tuning from 75 % masked weights.
        d_state, d_conv, expand, dt_rank: sizes of the mixer (`fastvim.layers.Mixer`).
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block, linear from 0 at the first.
        takes_rgb: with `in_chans=1`, images of three channels are RGB, and made grey as by Pillow.
        dynamic_img_size: take images of any size; False refuses other sizes than `img_size`.
        traversals: walks that the layers take in turn; None: those of `pooling`, `scan_path`,
            `alternate` and `class_token`.
        device: of the weights; None: PyTorch's default one.
        dtype: of the weights, which are drawn in PyTorch's default one and rounded.

    Raises:
        UserError: an option outside its choices, or two that contradict each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        patch_stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 24,
        pooling: str = "mean",
        scan_path: str = "row",
        alternate: bool = True,
        class_token: bool = False,
        norm: NormKind = "rms",
        norm_after_ssm: bool = True,
        init_layer_scale: float | None = None,
        pool_scale: float = 1.0,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        takes_rgb: bool = False,
        dynamic_img_size: bool = True,
        traversals: tuple[Traversal, ...] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice(POOLINGS, pooling=pooling)
        check_choice(SCAN_PATHS, scan_path=scan_path)
        check_choice(get_args(NormKind), norm=norm)
        check(COUNT, img_size=img_size, patch_size=patch_size, in_chans=in_chans)
        check(COUNT, embed_dim=embed_dim, depth=depth)
        check(COUNT, d_state=d_state, d_conv=d_conv, expand=expand)
        check_given(COUNT, patch_stride=patch_stride, dt_rank=dt_rank)
        check(COUNT_OR_0, num_classes=num_classes)
        check(SIZE, img_size=img_size, in_chans=in_chans, embed_dim=embed_dim, d_state=d_state)
        check(SMALL_SIZE, patch_size=patch_size, depth=depth, d_conv=d_conv, expand=expand)
        check(CLASSES, num_classes=num_classes)
        check_given(SIZE, dt_rank=dt_rank)
        check(POSITIVE, pool_scale=pool_scale)
        check_given(FINITE, init_layer_scale=init_layer_scale)
        check(SHARE_BELOW_1, drop_path_rate=drop_path_rate)
        check(SHARE_BELOW_1, drop_rate=drop_rate, pos_drop_rate=pos_drop_rate)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = to_2tuple(img_size)
        self.dynamic_img_size = dynamic_img_size
        self.takes_rgb = takes_rgb and in_chans == 1
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.scan_path = scan_path
        self.grad_checkpointing = False
        self.traversals = traversals or grid_traversals(pooling, scan_path, alternate, class_token)

        with on_device(device):
            self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, patch_stride)
            self.grid_size = self.patch_embed.grid_size(*self.img_size)
            cells = self.grid_size[0] * self.grid_size[1]
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
            self.pos_embed = nn.Parameter(torch.empty(1, cells + int(class_token), embed_dim))
            self.pos_drop = nn.Dropout(pos_drop_rate)

            mixer: dict[str, Any] = {
                "depth": depth,
                "d_state": d_state,
                "d_conv": d_conv,
                "expand": expand,
                "dt_rank": dt_rank,
                "pooling": "max" if pooling == "max" else "mean",
                "pool_scale": pool_scale,
                "norm_after_ssm": norm_after_ssm,
                "init_layer_scale": init_layer_scale,
            }
            # A block's first step adds the output of the block before: its rate is that block's.
            rates = [0.0, *torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()]
            self.blocks = nn.ModuleList(
                Block(AddNorm(embed_dim, norm, rate), Mixer(embed_dim, **mixer))
                for rate in rates[:depth]
            )
            self.norm = AddNorm(embed_dim, norm, drop_path_rate)
            self.head_drop = nn.Dropout(drop_rate)
            self.reset_classifier(num_classes, global_pool)
            self._init_embeddings()
        if dtype is not None:
            self.to(dtype)

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor does; after `to_empty`, for instance."""
        reset_layers(self)
        self._init_head()
        self._init_embeddings()

    def _init_embeddings(self) -> None:
        """Draw the embeddings that belong to no layer."""
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """What timm's feature extractors ask of each block."""
        reduction = self.patch_embed.stride
        return [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": reduction}
            for i in range(len(self.blocks))
        ]

    @property
    def has_class_token(self) -> bool:
        """Whether a learned token stands in the middle of the sequence."""
        return self.cls_token is not None

    # Training and transfer, as timm asks for them.

    def no_weight_decay(self) -> set[str]:
        """The vectors that are stacked for both directions; others are known by their shape."""
        return {
            f"blocks.{i}.mixer.{name}" for i in range(len(self.blocks)) for name in Mixer.vectors
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise decay: the embeddings, each block, the rest."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None)],
        }

    def __prepare_scriptable__(self) -> nn.Module:
        raise no_scripting(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Store the positions of another image size, and resample patches of another size.

        Args:
            img_size: side, or (height, width); None keeps it.
            patch_size: side; None keeps it. The projection is resampled as FlexiViT's.

        Raises:
            UserError: a size that is none, patches that are not square, or that overlap.
        """
        before = self.grid_size
        if patch_size is not None:
            resample_patches(self.patch_embed, patch_size)
        if img_size is not None:
            check(COUNT, img_size=img_size)
            self.img_size = to_2tuple(img_size)
        grid = self.patch_embed.grid_size(*self.img_size)
        if grid != before:
            positions = self._cell_positions(grid).detach()
            if self.positions_class:
                middle = (self.pos_embed.shape[1] - 1) // 2
                token = self.pos_embed.detach()[:, middle : middle + 1]
                cells = positions.tensor_split([positions.shape[1] // 2], dim=1)
                positions = torch.cat([cells[0], token, cells[1]], dim=1)
            self.pos_embed = nn.Parameter(positions.clone(), self.pos_embed.requires_grad)
            self.grid_size = grid

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` outputs (0: none), and another read-out if one is given."""
        if global_pool is not None:
            check_choice(GLOBAL_POOLS, global_pool=global_pool)
            if global_pool == "token" and self.cls_token is None:
                raise UserError("global_pool='token' needs class_token=True")
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = (
            nn.Linear(self.embed_dim, num_classes, **_like(self.pos_embed))
            if num_classes > 0
            else nn.Identity()
        )
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    # Forward.

    @property
    def positions_class(self) -> bool:
        """Whether the position embedding has a vector for the class token."""
        return self.cls_token is not None

    def _cell_positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings of the cells of a grid, (1, H·W, d): all but the class token's."""
        position: Tensor = self.pos_embed
        if self.positions_class:
            middle = (position.shape[1] - 1) // 2
            position = torch.cat([position[:, :middle], position[:, middle + 1 :]], dim=1)
        return resize_grid(position, self.grid_size, grid)

    def _grid(self, image: Tensor) -> tuple[int, int]:
        height, width = image.shape[-2:]
        if not self.dynamic_img_size:
            require_size(height, width, self.img_size)
        return self.patch_embed.grid_size(height, width)

    def _embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The image's patches with their positions, and their grid."""
        if self.takes_rgb:
            image = grey_of(image)
        tokens, grid = self.patch_embed(image), self._grid(image)
        return tokens + self._cell_positions(grid), grid

    def _begin(self, tokens: Tensor) -> Tensor:
        """Put the class token, if there is one, in the middle of the patches; then dropout."""
        if self.cls_token is not None:
            token: Tensor = self.cls_token
            if self.positions_class:
                middle = (self.pos_embed.shape[1] - 1) // 2
                token = token + self.pos_embed[:, middle : middle + 1]
            before, after = tokens.tensor_split([tokens.shape[1] // 2], dim=1)
            tokens = torch.cat([before, token.expand(tokens.shape[0], -1, -1), after], dim=1)
        return self.pos_drop(tokens)

    def _walks(self, num_tokens: int, grid: tuple[int, int]) -> list[Segments]:
        """The segments of each walk over this grid; layers take the walks in turn."""
        if self.cls_token is not None:  # one line of tokens, not a grid
            return [walk_over(traversal, {"l": num_tokens}) for traversal in self.traversals]
        return [walk_over(traversal, {"h": grid[0], "w": grid[1]}) for traversal in self.traversals]

    def _run_block(
        self,
        i: int,
        hidden: Tensor,
        residual: Tensor | None,
        walks: list[Segments],
        pairs: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Block i; see `fastvim.layers.run_block`."""
        last = i + 1 == len(self.blocks)
        return run_block(
            self.blocks[i],
            hidden,
            residual,
            walks[i % len(walks)],
            following=self.norm if last else self.blocks[i + 1].norm,
            recompute=self.grad_checkpointing,
            pairs=pairs,
        )

    def _encode(self, tokens: Tensor, walks: list[Segments]) -> Tensor:
        """All blocks, and the last norm."""
        hidden, residual = tokens, None
        for i in range(len(self.blocks)):
            hidden, residual = self._run_block(i, hidden, residual, walks)
        return self._finish(hidden, residual)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) images to tokens after the last norm, (B, L, d)."""
        tokens, grid = self._embed(x)
        tokens = self._begin(tokens)
        return self._encode(tokens, self._walks(tokens.shape[1], grid))

    def _finish(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        if self.norm is None:
            return hidden if residual is None else residual + hidden
        return add_and_norm(self.norm, hidden, residual)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, L, d) tokens to logits (B, num_classes), or to the features before the head."""
        if self.global_pool == "avg":
            x = x.mean(dim=1)
        elif self.global_pool == "max":
            x = x.amax(dim=1)
        elif self.global_pool == "avgmax":
            x = (x.mean(dim=1) + x.amax(dim=1)) / 2
        elif self.global_pool == "token":
            x = x.select(1, (x.shape[1] - 1) // 2)  # an index by [] would be fixed in a graph
        elif self.global_pool == "last":
            x = x[:, -1]
        x = self.head_drop(x)
        if pre_logits or self.num_classes == 0:
            return x
        x = self.head(x)
        return x.amax(dim=1) if self.global_pool == "max_logit" else x

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) images to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _like(parameter: Tensor) -> dict[str, Any]:
    return {"device": parameter.device, "dtype": parameter.dtype}
