"""Masked autoencoders: FastVim or Vim over the kept patches, and a Vim that predicts the rest.

B  batch, C  channels of the image, d  model width, H W  token grid, L  cells of the grid
n  cells kept, p  side of a patch

Registration: `fastvim.registry`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, fx, nn

from fastvim.errors import UserError
from fastvim.layers import AddNorm, Block, Mixer, run_block
from fastvim.models.mask_vim import FastMaskVim, fixed_or_stored, fixed_positions
from fastvim.models.vision import FastVim, no_scripting, walk_over
from fastvim.ops import Traversal
from fastvim.ops.reference import NormKind
from fastvim.ops.traversal import Mirror
from fastvim.options import COUNT, SHARE_BELOW_1, SIZE, SMALL_SIZE, check, check_choice

# Nodes of their own in graphs that `torch.fx` traces: they look at sizes.
fx.wrap("draw_kept")
fx.wrap("fixed_or_stored")
fx.wrap("mask_of")
fx.wrap("patches_of")
fx.wrap("walk_over")


class MaskedOutput(NamedTuple):
    """What a masked autoencoder gives.

    Attributes:
        loss: scalar, the mean squared error of the masked patches.
        prediction: (B, L, p·p·C) pixels of every patch, normalised if `norm_pix_loss` is set.
        mask: (B, L) float, 1 where a patch was masked.
        latent: (B, n, d) tokens of the encoder after its last norm; with the class token, n + 1.
        ids_keep: (B, n) indices of the cells that the encoder saw.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor
    latent: Tensor
    ids_keep: Tensor


class MaskedAutoencoder(nn.Module):
    """Masked autoencoder (arXiv 2111.06377) of FastVim or Vim (FastVim, section 4).

    The encoder sees the kept patches alone. The decoder, always Vim blocks without pooling, sees
    them and a learned token for each masked patch, and predicts pixels.

    Args:
        img_size: side, or (height, width), that the position embeddings are stored for; images of
            any other size get those of their own grid.
        patch_size: side of a patch, in pixels.
        in_chans: channels of the image.
        embed_dim: width of the encoder.
        depth: blocks of the encoder.
        pooling: of the encoder, "mean", "max", or "none" for Vim. A mean divides by the cells of a
            row or column, kept or not: fine-tune with `pool_scale=1 - mask_ratio`.
        alternate: rows and columns in turn; False keeps to rows.
        class_token: a learned token in the middle of the kept ones (Vim only), the last one of
            the decoder's.
        norm: "rms" or "layer".
        norm_after_ssm: the mixers' LayerNorm before their gate.
        d_state, d_conv, expand: sizes of the mixers of encoder and decoder (`layers.Mixer`).
        dt_rank: of the encoder's mixers; None for ceil(embed_dim / 16).
        drop_path_rate: stochastic depth of the encoder's last block.
        decoder_embed_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        mask_ratio: part of the patches that is masked.
        norm_pix_loss: normalise each target patch by its own mean and standard deviation.
        mirror: how the backward direction of a masked FastVim layer pools: "published", or
            "exact", the true mirror image of the forward direction (`ops.Traversal`).

    Raises:
        UserError: an option outside its choices, or two that contradict each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 24,
        pooling: str = "mean",
        alternate: bool = True,
        class_token: bool = False,
        norm: NormKind = "rms",
        norm_after_ssm: bool = True,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        drop_path_rate: float = 0.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 2,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        mirror: Mirror = "published",
    ) -> None:
        super().__init__()
        check_choice(get_args(Mirror), mirror=mirror)
        check(COUNT, decoder_embed_dim=decoder_embed_dim, decoder_depth=decoder_depth)
        check(SIZE, decoder_embed_dim=decoder_embed_dim)
        check(SMALL_SIZE, decoder_depth=decoder_depth)
        check(SHARE_BELOW_1, mask_ratio=mask_ratio)
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.mirror: Mirror = mirror
        self.grad_checkpointing = False

        mixer: dict[str, Any] = {
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "norm_after_ssm": norm_after_ssm,
        }
        self.encoder = FastMaskVim(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            depth=depth,
            pooling=pooling,
            alternate=alternate,
            class_token=class_token,
            norm=norm,
            dt_rank=dt_rank,
            drop_path_rate=drop_path_rate,
            **mixer,
        )
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        grid = self.encoder.grid_size
        end = grid[0] * grid[1] if class_token else None
        positions = fixed_positions(grid, decoder_embed_dim, class_at=end)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(
                AddNorm(decoder_embed_dim, norm),
                Mixer(decoder_embed_dim, depth=depth, **mixer),
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = AddNorm(decoder_embed_dim, norm)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        trunc_normal_(self.mask_token, std=0.02)
        for linear in (self.decoder_embed, self.decoder_pred):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    # Training and transfer.

    def no_weight_decay(self) -> set[str]:
        """The vectors that are stacked for both directions; others are known by their shape."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()} | {
            f"decoder_blocks.{i}.mixer.{name}"
            for i in range(len(self.decoder_blocks))
            for name in Mixer.vectors
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise decay: the embeddings, each block of the encoder, the rest."""
        return {
            "stem": r"^encoder\.(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^encoder\.blocks\.(\d+)", None)],
        }

    def __prepare_scriptable__(self) -> nn.Module:
        raise no_scripting(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        self.encoder.set_grad_checkpointing(enable)

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """The encoder's weights under a classifier's names; only the head's are missing.

        `checkpoint_filter_fn` fits them to a classifier of another image size.
        """
        return self.encoder.state_dict()

    # Patches and masks.

    def patchify(self, images: Tensor) -> Tensor:
        """(B, C, height, width) to patches (B, L, p·p·C), pixels in order (row, column, channel).

        As the encoder does, zeros are added at the bottom and right up to whole patches.
        """
        return patches_of(images, self.encoder.patch_embed.patch_size)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, p·p·C) patches of a grid (H, W) to images (B, C, H·p, W·p).

        Raises:
            UserError: patches of another grid or of another size.
        """
        p, channels = self.encoder.patch_embed.patch_size, self.encoder.in_chans
        if patches.shape[1:] != (grid[0] * grid[1], p * p * channels):
            raise UserError(
                f"patches {tuple(patches.shape)}: expected "
                f"(batch, {grid[0]} * {grid[1]}, {p * p * channels})"
            )
        cells = patches.unflatten(2, (p, p, channels)).unflatten(1, grid)  # (B, H, W, p, p, C)
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def random_mask(
        self,
        batch: int,
        tokens: int,
        *,
        mask_ratio: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """The cells to keep of each image: those with the smallest noise.

        Args:
            batch: number of images, B.
            tokens: cells of an image, L.
            mask_ratio: None for the model's.
            noise: (B, L); None draws it uniformly.
            generator: draws the noise, on its own device.
            device: of the result; None for the noise's, or the default one.

        Returns:
            (B, n) int64 in ascending order, n = int(L · (1 - mask_ratio)).

        Raises:
            UserError: a ratio outside [0, 1) or one that keeps nothing, noise of another shape.
        """
        return draw_kept(batch, tokens, self.mask_ratio, mask_ratio, noise, generator, device)

    # Forward.

    def forward_encoder(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Images and the cells to keep, (B, n) in ascending order, to tokens after the last norm.

        (B, n, d); with a class token (B, n + 1, d), the token at n // 2.
        """
        return self.encoder.forward_features(images, ids_keep, self.mirror)

    def forward_decoder(self, latent: Tensor, ids_keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """The encoder's tokens to the pixels of every patch of the grid, (B, L, p·p·C)."""
        tokens, cells = self.decoder_embed(latent), grid[0] * grid[1]
        if self.encoder.cls_token is not None:
            middle = ids_keep.shape[1] // 2
            before, token, after = tokens.tensor_split([middle, middle + 1], dim=1)
            tokens = torch.cat([before, after], dim=1)
        blank = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], cells, -1)
        tokens = blank.scatter(1, ids_keep[:, :, None].expand_as(tokens), tokens)
        if self.encoder.cls_token is not None:
            tokens = torch.cat([tokens, token], dim=1)

        hidden, residual = tokens + self._decoder_positions(grid), None
        walk = walk_over(Traversal("l"), {"l": tokens.shape[1]})
        for block in self.decoder_blocks:
            hidden, residual = run_block(
                block, hidden, residual, walk, following=None, recompute=self.grad_checkpointing
            )
        prediction: Tensor = self.decoder_pred(self.decoder_norm.add(hidden, residual)[0])
        return prediction[:, :cells]

    def _decoder_positions(self, grid: tuple[int, int]) -> Tensor:
        stored, own = self.decoder_pos_embed, self.encoder.grid_size
        count = own[0] * own[1]
        cells = fixed_or_stored(stored[:, :count], own, grid)
        if self.encoder.cls_token is None:
            return cells
        return torch.cat([cells, stored[:, count:]], dim=1)

    def forward_loss(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the pixels of masked patches; 0 where nothing is masked.

        Args:
            images: (B, C, height, width).
            prediction: (B, L, p·p·C).
            mask: (B, L), 1 where masked.

        Returns:
            A scalar, in float32 at least.
        """
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        target = self.patchify(images).to(dtype)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction.to(dtype) - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum().clamp(min=1)

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        mask_ratio: float | None = None,
        generator: torch.Generator | None = None,
    ) -> MaskedOutput:
        """Mask, encode, decode, and compute the loss.

        Args:
            images: (B, C, height, width).
            noise: (B, L); the cells with the smallest noise are kept. None draws it.
            mask_ratio: None for the model's.
            generator: draws the noise.

        Raises:
            UserError: see `random_mask`; images of other channels or smaller than a patch.
        """
        height, width = images.shape[-2:]
        grid = self.encoder.patch_embed.grid_size(height, width)
        batch, cells = images.shape[0], grid[0] * grid[1]
        ids_keep = self.random_mask(
            batch,
            cells,
            mask_ratio=mask_ratio,
            noise=noise,
            generator=generator,
            device=images.device,
        )
        latent = self.forward_encoder(images, ids_keep)
        prediction = self.forward_decoder(latent, ids_keep, grid)
        mask = mask_of(ids_keep, cells)
        loss = self.forward_loss(images, prediction, mask)
        return MaskedOutput(loss, prediction, mask, latent, ids_keep)


def patches_of(images: Tensor, p: int) -> Tensor:
    """`MaskedAutoencoder.patchify`."""
    height, width = images.shape[-2:]
    images = F.pad(images, (0, -width % p, 0, -height % p))
    cells = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H, p, W, p)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def draw_kept(
    batch: int,
    tokens: int,
    usual_ratio: float,
    mask_ratio: float | None,
    noise: Tensor | None,
    generator: torch.Generator | None,
    device: torch.device | None,
) -> Tensor:
    """`MaskedAutoencoder.random_mask`."""
    ratio = usual_ratio if mask_ratio is None else mask_ratio
    check(SHARE_BELOW_1, mask_ratio=ratio)
    count = int(tokens * (1 - ratio))
    if count == 0:
        raise UserError(f"mask_ratio={ratio} keeps none of {tokens} patches")
    if noise is None:
        source = device if generator is None else generator.device
        noise = torch.rand(batch, tokens, generator=generator, device=source)
    if noise.shape != (batch, tokens):
        raise UserError(f"noise {tuple(noise.shape)}: expected ({batch}, {tokens})")
    ids_keep = noise.argsort(dim=1, stable=True)[:, :count]
    return ids_keep.sort(dim=1).values.to(device)


def mask_of(ids_keep: Tensor, cells: int) -> Tensor:
    """(B, n) kept cells to (B, L) float, 1 where a cell is masked."""
    ones = torch.ones(ids_keep.shape[0], cells, device=ids_keep.device)
    return ones.scatter(1, ids_keep, 0.0)


def encoder_of(model: nn.Module) -> FastVim:
    """The backbone of a model: a FastVim itself, or the encoder of a masked autoencoder."""
    backbone = model.encoder if isinstance(model, MaskedAutoencoder) else model
    assert isinstance(backbone, FastVim)
    return backbone
