"""Linear probe: how good a frozen backbone's features are, as a LightningModule.

d  width of the features
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn, optim

from fastvim.errors import UserError
from fastvim.options import SHARE_BELOW_1, check
from fastvim.tasks.classification import Classification
from fastvim.tasks.sharding import gather, whole


class LinearProbe(Classification):
    """Trains a linear classifier on the pooled features of a frozen backbone.

    The features are normalised with their own statistics (BatchNorm without affine parameters)
    before the head. The backbone stays in evaluation mode and is not trained. The defaults are the
    published recipe.

    Exported weights, and those of a checkpoint, are an ordinary classifier's: the normalisation is
    folded into the head. A checkpoint holds the unfolded weights as well, for resuming.

    Args:
        model: name of a timm model whose head is one linear layer, e.g.
            `fastvim_base_patch16_224`.
        model_args: options of that model; `pool_scale: 0.25` for a FastVim encoder that was
            pre-trained with 75 % masked.
        checkpoint: file of the backbone's weights, without its head; None probes random weights.
            Ignored when resuming.
        momentum: of SGD.
        weight_decay: of the head's weight; its bias has none.
        lr_by_epoch: see `Task`.

    Raises:
        UserError: as `Classification`; a model whose head is not one linear layer, or whose
            features are not pooled before it.
    """

    norm: nn.BatchNorm1d
    classes_by_name = False  # its head is new
    fixed_options = (
        *("weight_decay_end", "no_decay", "layer_decay", "blocks_per_decay", "betas"),
        *("decay_vectors", "lr_scales"),
        *("mixup", "cutmix", "switch_prob", "label_smoothing"),
        *("ema_decay", "grad_checkpointing", "capture", "sample_channels"),
    )

    def __init__(
        self,
        model: str,
        model_args: dict[str, Any] | None = None,
        num_classes: int | None = None,
        checkpoint: str | None = None,
        lr: float = 0.1,
        lr_batch: int = 256,
        min_lr: float = 0.0,
        warmup_lr: float = 0.0,
        warmup_epochs: float = 10,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        lr_by_epoch: bool = True,
    ) -> None:
        super().__init__(
            model,
            model_args,
            num_classes,
            checkpoint,
            lr=lr,
            lr_batch=lr_batch,
            min_lr=min_lr,
            warmup_lr=warmup_lr,
            warmup_epochs=warmup_epochs,
            weight_decay=weight_decay,
            lr_by_epoch=lr_by_epoch,
            mixup=0.0,
            cutmix=0.0,
            label_smoothing=0.0,
            ema_decay=None,
        )
        check(SHARE_BELOW_1, momentum=momentum)
        self.momentum = momentum

    def configure_model(self) -> None:
        """Build the network, freeze it, and give it a new head; Lightning calls it."""
        if self.model is not None:
            return
        super().configure_model()
        assert isinstance(self.model, nn.Module)
        self.model.requires_grad_(False).eval()
        self.head.requires_grad_(True)
        if self.checkpoint is None or self.fitting:
            trunc_normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)
        self.norm = nn.BatchNorm1d(self.head.in_features, eps=1e-6, affine=False)

    @property
    def head(self) -> nn.Linear:
        """The classifier of the network."""
        assert self.model is not None
        head = self.model.get_classifier()  # type: ignore[operator]
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise UserError(f"{self.model_name} cannot be probed: its head is not one linear layer")
        return head

    def train(self, mode: bool = True) -> LinearProbe:
        """Training mode for all but the backbone."""
        super().train(mode)
        if self.model is not None:
            self.model.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalised images (B, C, H, W)."""
        with torch.no_grad():
            tokens = self.model.forward_features(images)  # type: ignore[union-attr, operator]
            features = self.model.forward_head(tokens, pre_logits=True)  # type: ignore[union-attr, operator]
        if features.ndim != 2:
            raise UserError(
                f"{self.model_name} cannot be probed: its features are not pooled before the head"
            )
        return self.head(self.norm(features.float()))

    def make_optimizer(self) -> optim.Optimizer:
        groups = [
            {"params": [self.head.weight], "weight_decay": self.weight_decay},
            {"params": [self.head.bias], "weight_decay": 0.0},
        ]
        return optim.SGD(groups, lr=self.peak_lr, momentum=self.momentum)

    # Exports and checkpoints: the normalisation is folded into the head.

    def exported_weights(self) -> dict[str, Tensor]:
        """The network's weights, with the normalisation folded into the head."""
        weights, prefix = super().exported_weights(), self._head_name
        mean, variance = (self.norm.get_buffer(f"running_{name}") for name in ("mean", "var"))
        head, shift = (whole(each.detach()) for each in (self.head.weight, self.head.bias))
        weight = head / (variance + self.norm.eps).sqrt()  # (classes, d)
        bias = shift - weight @ mean
        return {**weights, f"{prefix}.weight": weight, f"{prefix}.bias": bias}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        state, head = checkpoint["state_dict"], f"model.{self._head_name}."
        checkpoint["probe"] = {
            name: weight for name, weight in state.items() if name.startswith(("norm.", head))
        }
        folded = gather(self.exported_weights(), self.trainer.is_global_zero)
        checkpoint["state_dict"] = {f"model.{name}": weight for name, weight in folded.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **checkpoint.get("probe", {})}
        super().on_load_checkpoint(checkpoint)

    @property
    def _head_name(self) -> str:
        """Name of the head among the network's modules."""
        assert self.model is not None
        return next(name for name, part in self.model.named_modules() if part is self.head)
