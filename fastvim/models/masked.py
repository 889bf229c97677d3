"""Masked autoencoders: FastVim or Vim over the kept patches, and a Vim that predicts the rest.

B  batch, C  channels of the image, d  model width, H W  token grid, L  cells of the grid
n  cells kept, p  side of a patch

Registration: `fastvim.registry`.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, fx, nn

from fastvim.errors import OptionError, UserError
from fastvim.layers import AddNorm, Block, Mixer, add_and_norm, run_block
from fastvim.models.mask_vim import FastMaskVim, fixed_or_stored, fixed_positions
from fastvim.models.masking import MaskedOutput, draw_kept, mask_of, patches_of
from fastvim.models.parts import no_scripting, on_device, reset_layers
from fastvim.models.vision import FastVim
from fastvim.models.walks import walk_over
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
        num_classes: 0, as timm's models without a head take it.
        device, dtype: of the weights; see `FastVim`.

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
        num_classes: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice(get_args(Mirror), mirror=mirror)
        check(COUNT, decoder_embed_dim=decoder_embed_dim, decoder_depth=decoder_depth)
        check(SIZE, decoder_embed_dim=decoder_embed_dim)
        check(SMALL_SIZE, decoder_depth=decoder_depth)
        check(SHARE_BELOW_1, mask_ratio=mask_ratio)
        self.reset_classifier(num_classes)
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
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        with on_device(device):
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
            cells = self.encoder.grid_size[0] * self.encoder.grid_size[1]
            positions = torch.empty(1, cells + int(class_token), decoder_embed_dim)
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
            self._init_decoder()
        if dtype is not None:
            self.to(dtype)

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor does; after `to_empty`, for instance."""
        reset_layers(self)
        self.encoder.init_weights()
        self._init_decoder()

    def _init_decoder(self) -> None:
        """Draw what the decoder has beside its blocks, and compute its fixed positions."""
        grid, width = self.encoder.grid_size, self.mask_token.shape[2]
        end = grid[0] * grid[1] if self.encoder.cls_token is not None else None
        self.decoder_pos_embed.copy_(fixed_positions(grid, width, class_at=end))
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

    # What timm asks of a model without a head: the encoder's features of whole images.

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The blocks of the encoder."""
        return [
            {**info, "module": f"encoder.{info['module']}"} for info in self.encoder.feature_info
        ]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Store the positions of another image size, (height, width) or a side."""
        check(COUNT, img_size=img_size)
        grid = self.encoder.patch_embed.grid_size(*to_2tuple(img_size))
        self.decoder_pos_embed = nn.Parameter(self._decoder_positions(grid), requires_grad=False)
        self.encoder.set_input_size(img_size)

    def get_classifier(self) -> nn.Module:
        """The encoder's head, an identity."""
        return self.encoder.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Nothing for 0 classes; a masked autoencoder has no head."""
        if num_classes != 0:
            raise OptionError("num_classes", num_classes, "0: a masked autoencoder has no head")
        self.num_classes = 0

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, height, width) images, nothing masked, to the encoder's tokens, (B, L, d)."""
        return self.encoder.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The encoder's tokens (B, L, d) to their mean, (B, d)."""
        return x.mean(dim=1)

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Features of the encoder's blocks; see `FastVim.forward_intermediates`."""
        return self.encoder.forward_intermediates(x, *args, **options)

    def prune_intermediate_layers(self, *args: Any, **options: Any) -> list[int]:
        """Remove blocks of the encoder; see `FastVim.prune_intermediate_layers`."""
        return self.encoder.prune_intermediate_layers(*args, **options)

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
        prediction: Tensor = self.decoder_pred(add_and_norm(self.decoder_norm, hidden, residual)[0])
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


def encoder_of(model: nn.Module) -> FastVim:
    """The backbone of a model: a FastVim itself, or the encoder of a masked autoencoder."""
    backbone = model.encoder if isinstance(model, MaskedAutoencoder) else model
    assert isinstance(backbone, FastVim)
    return backbone
