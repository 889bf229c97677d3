"""How `timm.create_model` builds the registered models: options, published weights, features."""

from __future__ import annotations

from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg
from torch import nn

from fastvim.errors import OptionError, UserError, first_few
from fastvim.models.feature_pyramid import FeaturePyramid
from fastvim.weights.published import published_file
from fastvim.weights.table import ENTRIES, Entry, find_entry


def published_cfg(entry: Entry) -> dict[str, Any]:
    """What timm shall know of published weights beside the model's own configuration."""
    images = entry.images
    found = {
        "url": entry.url,
        "license": entry.licence.lower(),
        "input_size": (images["in_chans"], images["img_size"], images["img_size"]),
    }
    if "num_classes" in entry.model_args:
        found["num_classes"] = entry.model_args["num_classes"]
    return found


def build(
    model: type[nn.Module],
    variant: str,
    pretrained: bool,
    own_cfg: dict[str, Any],
    defaults: dict[str, Any],
    given: dict[str, Any],
    **building: Any,
) -> Any:
    """As timm builds it. A tag of the table chooses options; published weights are converted.

    Args:
        model: the class.
        variant: registered name.
        pretrained: load weights; without a tag or a source of weights, those of the first tag.
        own_cfg: timm's configuration of the variant without a tag.
        defaults: the variant's options; a tag's come over them.
        given: the caller's options, over both, beside what `timm.create_model` passes on.
        **building: more for `build_model_with_cfg`.
    """
    cfg = given.pop("pretrained_cfg", None)
    overlay = dict(given.pop("pretrained_cfg_overlay", None) or {})
    features = features_cfg(given)
    entry = _chosen(variant, pretrained and not _has_source(overlay), cfg)
    fetched = pretrained and entry is not None and not _has_source(overlay)
    if entry is None:
        cfg = cfg or {**own_cfg, "architecture": variant}
    else:
        defaults = {**defaults, **entry.model_args}
        cfg = cfg or entry.tag
        overlay = {**published_cfg(entry), **overlay}
        if fetched:
            overlay["file"] = str(published_file(entry.name))
    try:
        built: Any = build_model_with_cfg(
            model,
            variant,
            pretrained,
            pretrained_cfg=cfg,
            pretrained_cfg_overlay=overlay,
            feature_cfg=features,
            **building,
            **{**defaults, **given},
        )
    except RuntimeError as error:
        if entry is None or "loading state_dict" not in str(error):
            raise
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        what = f"the weights of {entry.name} do not fit these options"
        raise UserError(f"{what}: {first_few(problems, 2)}") from error
    if fetched:  # the address and the tag stay, the place on this machine does not
        for each in (built, getattr(built, "model", None)):  # with features_only, and inside
            if each is not None:
                each.pretrained_cfg.pop("file", None)
    return built


def _chosen(variant: str, fetch: bool, cfg: Any) -> Entry | None:
    """The published weights whose options are meant; None without a tag of the table.

    Args:
        variant: registered name.
        fetch: the weights of the first tag are meant where no tag and no source is named.
        cfg: tag, timm's configuration, or None.
    """
    if isinstance(cfg, str):
        return find_entry(f"{variant}.{cfg}")
    if cfg:
        if not isinstance(cfg, dict | PretrainedCfg):
            raise OptionError("pretrained_cfg", cfg, "a tag, or a configuration of timm")
        told = cfg if isinstance(cfg, dict) else cfg.to_dict()
        entry = ENTRIES.get(f"{variant}.{told.get('tag')}")
        known = entry is not None and told.get("url") == entry.url
        return entry if known and not told.get("file") else None
    return find_entry(variant) if fetch else None


def _has_source(overlay: dict[str, Any]) -> bool:
    return any(overlay.get(key) for key in ("url", "file", "state_dict", "hf_hub_id"))


def features_cfg(given: dict[str, Any]) -> dict[str, Any]:
    """What `features_only` gives: a pyramid, or timm's own kinds by `feature_cls`.

    Args:
        given: the caller's options; those of the pyramid alone are taken out.
    """
    stride = given.pop("output_stride", None)
    if given.get("feature_cls") not in (None, "pyramid"):
        if stride is not None:
            raise UserError(f"output_stride={stride}: feature_cls='pyramid' has it alone")
        return {"out_indices": 3}  # the last three blocks
    if not given.get("features_only"):
        if stride is not None:
            raise UserError(
                f"output_stride={stride}: the pyramid of features_only=True has it alone"
            )
        return {}
    given["feature_cls"] = FeaturePyramid
    return {"out_indices": (0, 1, 2, 3), **({} if stride is None else {"output_stride": stride})}
