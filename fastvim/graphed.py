"""`GraphedModel`, whose code is in `fastvim.cudagraph`."""

from fastvim.cudagraph import GraphedModel

__all__ = ["GraphedModel"]
