"""What segmentation and detection share: initial weights, warm-up in steps."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastvim.errors import UserError
from fastvim.models import FastVim
from fastvim.options import COUNT_OR_0, check
from fastvim.tasks.classes import fit_classes
from fastvim.tasks.task import Task
from fastvim.weights import (
    Checkpoint,
    checkpoint_filter_fn,
    head_of,
    load_state,
    take_backbone,
)
from fastvim.weights.fit import without_class_token
from fastvim.weights.names import is_channel

_logger = logging.getLogger(__name__)


class DenseTask(Task):
    """A `Task` whose network is a head over a FastVim or Vim, with a warm-up in steps.

    A subclass sets `head` and gives `add_head`.

    Args:
        model: name of a fastvim or vim model, e.g. `fastvim_tiny_patch16_224`.
        model_args: options of that model, e.g. `{norm: layer, drop_path_rate: 0.4}`.
        checkpoint: weights to start from, a file or the name of published ones: those of a
            classifier, a masked autoencoder or a dense model of the other kind without head and
            last norm, or of a whole model of this kind. Training makes new layers of classes for
            other classes (see `Task`). The weights of RMS norms are given to the LayerNorms of
            `norm: layer`. None starts from random ones. Ignored when resuming.
        warmup_steps: length of the warm-up, in optimiser steps. A warm-up as long as the run is
            shortened to a tenth of the run.
        decay_vectors: see `Task`.
        no_decay: shell patterns of parameter names without weight decay; None for the published
            ones.
    """

    head: str  # "segmentation" or "detection", as files of weights call it
    fixed_options: tuple[str, ...] = (
        *("warmup_epochs", "weight_decay_end", "ema_decay", "lr_by_epoch"),
    )

    def __init__(
        self, *args: Any, warmup_steps: int, decay_vectors: bool = True, **options: Any
    ) -> None:
        super().__init__(
            *args,
            warmup_epochs=0,
            weight_decay_end=None,
            ema_decay=None,
            lr_by_epoch=False,
            decay_vectors=decay_vectors,
            **options,
        )
        check(COUNT_OR_0, warmup_steps=warmup_steps)
        self.warmup_steps = warmup_steps

    def configure_model(self) -> None:
        """Build the network; Lightning calls it."""
        if self.model is None:
            self.model = self.build_model(num_classes=self.head_classes)

    def add_head(self, backbone: FastVim, **options: Any) -> nn.Module:
        """The whole network over a backbone."""
        raise NotImplementedError

    def build_model(self, **options: Any) -> nn.Module:
        """The network, with the weights of a backbone or of a whole model to start from."""
        backbone = self.create_network()
        if not isinstance(backbone, FastVim):
            raise UserError(f"model {self.model_name}: expected a fastvim or vim model")
        given = self.initial_weights()
        whole = given is not None and head_of(given.state) == self.head
        if given is not None and not whole:
            if not self.fitting:
                raise UserError(f"{given.path} holds no {self.head} head: expected a file of one")
            load_backbone(backbone, given)
        model = self.add_head(backbone, **options)
        if given is not None and whole:
            load_state(model, fit_classes(self, given), new_head=self.fitting)
        return model

    def warmup(self, steps_per_epoch: int) -> tuple[int, str]:
        return self.warmup_steps, f"warmup_steps is {self.warmup_steps}"


def load_backbone(backbone: FastVim, checkpoint: Checkpoint) -> None:
    """Load all weights of a file but those of the head and the last norm.

    The file is a classifier's, a masked autoencoder's or a dense model's. As published, what is
    said once: LayerNorms take the weights of RMS norms and keep their own biases of 0; a backbone
    without a class token leaves out the file's; norms after the scan that the file lacks keep their
    initial values.

    Raises:
        UserError: the weights are of another architecture.
    """
    own = backbone.state_dict()
    state = take_backbone(checkpoint).state
    if backbone.cls_token is None and "cls_token" in state and not is_channel(state):
        _logger.warning("%s: the class token is left out, the model has none", checkpoint.path)
        state = without_class_token(state)
    state = checkpoint_filter_fn(state, backbone)
    unused = ("head.", "norm.", "norms.")
    state = {name: weight for name, weight in state.items() if not name.startswith(unused)}
    state |= {name: weight for name, weight in own.items() if name.startswith(unused)}
    biases = [name for name in own if name.endswith(".norm.bias") and ".mixer." not in name]
    absent = [name for name in biases if name not in state]
    if absent and len(absent) == sum(name.startswith("blocks.") for name in biases):
        _logger.warning("%s has RMS norms: LayerNorms take their weights", checkpoint.path)
        state |= {name: torch.zeros_like(own[name]) for name in absent}
    scan_norms = [name for name in own if ".mixer.norm." in name]
    if scan_norms and not any(name in state for name in scan_norms):
        _logger.warning("%s has no norms after the scan: they are new", checkpoint.path)
        state |= {name: own[name] for name in scan_norms}
    load_state(backbone, replace(checkpoint, state=state))
