"""Weights of earlier versions of the heads, fitted to those of today."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

_logger = logging.getLogger(__name__)

# A detector had one mask head, learned on the first stage's regions.
_ONE_MASK_HEAD = {
    "heads.mask_head.": "heads.mask_stages.{}.head.",
    "heads.mask_predictor.": "heads.mask_stages.{}.predictor.",
}


def fit_mask_heads(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let a detector's one mask head serve all stages of `own`; other weights stay as they are."""
    old = [name for name in state if name.startswith(tuple(_ONE_MASK_HEAD))]
    stages = {name.split(".")[2] for name in own if name.startswith("heads.mask_stages.")}
    if not old or not stages:
        return dict(state)
    _logger.warning(
        "the weights are of a detector with one mask head: it serves all %d stages", len(stages)
    )
    fitted = {name: tensor for name, tensor in state.items() if name not in old}
    for name in old:
        prefix = next(prefix for prefix in _ONE_MASK_HEAD if name.startswith(prefix))
        for stage in stages:
            target = _ONE_MASK_HEAD[prefix].format(stage) + name.removeprefix(prefix)
            fitted[target] = state[name]
    return fitted
