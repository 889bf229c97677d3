"""torch.export with dynamic batch, height and width: one program serves sizes it never saw."""

from __future__ import annotations

import pytest
import torch
from small_models import build, inputs
from torch.export import Dim, export

FAMILIES = ["fastvim", "vim", "channels", "chosen channels", "channelvim", "encoder"]
# Not traced, not square, not multiples of the patch.
SIZES = [(1, 48, 48), (3, 100, 53), (5, 33, 160)]


def named() -> dict[int, object]:
    return {0: Dim("batch"), 2: Dim("height", min=32), 3: Dim("width", min=32)}


def free() -> dict[int, object]:
    return dict.fromkeys((0, 2, 3), Dim.AUTO)


def dynamic(family: str, image: dict[int, object]):
    if family == "chosen channels":
        return {**image, 1: Dim.AUTO}, {0: Dim.AUTO}
    return (image, {0: Dim.AUTO, 1: Dim.AUTO}) if family == "encoder" else (image,)


def cases() -> list:
    """One by default; `make test-slow` has every way with one family and every family with one."""
    ways = [(False, named), (False, free), (True, named), (True, free)]
    first, *every = [(family, *way) for family in FAMILIES for way in ways]
    slow, programs = pytest.mark.slow, pytest.mark.programs

    def mark(family: str, *way):
        return slow if family == "chosen channels" or way == (True, named) else programs

    return [first, *(pytest.param(*case, marks=mark(*case)) for case in every)]


@pytest.mark.parametrize(("family", "strict", "image"), cases())
@torch.no_grad()
def test_a_program_serves_other_sizes(family, strict, image):
    model = build(family)
    for name, parameter in model.named_parameters():
        if "pos_embed" in name:  # stored ones that no formula gives
            parameter.copy_(torch.randn(parameter.shape))
    traced = inputs(family, 2, 70, 90)
    shapes = dynamic(family, image())
    program = export(model, traced, dynamic_shapes=shapes, strict=strict).module()
    others = [inputs(family, *size) for size in SIZES]
    if family == "chosen channels":
        others.append(inputs(family, 2, 40, 64, chans=2))
    for other in others:
        torch.testing.assert_close(program(*other), model(*other))
